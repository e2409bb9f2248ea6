"""A log that survives a kill at any moment: one JSON value a line, each with the step that it belongs to."""

import json
from pathlib import Path
from typing import Any

from nspo.files.atomic import atomic_path


class JsonLines:
    """Rows appended to a file as they come, so that an interrupted run keeps them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows; a last line cut off by a kill is left out."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows at the end."""
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def rewind(self, step: int) -> None:
        """Forget what came after `step`: a resumed run does it again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        with atomic_path(self.path) as scratch:
            scratch.write_text("".join(json.dumps(row) + "\n" for row in kept))

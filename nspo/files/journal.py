"""A record that survives a kill at any moment: one JSON value a line, appended as the work goes on."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nspo.errors import UserError
from nspo.files.atomic import atomic_path


class JsonLines:
    """Values appended to a file as they come, so that an interrupted run keeps them.

    A line that a kill cut off is passed over by readers, and taken away before anything is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = False

    def rows(self) -> list[Any]:
        """All values whose line is whole.

        Raises:
            UserError: when a whole line is not JSON.
        """
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []
        rows: list[Any] = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{self.path}: line {number} is damaged: delete the file and rerun the stage, which makes it again"
                ) from error
        return rows

    def append(self, rows: Iterable[Any]) -> None:
        """Add values at the end; they are on their way to the disk when this returns."""
        if not self._whole:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._cut()
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def keep(self, rows: Iterable[Any]) -> None:
        """Let the file hold exactly these values."""
        with atomic_path(self.path) as scratch:
            scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")

    def rewind(self, step: int) -> None:
        """Forget what came after `step`, for rows that each have one: a resumed run does it again."""
        self.keep(row for row in self.rows() if row["step"] <= step)

    def _cut(self) -> None:
        """Take away a last line that was cut off."""
        if self.path.is_file():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                with self.path.open("r+b") as file:
                    file.truncate(content.rfind(b"\n") + 1)
        self._whole = True

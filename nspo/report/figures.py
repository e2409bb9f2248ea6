"""Figures of the page: saved for their own use, embedded for the page's."""

import base64
from pathlib import Path
from typing import Any

from nspo.report import plots


class Figures:
    """Saves figures into the plots folder and hands the template what to embed."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, name: str, figure: Any, title: str) -> dict[str, str]:
        """Save `figure` as `name`.png and `name`.svg; returns its `title` and the SVG as a data URI."""
        data = plots.save(figure, self.folder, name).read_bytes()
        return {"title": title, "uri": f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}"}

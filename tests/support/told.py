"""What a user is told, and whether it is fit to be read."""

from collections.abc import Callable
from typing import Any

from nspo.errors import UserError
from nspo.settings.reading import LONGEST


def outcome(read: Callable[[], Any]) -> tuple[Any, str]:
    """What `read` returns and no message, or nothing and the user's message; any other exception is a failure."""
    try:
        return read(), ""
    except UserError as error:
        return None, str(error)


def check_lines(text: str, where: str) -> list[str]:
    """The lines of a message: each names the file, is short, and cannot steer a terminal."""
    lines = text.splitlines()
    assert lines
    for line in lines:
        assert line.startswith(where), line
        assert line.isprintable(), line
        assert len(line.removeprefix("nspo: error: ")) <= LONGEST + 3, line
    return lines

"""The one exception that reaches users: a single line saying what was found, what was expected and what to change."""

from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend. The command line prints it as one line, without a traceback, and exits with 2.

    Args:
        found: what was found, with the number or name; or the whole message.
        expected: what was expected in its place.
        change: which key or file to change, or what to do.
    """

    def __init__(self, found: str, *, expected: str = "", change: str = "") -> None:
        super().__init__(found + (f", expected {expected}" if expected else "") + (f": {change}" if change else ""))


class Paused(Exception):
    """The work was asked to stop and is kept: the command line says so in one line and exits with 143."""


def first_line(error: BaseException) -> str:
    """What a library's exception says, without the advice that follows; its name where it says nothing.

    Nothing in it steers a terminal: what cannot be printed is written out.
    """
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def refuse_no_file(path: Path | str) -> None:
    """Refuse what is there and is no file: whoever reads a named pipe may wait for ever."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'a named pipe or a device'}", expected="a file")


def unreadable(path: Path | str, expected: str, error: BaseException) -> UserError:
    """What to say when a file that is there could not be read as `expected`, such as "a whole Parquet file".

    A permission that is missing, or a disk that fails, is told as such: the file may be whole.
    """
    try:
        Path(path).open("rb").close()  # not every library says what the system said
    except PermissionError:
        return UserError(f"{path}: no permission to read it", expected=expected, change="ask its owner for read access")
    except OSError as fault:
        error = fault
    if reason := getattr(error, "strerror", None):
        return UserError(f"{path} cannot be read ({reason})", expected=expected)
    return UserError(f"{path} is not {expected} ({first_line(error)}): delete it and rerun the stage that makes it")

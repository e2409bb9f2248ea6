"""Cells of a data set's rows, checked: what a column holds, or one line that names the file, the key and the fault."""

import re
from collections.abc import Mapping
from typing import Any

from nspo.errors import UserError

Row = Mapping[str, Any]


def cell(raw: Row, column: str, where: str) -> Any:
    """What `column` holds.

    Raises:
        UserError: when there is no such column.
    """
    if column not in raw:
        raise UserError(f"{where}: no column {column!r}, found {', '.join(map(str, raw))}")
    return raw[column]


def text(raw: Row, column: str, where: str, empty: bool = False) -> str:
    """The text of `column`, without the space around it.

    Args:
        empty: whether it may be empty, as an answer may.

    Raises:
        UserError: no such column, no text, or one that no file can store.
    """
    found = cell(raw, column, where)
    if not isinstance(found, str | None):
        raise UserError(f"{where}: a row has the {column!r} {found!r:.60}", expected="text")
    stripped = encodable((found or "").strip(), column, where)
    if not empty and not any(char.isprintable() and not char.isspace() for char in stripped):
        raise UserError(f"{where}: a row has an empty {column!r}", expected="text")
    return stripped


def optional(raw: Row, column: str, where: str) -> str:
    """The text or number in a column that may be missing or empty."""
    return encodable(_shown(raw.get(column)), column, where)


def _shown(value: Any) -> str:
    """A cell as text; empty where nothing stands in it, which pandas writes as NaN."""
    return "" if value is None or value != value else str(value)


def encodable(found: str, column: str, where: str) -> str:
    """`found`, unless it holds half a surrogate pair or a NUL, which JSON can spell and not every file can store."""
    if "\0" in found:
        raise UserError(f"{where}: a row has a {column!r} with a NUL character", expected="text", change="mend it")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a row has a {column!r} that is no Unicode text ({error.reason}): mend it") from error
    return found


def flag(raw: Row, column: str, where: str) -> bool:
    """The truth in `column`, as a JSON, Parquet or CSV file spells it.

    Raises:
        UserError: no such column, or anything but true and false.
    """
    found = cell(raw, column, where)
    spelt = str(found).lower()
    if spelt not in ("true", "false", "1", "0"):
        raise UserError(f"{where}: a row has the {column!r} {found!r:.60}", expected="true or false")
    return spelt in ("true", "1")


def which(raw: Row, column: str, where: str) -> int:
    """The number of one of two responses, 0 or 1, in `column`.

    Raises:
        UserError: no such column, or another value.
    """
    found = cell(raw, column, where)
    if str(found) not in ("0", "1"):
        raise UserError(f"{where}: a row has the {column!r} {found!r:.60}", expected="0 or 1, the number of a response")
    return int(found)


def matches(raw: Row, only: Mapping[str, str], where: str) -> bool:
    """Whether every column of `only` matches its regular expression somewhere; an empty cell is empty text.

    Raises:
        UserError: when a column is missing.
    """
    return all(re.search(pattern, _shown(cell(raw, column, where))) for column, pattern in only.items())

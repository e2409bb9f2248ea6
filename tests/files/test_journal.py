"""The journal of interrupted work."""

from pathlib import Path

import pytest

from nspo.errors import UserError
from nspo.files.journal import JsonLines


def test_a_kill_at_any_byte_loses_the_last_value_at_most(tmp_path: Path) -> None:
    """Cut anywhere, the whole values are read, and what is added afterwards is whole too."""
    rows = [["é", 1], {"step": 2, "text": "a\u2028b\n"}, [None, [1.5]]]
    JsonLines(tmp_path / "whole").append(rows)
    content = (tmp_path / "whole").read_bytes()
    for cut in range(len(content) + 1):
        path = tmp_path / "cut"
        path.write_bytes(content[:cut])
        journal = JsonLines(path)
        kept = journal.rows()
        assert kept == rows[: content[:cut].count(b"\n")]
        journal.append(["next"])
        journal.append(["last"])
        assert JsonLines(path).rows() == [*kept, "next", "last"]


def test_rewinding_forgets_later_steps(tmp_path: Path) -> None:
    """Rows of later steps go; no file means no rows."""
    journal = JsonLines(tmp_path / "new" / "log.jsonl")
    assert journal.rows() == []
    journal.append({"step": step} for step in (0, 1, 1, 2))
    journal.rewind(1)
    assert [row["step"] for row in journal.rows()] == [0, 1, 1]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    """A whole line that is no JSON is damage, not a kill: nothing is silently left out."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"[1]\n[2\xff]\n[3]\n")
    with pytest.raises(UserError, match=r"log\.jsonl: line 2 is damaged"):
        JsonLines(path).rows()

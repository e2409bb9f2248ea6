"""Parquet tables: what is written is read back or refused."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nspo.errors import UserError
from nspo.files.manifest import check_made_with, make_manifest
from nspo.files.tables import load_table, read_table, write_table

ROWS = [{"text": f"row {i} " * 20, "n": i} for i in range(50)]


def test_rows_and_manifest_come_back_in_equal_bytes(tmp_path: Path) -> None:
    """Columns have the types that were asked for; a column that a row lacks is null; the bytes repeat."""
    manifest = make_manifest("rows", z=1, a={"c": 2, "b": 1})
    for name in ("one", "two"):
        write_table([*ROWS, {"n": 50, "more": 1}], tmp_path / name, {"n": pa.int32(), "text": pa.string()}, manifest)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found, rows = load_table(tmp_path / "one", "rows", ["n"])
    assert found == manifest
    assert rows == [*({"n": row["n"], "text": row["text"]} for row in ROWS), {"n": 50, "text": None}]
    schema = pq.read_schema(tmp_path / "one")
    assert schema.field("n").type == pa.int32()
    assert schema.metadata[b"nspo"].decode() == json.dumps(manifest, sort_keys=True)


def test_any_flipped_bit_of_the_pages_is_noticed(tmp_path: Path) -> None:
    """Every table carries checksums: a flipped bit is a fault or leaves the values as they were."""
    path = tmp_path / "a.parquet"
    write_table(ROWS, path)
    content = path.read_bytes()
    refused = 0
    for place in range(4, len(content) - 8, 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            assert read_table(path, ("text", "n")) == ROWS, place
        except UserError as error:
            refused += "\n" not in str(error)
    assert refused > len(content) / 7 / 2


def test_a_table_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Without a manifest, of another kind, or without a column."""
    write_table(ROWS, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="expected the manifest of a rows artifact"):
        load_table(tmp_path / "a.parquet", "rows")
    write_table(ROWS, tmp_path / "a.parquet", manifest=make_manifest("pairs"))
    with pytest.raises(UserError, match="holds 'pairs', expected 'rows'"):
        load_table(tmp_path / "a.parquet", "rows")
    with pytest.raises(UserError, match="has no column 'b'"):
        read_table(tmp_path / "a.parquet", ["b", "n"])


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        ({}, "x: made with weights unknown, expected abc: make x again"),
        ({"weights": "abd"}, "x: made with weights abd, expected abc: make x again"),
        ({"weights": "abc", "settings": {"a": 1, "b": {"c": 2}}}, "x: made with settings.b.c 2, expected 3: make x"),
        ({"weights": "abc", "settings": {"a": 1}}, "x: made with settings.b unknown, expected {"),
    ],
)
def test_what_was_made_with_other_parts_is_refused_by_the_part(recorded: dict[str, object], said: str) -> None:
    """The first part that differs, as deep as it can be named."""
    expected = {"weights": "abc", "settings": {"a": 1, "b": {"c": 3}}}
    with pytest.raises(UserError) as error:
        check_made_with(recorded, expected, "x", "make x again")
    assert str(error.value).startswith(said)
    check_made_with({**expected, "more": 1}, expected, "x", "make x again")

"""Parquet tables: written whole, with checksums of their pages and a manifest; read whole, and refused when damaged."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspo.errors import UserError, unreadable
from nspo.files.atomic import atomic_path
from nspo.files.manifest import METADATA_KEY, check_manifest, dumps

if TYPE_CHECKING:
    import pyarrow as pa

CONTENT_KEY = b"nspo_content"  # of a digest, in the metadata
Rows = list[dict[str, Any]]


def write_table(
    rows: Sequence[Mapping[str, Any]],
    path: Path | str,
    columns: "Mapping[str, pa.DataType] | None" = None,
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """Write rows atomically as Parquet; equal rows give equal bytes.

    Args:
        columns: name and type of every column, in order; what else a row holds is left out. None: every column that
            any row has, of the type that its values have.
        manifest: the identity of the table, kept as sorted JSON in the file's own metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(columns) if columns else list(dict.fromkeys(name for row in rows for name in row))
    schema = pa.schema(list(columns.items())) if columns else None
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows], schema=schema)
    metadata = {} if manifest is None else {METADATA_KEY.encode(): dumps(manifest).encode()}
    content = _content(table.schema, table.to_pylist(), metadata)
    table = table.replace_schema_metadata({**metadata, CONTENT_KEY: content})
    with atomic_path(path) as scratch:
        pq.write_table(table, scratch, write_page_checksum=True)


def read_table(path: Path | str, columns: Iterable[str] = ()) -> Rows:
    """All rows of a Parquet file that must have `columns`.

    Raises:
        UserError: when the file is missing, truncated, altered since it was written, or lacks a column.
    """
    return _read(Path(path), columns)[1]


def load_table(path: Path | str, kind: str, columns: Iterable[str] = ()) -> tuple[dict[str, Any], Rows]:
    """The manifest and the rows that were given to `write_table`.

    Raises:
        UserError: as `read_table`, or when the table carries no manifest, or one of another kind.
    """
    metadata, rows = _read(Path(path), columns)
    try:
        manifest = json.loads(metadata.get(METADATA_KEY.encode(), b"null"))
    except ValueError as error:
        raise UserError(f"{path} carries a damaged manifest: delete it and rerun the stage that makes it") from error
    check_manifest(manifest, kind, Path(path))
    return manifest, rows


def table_manifest(path: Path | str) -> dict[str, Any]:
    """What a table says of itself, read from its footer alone; empty where it says nothing.

    Raises:
        UserError: when the footer is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path).metadata or {}
        found = json.loads(metadata.get(METADATA_KEY.encode(), b"{}"))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(path, "a whole Parquet file", error) from error
    return found if isinstance(found, dict) else {}


def _read(path: Path, columns: Iterable[str]) -> tuple[Mapping[bytes, bytes], Rows]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"{path} does not exist: run the stage that makes it")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        rows: Rows = table.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(path, "a whole Parquet file", error) from error
    metadata = dict(table.schema.metadata or {})
    content = metadata.pop(CONTENT_KEY, None)
    if content not in (None, _content(table.schema, rows, metadata)):
        raise UserError(f"{path} was altered since it was written: delete it and rerun the stage that makes it")
    if missing := sorted(set(columns) - set(table.column_names)):
        raise UserError(f"{path} has no column {missing[0]!r}: delete it and rerun the stage that makes it")
    return metadata, rows


def _content(schema: "pa.Schema", rows: Rows, metadata: Mapping[bytes, bytes]) -> bytes:
    """A digest of all that a reader sees: columns with their types, rows, and what the table says of itself.

    Parquet has checksums of pages alone: one flipped bit of the footer can give a column another name or type.
    """
    columns = [(field.name, str(field.type).replace("<item:", "<element:")) for field in schema]  # as Parquet calls it
    return hashlib.sha256(repr((columns, rows, metadata)).encode(errors="backslashreplace")).hexdigest().encode()

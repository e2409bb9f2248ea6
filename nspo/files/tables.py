"""Parquet tables with page checksums, read whole."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nspo.errors import UserError


def read_table(path: Path | str, columns: Iterable[str]) -> list[dict[str, Any]]:
    """All rows of a Parquet file that must have `columns`.

    Raises:
        UserError: when the file is missing, truncated, altered since it was written, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: run the stage that makes it")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        rows: list[dict[str, Any]] = table.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a whole Parquet file: delete it and rerun the stage that makes it") from error
    if missing := sorted(set(columns) - set(table.column_names)):
        raise UserError(f"{path} has no column {missing[0]!r}: delete it and rerun the stage that makes it")
    return rows

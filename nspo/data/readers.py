"""Rows of a data file, by its suffix, or of a data set on the hub."""

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from nspo.data.wheels import resolve
from nspo.errors import UserError, first_line, refuse_no_file
from nspo.files.sources import Source
from nspo.settings.reading import StrictLoader


def read_rows(source: Source, wheels_dir: Path) -> list[dict[str, Any]]:
    """All rows of a data set as dictionaries; plain text gives one row `{"prompt": line}` a line.

    Formats by suffix: .jsonl, .json (a list), .csv (leading `#` lines skipped), .txt, .parquet, .yaml and .prompt
    (PyRIT seeds), each also with .gz. Hub data sets are `hub:org/name@revision`, split `train`.

    Raises:
        UserError: missing file, unknown suffix, malformed content, rows that are no mappings, or no rows at all.
    """
    if source.kind == "hub":
        return hub_rows(source)
    path = resolve(source, wheels_dir)
    rows = read_file(path)
    if not rows:
        raise UserError(f"{path} holds no rows", expected="a data set")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{path} holds something else", expected="a list of rows, each a mapping of column names to values"
        )
    return rows


def read_file(path: Path) -> Any:
    """What a data file holds, by its suffix (see `read_rows`); JSON and YAML may hold anything.

    Raises:
        UserError: missing file, unknown suffix, or malformed content.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in READERS:
        raise UserError(f"{path}: unknown suffix {suffix!r}", expected=f"one of {', '.join(READERS)}")
    refuse_no_file(path)
    try:
        data = path.read_bytes()
        return READERS[suffix](gzip.decompress(data) if path.suffix == ".gz" else data)
    except Exception as error:  # each reader's own family of exceptions, and whatever a damaged file makes it raise
        raise UserError(f"{path}: cannot be read as {suffix}: {first_line(error)}") from error


def hub_rows(source: Source, subset: str | None = None, split: str = "train") -> list[dict[str, Any]]:
    """All rows of one split of a data set on the hub; `subset` is the hub's name of a configuration.

    Raises:
        UserError: when it cannot be loaded.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return list(load_dataset(source.location, subset, revision=source.revision, split=split))
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"hub:{source.location}: cannot be loaded, split {split}: {first_line(error)}") from error


def _text(data: bytes) -> str:
    text = data.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("found a NUL byte, expected text in UTF-8")
    return text


def _jsonl(data: bytes) -> Any:
    # Not splitlines(): JSON strings may hold U+2028 and the like as they are.
    rows = []
    for number, line in enumerate(_text(data).split("\n"), 1):
        try:
            rows += [_json(line)] if line.strip() else []
        except json.JSONDecodeError as error:  # which takes every line for the first
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return rows


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping; of two values under one key, json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in a row")
    return found


def _csv(data: bytes) -> Any:
    text = _text(data)
    while text.startswith("#"):
        text = text.partition("\n")[2]
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    header = reader.fieldnames or []
    if len(set(header)) < len(header):  # of two columns with one name, csv would keep the last
        raise ValueError(f"a column name stands twice in the header {', '.join(header)}")
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has not as many fields as the header: is a quote missing?")
        rows.append(row)
    return rows


def _parquet(data: bytes) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(data), page_checksum_verification=True).to_pylist()


def _yaml(data: bytes) -> Any:
    document = yaml.load(_text(data), Loader=StrictLoader)
    return document["seeds"] if isinstance(document, dict) and "seeds" in document else document


READERS: dict[str, Callable[[bytes], Any]] = {
    ".jsonl": _jsonl,
    ".json": lambda data: _json(_text(data)),
    ".csv": _csv,
    ".txt": lambda data: [{"prompt": line.strip()} for line in _text(data).split("\n") if line.strip()],
    ".parquet": _parquet,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".prompt": _yaml,
}

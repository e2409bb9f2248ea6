"""Prompts and human labels in one form each: who reads them never sees where they came from.

`prompts.parquet` has one row per prompt: role (general, harmful, benign), domain, split (train, validation, heldout),
prompt, check (JSON, how an answer is marked; empty if it is not), category. `labels.parquet` has one row per graded
response: set, target (cost or reward), split, prompt, response, grade (0 to 1), category. Rows stand in a seeded random
order, so the first n of any filter are a random sample, and both files are small enough for Snakemake to compare by
content. Commands: `nspo prepare-prompts`, `nspo prepare-labels`.

A prompt belongs to the split its own hash gives it, so no prompt is in two splits and no file's order matters. (The
authors' release trains and tests on whatever the file order gives.)
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nspo.artifacts import atomic_path, dumps, make_manifest, read_table
from nspo.data_settings import DataSet, LabelSettings, PromptSettings, SplitSettings
from nspo.errors import UserError
from nspo.sources import Source, read_rows

PROMPT_COLUMNS = ("id", "role", "domain", "split", "prompt", "check", "category")
LABEL_COLUMNS = ("id", "set", "target", "split", "prompt", "response", "grade", "category")
MIN_ROWS = 8


def position(text: str, seed: int) -> float:
    """A number in [0, 1) from the text and the seed alone: its place in the shuffle, and so its split."""
    digest = hashlib.sha256(f"{seed}\0{' '.join(text.lower().split())}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def split_of(place: float, heldout: float, validation: float) -> str:
    """`heldout` for the first share of places, then `validation`, then `train`."""
    if place < heldout:
        return "heldout"
    return "validation" if place < heldout + validation else "train"


def prepare_prompts(settings: PromptSettings, wheels_dir: Path, out: Path) -> None:
    """Read every prompt set of `settings` and write `prompts.parquet`.

    Raises:
        UserError: a missing column, an empty prompt, or too few prompts to split, naming the file or key.
    """
    rows: list[dict[str, Any]] = []
    shares = {"heldout": settings.heldout_fraction, "validation": settings.validation_fraction}
    for domain, data in settings.general.items():
        rows += _read(data, "general", domain, f"data.general.{domain}", wheels_dir, settings, **shares)
    for role, data in (("harmful", settings.harmful), ("benign", settings.benign)):
        rows += _read(data, role, data.name or role, f"data.{role}", wheels_dir, settings, **shares)
    for domain, data in settings.harmful_heldout.items():
        key = f"data.harmful_heldout.{domain}"
        rows += _read(data, "harmful", domain, key, wheels_dir, settings, heldout=1.0, validation=0.0)
    _write(_without_leaks(rows), PROMPT_COLUMNS, "prompts", settings, out)


def prepare_labels(settings: LabelSettings, wheels_dir: Path, out: Path) -> None:
    """Read every graded set of `settings` and write `labels.parquet`; equal (prompt, response) pairs are kept once.

    Raises:
        UserError: a missing column, a grade outside 0 to 1, or too few rows, naming the file and the key.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, labels in settings.labels.items():
        for source in labels.source:
            for raw in read_rows(Source.parse(source), wheels_dir):
                key = f"data.labels.{name} ({source})"
                prompt, response = _text(raw, labels.prompt, key), _text(raw, labels.response, key)
                grade = _grade(raw, labels.score, key)
                split = split_of(position(prompt, settings.seed), settings.heldout_fraction, 0.0)
                row = {
                    "set": name,
                    "target": labels.target,
                    "split": split,
                    "prompt": prompt,
                    "response": response,
                    "grade": 1.0 - grade if labels.inverted else grade,
                    "category": _optional(raw, "harm_category", key) or name,
                }
                rows.setdefault((name, prompt, response), row)
    for index, row in enumerate(rows.values()):
        row["id"] = f"{row['set']}-{index:05d}"
    _write(rows.values(), LABEL_COLUMNS, "labels", settings, out)


def load_prompts(
    path: Path, role: str, split: str, domain: str | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """The first `limit` rows of `prompts.parquet` with this role, split and domain, `check` already parsed.

    Raises:
        UserError: when there is no such row, or the file is damaged.
    """
    every = read_table(path, PROMPT_COLUMNS)
    rows = [r for r in every if r["role"] == role and r["split"] == split and domain in (None, r["domain"])]
    if not rows:
        raise UserError(f"{path} has no {role} prompts in split {split!r}{f' of domain {domain!r}' if domain else ''}")
    return [{**row, "check": json.loads(row["check"]) if row["check"] else None} for row in rows[:limit]]


def domains(path: Path, role: str, split: str) -> list[str]:
    """Sorted names of the domains that have prompts with this role and split."""
    every = read_table(path, PROMPT_COLUMNS)
    return sorted({row["domain"] for row in every if row["role"] == role and row["split"] == split})


def load_labels(path: Path, target: str, split: str) -> list[dict[str, Any]]:
    """The rows of `labels.parquet` for one model and split.

    Raises:
        UserError: when there is no such row, or the file is damaged.
    """
    rows = [r for r in read_table(path, LABEL_COLUMNS) if r["target"] == target and r["split"] == split]
    if not rows:
        raise UserError(f"{path} has no labels for the {target} model in split {split!r}: add a set to data.labels")
    return rows


def _read(
    data: DataSet,
    role: str,
    domain: str,
    key: str,
    wheels_dir: Path,
    settings: SplitSettings,
    heldout: float,
    validation: float,
) -> list[dict[str, Any]]:
    where = f"{key} ({data.source})"
    rows: dict[str, dict[str, Any]] = {}
    for index, item in enumerate(read_rows(Source.parse(data.source), wheels_dir)):
        prompt = _text(item, data.prompt, where)
        rows[prompt] = {
            "id": _optional(item, "id", where) or _optional(item, "task_id", where) or f"{domain}-{index:05d}",
            "role": role,
            "domain": domain,
            "split": split_of(position(prompt, settings.seed), heldout, validation),
            "prompt": prompt,
            "check": _check(item, data.prompt, where),
            "category": _optional(item, "category", where),
        }
    if len(rows) < MIN_ROWS:
        raise UserError(f"{key}: {data.source} holds {len(rows)} different prompts, expected at least {MIN_ROWS}")
    twice = [name for name, count in Counter(row["id"] for row in rows.values()).items() if count > 1]
    if twice:
        raise UserError(f"{where}: different prompts have the id {twice[0]!r}, expected each id once")
    return list(rows.values())


def _without_leaks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop held-out prompts that some set also trains on: the same text in two files."""

    def normal(row: dict[str, Any]) -> str:
        return " ".join(row["prompt"].lower().split())

    seen = {normal(row) for row in rows if row["split"] != "heldout"}
    return [row for row in rows if row["split"] != "heldout" or normal(row) not in seen]


def _text(raw: dict[str, Any], column: str, key: str) -> str:
    if column not in raw:
        raise UserError(f"{key}: no column {column!r}, found {', '.join(map(str, raw))}")
    text = raw[column]
    if not isinstance(text, str | None):
        raise UserError(f"{key}: a row has the {column!r} {text!r:.60}: expected text")
    if not text or not text.strip():
        raise UserError(f"{key}: a row has an empty {column!r}: expected text")
    return _encodable(text.strip(), column, key)


def _optional(raw: dict[str, Any], column: str, key: str) -> str:
    """The text or number in a column that may be missing or empty."""
    return _encodable(str(raw.get(column) or ""), column, key)


def _check(raw: dict[str, Any], prompt: str, key: str) -> str:
    check = raw.get("check") or {}
    if not check and all(isinstance(raw.get(column), str) for column in ("entry_point", "test")):  # as in HumanEval
        check = {"type": "program", "prompt": raw[prompt], "entry_point": raw["entry_point"], "test": raw["test"]}
    if not isinstance(check, dict):
        raise UserError(f"{key}: a row has the 'check' {check!r:.60}: expected a mapping with a `type`")
    try:
        return _encodable(dumps(check), "check", key) if check else ""
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: a row has a 'check' that is no JSON ({error}): mend it") from error


def _encodable(text: str, column: str, key: str) -> str:
    """`text`, unless it holds half a surrogate pair, which JSON can spell and no file can store."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{key}: a row has a {column!r} that is no Unicode text ({error.reason}): mend it") from error
    return text


def _grade(raw: dict[str, Any], prefix: str, key: str) -> float:
    found = [raw[c] for c in raw if str(c).startswith(prefix) and raw[c] not in (None, "")]
    try:
        grades = [float(value) for value in found]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{key}: found the grade {found!r:.80}, expected numbers from 0 to 1") from error
    if not grades or not all(0 <= grade <= 1 for grade in grades):
        raise UserError(f"{key}: found the grade {found!r:.80} in columns {prefix!r}*, expected numbers from 0 to 1")
    return sum(grades) / len(grades)


def _write(
    rows: Iterable[dict[str, Any]], columns: tuple[str, ...], kind: str, settings: SplitSettings, out: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ordered = sorted(rows, key=lambda row: position(row["prompt"] + row.get("response", ""), settings.seed + 1))
    if not ordered:
        raise UserError(f"no {kind} were read: the data sections of the config are empty")
    table = pa.Table.from_pylist([{c: row[c] for c in columns} for row in ordered])
    manifest = make_manifest(kind, rows=len(ordered), settings=settings.dump())
    table = table.replace_schema_metadata({"nspo": dumps(manifest)})
    with atomic_path(out) as scratch:
        pq.write_table(table, scratch, write_page_checksum=True)

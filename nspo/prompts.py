"""Prompts and human labels in one form each: who reads them never sees where they came from.

`prompts.parquet` has one row per prompt: role (general, harmful, benign), domain, split (train, validation, heldout),
prompt, check (JSON, how an answer is marked; empty if it is not), category. Rows stand in a seeded random order, so the
first n of any filter are a random sample. Commands: `nspo prepare-prompts`, `nspo prepare-labels`.

`labels.parquet` has one row per judged response: id, set, target (cost or reward), split, prompt, response, category,
and what people said of it:

- grade: of the response alone, from 0 to 1 (cost: 1 is harmful; reward: 1 does what was asked); null where
  nobody judged it alone, as in plain preference pairs;
- pair, role: two rows with one `pair` are two responses to one prompt that people compared. Role `chosen` is the one
  that they prefer, the safer for target cost and the better for target reward; the other is `rejected`. Both empty
  where a response stands alone. So the cost model scores `rejected` above `chosen`, the reward model the reverse.

A prompt belongs to the split its own hash gives it, so no prompt is in two splits, whatever the set, and no file's
order matters. (The authors' release trains and tests on whatever the file order gives.)
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nspo.artifacts import atomic_path, dumps, make_manifest, read_table
from nspo.columns import encodable, matches, optional, text
from nspo.data_settings import DataSet, LabelSettings, PromptSettings, SplitSettings
from nspo.errors import UserError
from nspo.label_formats import read_set
from nspo.sources import Source, read_rows

PROMPT_COLUMNS = ("id", "role", "domain", "split", "prompt", "check", "category")
LABEL_COLUMNS = ("id", "set", "target", "split", "prompt", "response", "grade", "category", "pair", "role")
MIN_ROWS = 8


def normal(prompt: str) -> str:
    """What two prompts that count as one have in common: the words, whatever their case and the space between them."""
    return " ".join(prompt.lower().split())


def position(prompt: str, seed: int) -> float:
    """A number in [0, 1) from the text and the seed alone: its place in the shuffle, and so its split."""
    digest = hashlib.sha256(f"{seed}\0{normal(prompt)}".encode()).digest()
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
    """Read every set of judged responses and write `labels.parquet`; a repeated judgement counts once.

    Raises:
        UserError: a missing column, a grade outside 0 to 1, or no rows, naming the file and the key.
    """
    rows: list[dict[str, Any]] = []
    for name, labels in settings.labels.items():
        found = read_set(name, labels, wheels_dir)
        for index, row in enumerate(found):
            row["id"] = f"{name}-{index:05d}"
            row["split"] = split_of(position(row["prompt"], settings.seed), settings.heldout_fraction, 0.0)
        rows += sample(found, labels.fraction, settings.seed)
    _write(rows, LABEL_COLUMNS, "labels", settings, out)


def sample(rows: Sequence[dict[str, Any]], fraction: float, seed: int) -> list[dict[str, Any]]:
    """The rows of a share of the prompts, drawn alike from every split, category and class (by systematic sampling).

    Prompts are shuffled by `seed` within the strata that their rows form, the strata laid end to end, and every
    1/fraction-th prompt taken: a stratum of n gives n times `fraction` of them, rounded up or down.
    """
    strata: dict[str, set[tuple[str, str, str]]] = {}
    for row in rows:
        strata.setdefault(normal(row["prompt"]), set()).add((row["split"], row["category"], str(row.get("grade", ""))))
    order = sorted(strata, key=lambda prompt: (sorted(strata[prompt]), position(prompt, seed + 2)))
    kept = {p for i, p in enumerate(order) if math.floor((i + 1) * fraction) > math.floor(i * fraction)}
    return [row for row in rows if normal(row["prompt"]) in kept]


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
        if not matches(item, data.only, where):
            continue
        prompt = text(item, data.prompt, where)
        rows[prompt] = {
            "id": optional(item, "id", where) or optional(item, "task_id", where) or f"{domain}-{index:05d}",
            "role": role,
            "domain": domain,
            "split": split_of(position(prompt, settings.seed), heldout, validation),
            "prompt": prompt,
            "check": _check(item, data.prompt, where),
            "category": optional(item, "category", where),
        }
    kept = sample(list(rows.values()), data.fraction, settings.seed)
    if len(kept) < MIN_ROWS:
        raise UserError(f"{key}: {data.source} holds {len(kept)} different prompts, expected at least {MIN_ROWS}")
    twice = [name for name, count in Counter(row["id"] for row in kept).items() if count > 1]
    if twice:
        raise UserError(f"{where}: different prompts have the id {twice[0]!r}, expected each id once")
    return kept


def _without_leaks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop held-out prompts that some set also trains on: the same text in two files."""
    seen = {normal(row["prompt"]) for row in rows if row["split"] != "heldout"}
    return [row for row in rows if row["split"] != "heldout" or normal(row["prompt"]) not in seen]


def _check(raw: dict[str, Any], prompt: str, key: str) -> str:
    check = raw.get("check") or {}
    if not check and all(isinstance(raw.get(column), str) for column in ("entry_point", "test")):  # as in HumanEval
        check = {"type": "program", "prompt": raw[prompt], "entry_point": raw["entry_point"], "test": raw["test"]}
    if not isinstance(check, dict):
        raise UserError(f"{key}: a row has the 'check' {check!r:.60}: expected a mapping with a `type`")
    try:
        return encodable(dumps(check), "check", key) if check else ""
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: a row has a 'check' that is no JSON ({error}): mend it") from error


def _write(
    rows: Iterable[dict[str, Any]], columns: tuple[str, ...], kind: str, settings: SplitSettings, out: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ordered = sorted(rows, key=lambda row: position(row["prompt"] + row.get("response", ""), settings.seed + 1))
    if not ordered:
        raise UserError(f"no {kind} were read: the data sections of the config are empty")
    schema = pa.schema([(column, pa.float64() if column == "grade" else pa.string()) for column in columns])
    table = pa.Table.from_pylist([{c: row[c] for c in columns} for row in ordered], schema)
    manifest = make_manifest(kind, rows=len(ordered), settings=settings.dump())
    table = table.replace_schema_metadata({"nspo": dumps(manifest)})
    with atomic_path(out) as scratch:
        pq.write_table(table, scratch, write_page_checksum=True)

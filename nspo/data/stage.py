"""Prepare prompts and human labels: read every set of the configuration and write one table of each.

Commands: `nspo prepare-prompts`, `nspo prepare-labels`; `nspo.data.tables` says what the tables hold.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nspo.data.columns import encodable, matches, optional, text
from nspo.data.labels import read_set
from nspo.data.readers import read_rows
from nspo.data.splits import normal, position, sample, split_of
from nspo.data.tables import LABEL_COLUMNS, PROMPT_COLUMNS
from nspo.errors import UserError
from nspo.files.manifest import dumps, make_manifest
from nspo.files.tables import write_table
from nspo.settings.data import DataSet, LabelSettings, PromptSettings, SplitSettings
from nspo.sources import Source

MIN_ROWS = 8


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

    ordered = sorted(rows, key=lambda row: position(row["prompt"] + row.get("response", ""), settings.seed + 1))
    if not ordered:
        raise UserError(f"no {kind} were read: the data sections of the config are empty")
    types = {column: pa.float64() if column == "grade" else pa.string() for column in columns}
    write_table(ordered, out, types, make_manifest(kind, rows=len(ordered), settings=settings.dump()))

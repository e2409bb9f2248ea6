"""Prepare prompts and human labels: read every set of the configuration and write one table of each.

Commands: `nspo prepare-prompts`, `nspo prepare-labels`; `nspo.data.tables` says what the tables hold.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from nspo.data import leaks
from nspo.data.columns import cell, encodable, matches, optional, text
from nspo.data.labels import read_set
from nspo.data.readers import read_rows
from nspo.data.splits import places, position, sample, split_of
from nspo.data.tables import LABEL_COLUMNS, PROMPT_COLUMNS
from nspo.errors import UserError
from nspo.files.manifest import dumps, make_manifest
from nspo.files.sources import Source
from nspo.files.tables import write_table
from nspo.settings.data import DataSet, GoldSet, LabelSettings, PromptSettings, SplitSettings

MIN_ROWS = 8


def prepare_prompts(settings: PromptSettings, wheels_dir: Path, out: Path) -> None:
    """Read every prompt set of `settings` and write `prompts.parquet`.

    Raises:
        UserError: a missing column, an empty prompt, or too few prompts to split, naming the file or key.
    """
    sets = [(f"data.general.{domain}", "general", domain, data) for domain, data in settings.general.items()]
    for role, data in (("harmful", settings.harmful), ("benign", settings.benign)):
        sets.append((f"data.{role}", role, data.name or role, data))
    heldout: list[tuple[str, str, Mapping[str, DataSet]]] = [("general_heldout", "general", settings.general_heldout)]
    heldout += [("harmful_heldout", "harmful", settings.harmful_heldout), ("gold", "gold", settings.gold)]
    for key, role, found in heldout:
        sets += [(f"data.{key}.{domain}", role, domain, data) for domain, data in found.items()]
    rows = {key: _read(data, role, domain, key, wheels_dir) for key, role, domain, data in sets}
    _split(rows, [f"data.{key}.{domain}" for key, _, found in heldout for domain in found], settings)
    kept: list[dict[str, Any]] = []
    for key, _, _, data in sets:
        kept += _sampled(rows[key], data, key, settings.seed)
    _write(kept, PROMPT_COLUMNS, "prompts", settings, out)


def prepare_labels(settings: LabelSettings, wheels_dir: Path, out: Path) -> None:
    """Read every set of judged responses and write `labels.parquet`; a repeated judgement counts once.

    Raises:
        UserError: a missing column, a grade outside 0 to 1, or no rows, naming the file and the key.
    """
    sets: dict[str, list[dict[str, Any]]] = {}
    for name, labels in settings.labels.items():
        sets[name] = read_set(name, labels, wheels_dir)
        for index, row in enumerate(sets[name]):
            row["id"] = f"{name}-{index:05d}"
    every = [row for found in sets.values() for row in found]
    texts = [row["prompt"] for row in every]
    for row, (place, _) in zip(every, places(texts, leaks.families(texts), settings.seed), strict=True):
        row["split"] = split_of(place, settings.heldout_fraction, settings.judge_fraction, "judge")
    rows = [row for name, found in sets.items() for row in sample(found, settings.labels[name].fraction, settings.seed)]
    _write(rows, LABEL_COLUMNS, "labels", settings, out)


def _read(data: DataSet, role: str, domain: str, key: str, wheels_dir: Path) -> list[dict[str, Any]]:
    """The different prompts of a set, still without a split."""
    rows: dict[str, dict[str, Any]] = {}
    for index, item in enumerate(read_rows(Source.parse(data.source), wheels_dir)):
        where = f"{key} ({data.source}), row {index + 1}"
        if not matches(item, data.only, where):
            continue
        prompt = text(item, data.prompt, where)
        check = _gold(item, data, where) if isinstance(data, GoldSet) else _check(item, data.prompt, where)
        if isinstance(data, GoldSet) and data.options:
            prompt = f"{prompt}\n{text(item, data.options, where)}"
        if prompt in rows and rows[prompt]["check"] != check:
            raise UserError(
                f"{where}: its prompt stands above with another check", expected="one", change="take a row out"
            )
        rows[prompt] = {
            "id": optional(item, "id", where) or optional(item, "task_id", where) or f"{domain}-{index:05d}",
            "role": role,
            "domain": domain,
            "prompt": prompt,
            "check": check,
            "category": optional(item, "category", where),
        }
    return list(rows.values())


def _split(sets: Mapping[str, list[dict[str, Any]]], only_heldout: Collection[str], settings: PromptSettings) -> None:
    """Give every prompt the split of its family; sets that only evaluate lose what is like a training prompt."""
    every = [(key, row) for key, rows in sets.items() for row in rows]
    families = leaks.families([row["prompt"] for _, row in every])
    shuffled = places([row["prompt"] for _, row in every], families, settings.seed)
    trained: set[int] = set()
    for (key, row), family, (place, sealed) in zip(every, families, shuffled, strict=True):
        share = 1.0 if key in only_heldout else settings.heldout_fraction
        row["split"] = split_of(place, share, settings.validation_fraction)
        if row["split"] != "heldout":
            trained.add(family)
        elif sealed:
            row["split"] = "sealed"
    for (key, row), family in zip(every, families, strict=True):
        if key in only_heldout and family in trained:
            sets[key].remove(row)


def _sampled(rows: list[dict[str, Any]], data: DataSet, key: str, seed: int) -> list[dict[str, Any]]:
    where = f"{key} ({data.source})"
    kept = sample(rows, data.fraction, seed)
    if len(kept) < MIN_ROWS:
        raise UserError(f"{key}: {data.source} holds {len(kept)} different prompts", expected=f"at least {MIN_ROWS}")
    twice = [name for name, count in Counter(row["id"] for row in kept).items() if count > 1]
    if twice:
        raise UserError(f"{where}: different prompts have the id {twice[0]!r}", expected="each id once")
    return kept


def _gold(raw: dict[str, Any], data: GoldSet, where: str) -> str:
    """The right answer, in the form of a check that is never run: the evaluation takes its likelihood."""
    found = cell(raw, data.answer, where)
    first = text({data.answer: found[0] if isinstance(found, list) and found else found}, data.answer, where)
    return dumps({"type": "gold", "answer": first})


def _check(raw: dict[str, Any], prompt: str, key: str) -> str:
    check = raw.get("check") or {}
    if not check and all(isinstance(raw.get(column), str) for column in ("entry_point", "test")):  # as in HumanEval
        check = {"type": "program", "prompt": raw[prompt], "entry_point": raw["entry_point"], "test": raw["test"]}
    if not isinstance(check, dict):
        raise UserError(f"{key}: a row has the 'check' {check!r:.60}", expected="a mapping with a `type`")
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

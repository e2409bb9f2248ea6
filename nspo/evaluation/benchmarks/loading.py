"""Reading a benchmark: find its data, turn rows into prompts, leave out what was trained on, draw a stratified sample.

Every row of the data counts once (equal prompts are one), in an order that the seed fixes: each category's prompts are
shuffled, then all categories are dealt out evenly, one of each first. So the first n, for any n, are a stratified
sample, a larger sample holds the smaller, and every model is asked the same prompts.
"""

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nspo.data.readers import hub_rows, read_file
from nspo.data.splits import position
from nspo.errors import UserError
from nspo.evaluation.benchmarks.formats import FORMATS, MBPP_TEST, ROLES, first
from nspo.evaluation.benchmarks.registry import TASKS, Task
from nspo.files.manifest import dumps, fingerprint
from nspo.files.sources import Source
from nspo.settings.evaluation import BenchmarkSettings


class Benchmark(NamedTuple):
    """A benchmark as it will be asked: its prompts, and the record of where they came from."""

    items: list[dict[str, Any]]  # id, role, domain, category, text, prompt, and check or doc where it is an ability
    record: dict[str, Any]


def load(name: str, settings: BenchmarkSettings, training: Sequence[str] | None) -> Benchmark:
    """The prompts of the benchmark `name` and its record: source, version, split, licence, leaks, sample.

    Args:
        training: prompts that the model was trained on; None when they are not known.

    Raises:
        UserError: data that is missing, unpinned or of another form, or nothing left to ask.
    """
    task, place = task_of(name), locate(name, settings)
    items: dict[str, dict[str, Any]] = {}
    for index, row in enumerate(raw_rows(name, task, place)):
        if not _belongs(name, task, row):
            continue
        item = _item(name, task, row, index)
        items.setdefault(dumps([item["prompt"], item.get("doc")]), item)
    every = list(items.values())
    if not every:
        raise UserError(f"{name}: no row of {_told(place)} belongs to the benchmark", expected="its own file")
    kept, leaks = _without_leaks(every, training, settings.near_duplicate)
    asked = stratified(kept, settings.limit or len(kept), settings.sample_seed)
    if not asked:
        raise UserError(f"{name}: every prompt stands among the training prompts", expected="some that do not")
    version = {"revision": place.revision} if isinstance(place, Source) else {}
    record = {
        "name": name,
        "axis": task.axis,
        "source": place.published if isinstance(place, Source) else f"path:{Path(task.file).name}",
        **version,
        "subset": task.subset if version else "",
        "split": task.split,
        "licence": task.licence,
        "gated": task.gated,
        "harness": task.harness,
        "fingerprint": fingerprint([item["prompt"] for item in every]),
        "prompts": len(every),
        "categories": len({item["category"] for item in every}),
        "leaks": leaks,
        "asked": len(asked),
        "seed": settings.sample_seed,
    }
    return Benchmark(asked, record)


def task_of(name: str) -> Task:
    """The entry of a benchmark in the registry.

    Raises:
        UserError: when there is none of that name.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "expected one that docs/evaluation.md lists"
        raise UserError(f"benchmarks: found the benchmark {name!r}, {hint}")
    return TASKS[name]


def check_benchmarks(settings: BenchmarkSettings) -> None:
    """Refuse a benchmark that is not there, or whose data is missing, before any work.

    Raises:
        UserError: naming the benchmark.
    """
    for name in settings.sources:
        task_of(name)
    for name in settings.tasks:
        locate(name, settings)


def locate(name: str, settings: BenchmarkSettings) -> list[Path] | Source:
    """Where a benchmark's data is: files on disk, or a hub repository at a revision.

    Raises:
        UserError: when there is neither, or no such benchmark.
    """
    task = task_of(name)
    if given := settings.sources.get(name):
        source = Source.parse(given)
        if source.kind == "hub":
            return source
        if not Path(source.location).is_file():
            raise UserError(f"benchmarks.sources.{name}: {source.location} does not exist", expected="a file")
        return [Path(source.location)]
    if settings.data and (files := sorted(Path(settings.data).glob(task.file))):
        return files
    if task.hub and task.revision:
        return Source("hub", task.hub, revision=task.revision)
    pinned = f', or name a revision: --sources \'{{"{name}": "hub:{task.hub}@REVISION"}}\'' if task.hub else ""
    raise UserError(
        f"{name}: no data: put {task.file} into the folder `benchmarks.data` "
        f"({settings.data or 'not given'}){pinned}{' (gated: the hub asks for your consent)' if task.gated else ''}"
    )


def stratified(items: Sequence[dict[str, Any]], limit: int, seed: int) -> list[dict[str, Any]]:
    """The first `limit` of the items, dealt out evenly from their (domain, category)s, each of which comes first once.

    A stratum's share of the sample is its share of the whole, up to rounding and that first one.
    """
    strata: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for item in sorted(items, key=lambda item: position(item["prompt"], seed)):
        strata[item["domain"], item["category"]].append(item)
    dealt = [
        (place > 0, (place + 0.5) / len(stratum), stratum_key, item)
        for stratum_key, stratum in strata.items()
        for place, item in enumerate(stratum)
    ]
    return [item for *_, item in sorted(dealt, key=lambda entry: entry[:3])[:limit]]


def raw_rows(name: str, task: Task, place: list[Path] | Source) -> Iterator[dict[str, Any]]:
    if isinstance(place, Source):
        yield from _flat(name, _hub_file(place, task) if task.hub_file else hub_rows(place, task.subset, task.split))
        return
    for path in place:
        stem = {"category": path.stem} if "*" in task.file else {}
        yield from ({**stem, **row} for row in _flat(path, read_file(path)))


def _hub_file(place: Source, task: Task) -> Any:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(place.location, task.hub_file, revision=place.revision, repo_type="dataset")
    except (OSError, ValueError) as error:
        raise UserError(
            f"hub:{place.location}: {task.hub_file} cannot be fetched: {str(error).splitlines()[0]}"
        ) from error
    return read_file(Path(path))


def _flat(where: object, value: Any, names: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Rows out of a list of rows, a list of texts, or topics that hold either (HarmfulQA, CatQA)."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(where, part, (*names, str(key).rstrip(":")))
        return
    if not isinstance(value, list):
        raise UserError(f"{where}: found {type(value).__name__}", expected="rows, texts, or topics that hold them")
    known = {"category": names[0]} if names else {}
    for row in value:
        if not isinstance(row, Mapping | str):
            raise UserError(f"{where}: found the row {row!r:.60}", expected="columns or a text")
        yield {**known, "prompt": row} if isinstance(row, str) else {**known, **row}


def _belongs(name: str, task: Task, row: Mapping[str, Any]) -> bool:
    if name == "mbpp" and row.get("task_id") not in MBPP_TEST:
        return False
    return all(column not in row or str(row[column]) in allowed for column, allowed in task.keep.items())


def _item(name: str, task: Task, row: Mapping[str, Any], index: int) -> dict[str, Any]:
    try:
        made = FORMATS[task.format](task, row)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{name}: row {index} is not as the benchmark's are ({type(error).__name__}: {error})",
            expected=f"its own columns, found {', '.join(map(str, row))[:200]}",
        ) from error
    except UserError as error:
        raise UserError(f"{name}: row {index}: {error}") from error
    prompt = made["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(
            f"{name}: row {index} has no text in {' or '.join(task.prompt)}, found {', '.join(map(str, row))[:200]}"
        )
    category, text = first(row, task.category), first(row, task.prompt)
    known = {"id": f"{name}-{index:05d}", "role": ROLES[task.axis], "domain": name}
    known["text"] = text if isinstance(text, str) else prompt  # before it was worded: what a training set would hold
    return {**known, "category": "" if category is None else str(category), **made, "prompt": prompt.strip()}


def _without_leaks(
    items: list[dict[str, Any]], training: Sequence[str] | None, near: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The items that are no training prompt or nearly one, and what was found."""
    if training is None:
        return items, {"checked": False}
    from nspo.data.leaks import overlaps

    found = overlaps([item["text"] for item in items], training)
    leaked = [(item, o) for item, o in zip(items, found, strict=True) if o.similarity >= near]
    kept = [item for item, o in zip(items, found, strict=True) if o.similarity < near]
    counts = Counter("exact" if overlap.similarity == 1 else "near" for _, overlap in leaked)
    return kept, {
        "checked": True,
        "training_prompts": len(training),
        "training": fingerprint(list(training)),
        "near_duplicate": near,
        "exact": counts["exact"],
        "near": counts["near"],
        "removed": {item["id"]: round(overlap.similarity, 3) for item, overlap in leaked},
    }


def _told(place: list[Path] | Source) -> str:
    return place.published if isinstance(place, Source) else ", ".join(str(path) for path in place)

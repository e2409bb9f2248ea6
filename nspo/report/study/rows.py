"""The rows of a study: one per variant, method and seed, and one that pools the seeds where there are several."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from nspo.errors import UserError
from nspo.report.compare import measures
from nspo.report.runs import BASE
from nspo.settings.config import Config
from nspo.settings.reading import load_config

POOLED = "pooled"
HEADLINE = {"unsafe_rate", "refusal_rate", "accuracy", "kl_per_token", "leakage_basis", "leakage_validation"}
Pool = Callable[[Sequence[float]], float]
CERTIFIED: dict[str, tuple[str, Pool]] = {  # beside the headline: what the page calls it, how seeds are pooled
    "leakage_basis": ("Leakage, protected directions", max),
    "leakage_validation": ("Leakage, validation inputs", fmean),
    "scale": ("Tested at a", fmean),
}
INTERVAL = {False: ("low", "high", "n"), True: ()}  # of a figure over prompts, and of one that is measured whole


@dataclass(frozen=True)
class Column:
    """A figure of every row: how the CSV and how the page call it, and what a line of summary.csv says of it."""

    key: str
    title: str
    unit: str
    score: Mapping[str, str]
    headline: bool  # the page shows the others when it is asked to


@dataclass(frozen=True)
class Row:
    """What one variant's method scored with one seed: by column `value`, and where it has them `low`, `high`, `n`."""

    variant: str
    method: str
    seed: str
    scores: Mapping[str, Mapping[str, float]]


def load_variants(folders: Iterable[Path]) -> dict[str, Config]:
    """The configuration of each variant, by name.

    Raises:
        UserError: for a folder without one.
    """
    return {folder.name: load_config(folder / "config.yaml") for folder in folders}


def load_rows(folders: Iterable[Path], configs: Mapping[str, Config]) -> tuple[list[Column], list[Row]]:
    """All columns and rows, from the summary.csv of every variant, the base model first.

    Rows of the base model that say the same are one.

    Raises:
        UserError: for a summary that is missing.
    """
    columns: dict[str, Column] = {}
    base: list[Row] = []
    trained: list[Row] = []
    for folder in folders:
        wanted = _columns(configs[folder.name])
        columns = {column.key: column for column in wanted} | columns
        for row in _rows(folder, wanted):
            if row.method != BASE:
                trained.append(row)
            elif all(row.scores != other.scores for other in base):
                base.append(row)
    return list(columns.values()), [*base, *trained]


def _columns(config: Config) -> list[Column]:
    scores = [
        _column(it.title, it.unit, it.name, it.axis, it.domain, it.judge, headline=it.name in HEADLINE)
        for it in measures(config)
    ]
    drift = [
        _column(f"KL per token, {domain}", "nats", "kl_per_token", "drift", domain, None, headline=False)
        for domain in (*config.data.general, *config.data.general_heldout)
    ]
    whole = [Column(name, title, "number", {"name": name}, name in HEADLINE) for name, (title, _) in CERTIFIED.items()]
    return [*scores, *whole, *drift]


def _column(title: str, unit: str, name: str, axis: str, domain: str, judge: str | None, *, headline: bool) -> Column:
    score = {"axis": axis, "name": name, "domain": domain, **({"judge": judge} if judge else {})}
    key = "_".join([name, *(part for part in (domain, judge) if part not in ("all", None))])
    return Column(key, title, unit, score, headline)


def _rows(folder: Path, columns: Sequence[Column]) -> list[Row]:
    runs: dict[tuple[str, str], list[dict[str, str]]] = {}
    for line in _lines(folder / "summary.csv"):
        if line["prompts"] != "benchmark":
            runs.setdefault((line["method"], line["seed"]), []).append(line)
    scores = {run: {column.key: _score(lines, column) for column in columns} for run, lines in runs.items()}
    for (method, seed), found in scores.items():
        if seed == POOLED:
            seeds = [other for (of, one), other in scores.items() if of == method and one != POOLED]
            for name, (_, pool) in CERTIFIED.items():
                values = [other[name]["value"] for other in seeds if other[name]]
                found[name] = {"value": pool(values)} if values else {}
    return [Row(folder.name, method, seed, found) for (method, seed), found in scores.items()]


def _lines(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", expected="the summary of a variant") from error


def _score(lines: Iterable[Mapping[str, str]], column: Column) -> dict[str, float]:
    """The first line that is the column's, as numbers; empty where none is."""
    line = next((it for it in lines if all(it[key] == value for key, value in column.score.items())), None)
    return {key: float(line[key]) for key in ("value", "low", "high", "n") if line[key]} if line else {}


def write_table(
    columns: Sequence[Column], rows: Iterable[Row], keys: Mapping[str, Mapping[str, str]], path: Path
) -> None:
    """One CSV row per variant, method and seed: the varied keys, and every figure with its interval and n."""
    figures = [(column.key, part) for column in columns for part in ("value", *INTERVAL[column.key in CERTIFIED])]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["variant", "method", "seed", *keys, *(f"{k}_{p}".removesuffix("_value") for k, p in figures)])
        for row in rows:
            differs = ["" if row.method == BASE else of.get(row.variant, "") for of in keys.values()]
            scores = [
                f"{row.scores[key][part]:.10g}" if part in row.scores.get(key, {}) else "" for key, part in figures
            ]
            writer.writerow([row.variant, row.method, row.seed, *differs, *scores])

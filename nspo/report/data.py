"""What the report reads: the files of every stage as plain rows, one `Run` per method and seed, and `summary.csv`."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nspo.artifacts import read_json, read_table
from nspo.config import Config
from nspo.errors import UserError

BASE = "base"
SUMMARY_COLUMNS = ("method", "seed", "axis", "name", "domain", "judge", "value", "low", "high", "n", "failures", "unit")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One method with one seed: what its stages wrote. The base model is a run without training.

    `label` is what tables and figures call it: the method, with the seed where a method has several.
    """

    method: str
    seed: int
    label: str
    metrics: dict[str, Any]
    responses: Rows
    certificate: dict[str, Any] | None = None
    training: Rows = field(default_factory=list)
    probes: Rows = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def score(self, axis: str, name: str, domain: str, judge: str | None = None) -> dict[str, Any] | None:
        """The score with this axis, name and domain, by `judge` or the first of several; None when not measured."""
        wanted = (axis, name, domain)
        found = [s for s in self.metrics["scores"] if (s["axis"], s["name"], s["domain"]) == wanted]
        return next((s for s in found if judge in (None, s["judge"])), None)


def load_runs(config: Config, evaluations: list[Path], certificates: list[Path], policies: list[Path]) -> list[Run]:
    """All runs: base first, then in the configuration's order of methods, by seed.

    Args:
        evaluations: folders with metrics.json and responses.parquet.
        certificates: files METHOD/seedN.json.
        policies: folders METHOD/seedN with training.parquet, probes.parquet and settings.json.

    Raises:
        UserError: for a missing or broken file, a method and seed twice, or no evaluation of the base model.
    """
    certified = {(path.parent.name, path.stem): path for path in certificates}
    trained = {(path.parent.name, path.name): path for path in policies}
    metrics: dict[tuple[str, int], tuple[Path, dict[str, Any]]] = {}
    for folder in evaluations:
        found = read_json(folder / "metrics.json")
        key = (BASE if found["base"] else found["method"], found["seed"])
        if key in metrics:
            raise UserError(f"{folder} evaluates {key[0]} with seed {key[1]} again: pass every evaluation once")
        metrics[key] = folder, found
    if not any(method == BASE for method, _ in metrics):
        raise UserError("no evaluation of the base model was given: run the evaluation for `base` and pass its folder")
    order = [BASE, *config.policy.methods]
    runs = []
    for method, seed in sorted(metrics, key=lambda key: (order.index(key[0]) if key[0] in order else len(order), key)):
        folder, found = metrics[method, seed]
        place = (method, f"seed{seed}")
        policy, certificate = trained.get(place), certified.get(place)
        alone = sum(other == method for other, _ in metrics) == 1
        runs.append(
            Run(
                method=method,
                seed=seed,
                label=method if alone else f"{method}, seed {seed}",
                metrics=found,
                responses=read_table(folder / "responses.parquet", ()),
                certificate=read_json(certificate) if certificate else None,
                training=read_table(policy / "training.parquet", ()) if policy else [],
                probes=read_table(policy / "probes.parquet", ()) if policy else [],
                settings=read_json(policy / "settings.json") if policy else {},
            )
        )
    return runs


def series(rows: Rows, column: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a value in `column`."""
    return [(row["step"], row[column]) for row in rows if row.get(column) is not None]


def write_summary(runs: Iterable[Run], path: Path) -> None:
    """One CSV row per method, seed and score."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, SUMMARY_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for run in runs:
            writer.writerows({**score, "method": run.method, "seed": run.seed} for score in run.metrics["scores"])


def trained_runs(runs: Sequence[Run]) -> list[Run]:
    """All runs but the base model's."""
    return [run for run in runs if run.method != BASE]

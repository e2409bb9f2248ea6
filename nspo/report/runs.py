"""What the report reads: the files of every stage as plain rows, one `Run` per method and seed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nspo.errors import UserError
from nspo.files.manifest import read_json
from nspo.files.tables import read_table
from nspo.report import plots
from nspo.settings.config import Config

BASE = "base"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One method with one seed: what its stages wrote. The base model is a run without training.

    `label` is what tables and figures call it: the method, with the seed where a method has several; `colour` is the
    method's.
    """

    method: str
    seed: int
    label: str
    colour: str
    metrics: dict[str, Any]
    responses: Rows
    benchmarks: list[dict[str, Any]] = field(default_factory=list)  # metrics.json of each, in the order of their names
    benchmark_responses: Rows = field(default_factory=list)
    certificate: dict[str, Any] | None = None
    attribution: dict[str, Any] | None = None
    match: dict[str, Any] | None = None  # where on its walk it was tested, and the figures of every stop
    training: Rows = field(default_factory=list)
    probes: Rows = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def match_target(self) -> float | None:
        """The unsafe rate on validation prompts that its walk was to meet."""
        return self.match["target_unsafe"] if self.match else None

    def score(self, axis: str, name: str, domain: str, judge: str | None = None) -> dict[str, Any] | None:
        """The score with this axis, name and domain, by `judge` or the first of several; None when not measured."""
        wanted = (axis, name, domain)
        found = [s for s in self.metrics["scores"] if (s["axis"], s["name"], s["domain"]) == wanted]
        return next((s for s in found if judge in (None, s["judge"])), None)


def load_runs(
    config: Config,
    evaluations: Sequence[Path],
    certificates: Sequence[Path],
    policies: Sequence[Path],
    attributions: Sequence[Path] = (),
    benchmarks: Sequence[Path] = (),
    matches: Sequence[Path] = (),
) -> list[Run]:
    """All runs: base first, then in the configuration's order of methods, by seed.

    Args:
        evaluations: folders with metrics.json and responses.parquet.
        certificates: files METHOD/seedN.json.
        policies: folders METHOD/seedN with training.parquet, probes.parquet and settings.json.
        attributions: files METHOD/seedN.json.
        benchmarks: files METHOD/seedN/TASK/metrics.json, each beside its responses.parquet.
        matches: files METHOD/seedN/match.json.

    Raises:
        UserError: for a missing or broken file, a method and seed twice, or no evaluation of the base model.
    """
    certified, attributed = (
        {(path.parent.name, path.stem): path for path in paths} for paths in (certificates, attributions)
    )
    walked = {(path.parents[1].name, path.parent.name): path for path in matches}
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
    methods = dict.fromkeys(sorted((method for method, _ in metrics), key=lambda m: _place(m, order)))
    titles = {m: config.policy.methods[m].title if m in config.policy.methods else m for m in methods}
    colour = plots.colours(titles)
    runs = []
    for method, seed in sorted(metrics, key=lambda key: (_place(key[0], order), key)):
        folder, found = metrics[method, seed]
        place = (method, f"seed{seed}")
        policy, certificate, attribution = trained.get(place), certified.get(place), attributed.get(place)
        tasks = sorted(path for path in benchmarks if (path.parents[2].name, path.parents[1].name) == place)
        alone = sum(other == method for other, _ in metrics) == 1
        runs.append(
            Run(
                method=method,
                seed=seed,
                label=method if alone else f"{method}, seed {seed}",
                colour=colour[method],
                metrics=found,
                responses=read_table(folder / "responses.parquet", ()),
                benchmarks=[read_json(path) for path in tasks],
                benchmark_responses=[
                    {**row, "domain": f"{row['domain']} (benchmark)"}  # the run's own set may have the same name
                    for path in tasks
                    for row in read_table(path.with_name("responses.parquet"), ())
                ],
                certificate=read_json(certificate) if certificate else None,
                attribution=read_json(attribution) if attribution else None,
                match=read_json(walked[place]) if place in walked else None,
                training=read_table(policy / "training.parquet", ()) if policy else [],
                probes=read_table(policy / "probes.parquet", ()) if policy else [],
                settings=read_json(policy / "settings.json") if policy else {},
            )
        )
    return runs


def _place(method: str, order: Sequence[str]) -> int:
    return order.index(method) if method in order else len(order)


def by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each method, in order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.method, []).append(run)
    return found


def series(rows: Rows, column: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a value in `column`."""
    return [(row["step"], row[column]) for row in rows if row.get(column) is not None]


def trained_runs(runs: Sequence[Run]) -> list[Run]:
    """All runs but the base model's."""
    return [run for run in runs if run.method != BASE]

"""The walks: safety against drift along the line from the base model through each policy, and where it was tested."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nspo.evaluation.statistics.curves import Point, area_between, drift_at
from nspo.evaluation.statistics.intervals import wilson
from nspo.report import plots
from nspo.report.plots import Figures
from nspo.report.runs import Run, by_method


def walks(runs: Sequence[Run], main: dict[str, Any] | None, figures: Figures) -> dict[str, Any] | None:
    """None where no policy was walked.

    Returns:
        `figure`, `base` (the stop that is the base model), `rows` (one per run: its match, the figures measured there,
        `unsafe` and `over_refusal` with their intervals, KL where its curve has the target's rate),
        `areas` (the main method's curve against every other method's, seed by seed), `left_out` and `learnt` (how many
        prompts of which set were not asked, since they are too long, or a judge learnt from nearly the same).
    """
    walked = [run for run in runs if run.match]
    if not walked:
        return None
    figure = figures.add("walk", draw(walked), "Unsafe rate against drift along each walk, on validation prompts")
    rows = [
        {"run": run, "match": run.match, "stop": stop_of(run), "drift_at": _at_target(run)}
        | with_intervals(stop_of(run))
        for run in walked
    ]
    methods = by_method(walked)
    ours = methods.get(main["ours"], []) if main else []
    others = {name: of for name, of in methods.items() if main and name != main["ours"]}
    areas = [
        {"ours": a.label, "theirs": b.label, **gap._asdict()}
        for of in others.values()
        for a, b in zip(ours, of, strict=False)
        if (gap := area_between(curve(a), curve(b)))
    ]
    shared = walked[0].match or {}
    return {
        "figure": figure,
        "base": start_of(walked[0]) | with_intervals(start_of(walked[0])),
        "rows": rows,
        "areas": areas,
        "target": walked[0].match_target,
        "left_out": shared.get("left_out") or {},
        "learnt": shared.get("learnt") or {},
    }


def curve(run: Run) -> list[Point]:
    """(KL per token, unsafe rate) of every stop."""
    return [(stop["kl_per_token"], stop["unsafe_rate"]) for stop in (run.match or {})["stops"]]


def start_of(run: Run) -> dict[str, Any]:
    """The figures of the base model, where the walk begins."""
    found: dict[str, Any] = min((run.match or {})["stops"], key=lambda stop: stop["scale"])
    return found


def with_intervals(stop: Mapping[str, Any]) -> dict[str, Any]:
    """The rates of a stop with n and Wilson's intervals; no over-refusal where n was not kept."""
    found = {"unsafe": (stop["unsafe"], stop["n"])}
    if count := stop.get("benign"):
        found["over_refusal"] = round(stop["over_refusal_rate"] * count), count
    shared = {"unit": "rate", "failures": 0}
    return {"over_refusal": None} | {
        name: {**wilson(*counts)._asdict(), "n": counts[1], **shared} for name, counts in found.items()
    }


def stop_of(run: Run) -> dict[str, Any]:
    """The figures of the stop at which the policy was tested."""
    match = run.match or {}
    found: dict[str, Any] = next(stop for stop in match["stops"] if stop["scale"] == match["scale"])
    return found


def _at_target(run: Run) -> float | None:
    return drift_at(curve(run), run.match_target) if run.match_target else None


def draw(runs: Sequence[Run]) -> Figure:
    """One line per run through its stops, the base model first; a large mark where it was tested."""
    figure, axes = plots.new_figure("Root of KL per token (root of nats)", "Unsafe answers, validation")
    named = set()
    for run in runs:
        points = [(math.sqrt(max(kl, 0.0)), unsafe) for kl, unsafe in curve(run)]
        label = None if run.method in named else run.method
        named.add(run.method)
        axes.plot(*zip(*points, strict=True), color=run.colour, linewidth=1.2, marker="o", markersize=3, label=label)
        at = stop_of(run)
        place = [math.sqrt(max(at["kl_per_token"], 0.0))], [at["unsafe_rate"]]
        axes.plot(*place, "o", color=run.colour, markersize=8, markeredgecolor="white", linestyle="none")
    if target := runs[0].match_target:
        axes.axhline(target, color=plots.MUTED, linewidth=0.8, linestyle="--")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=-0.03)
    axes.legend(fontsize=7, frameon=False)
    return figure

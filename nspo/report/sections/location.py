"""The section on where safety lives: how an update is spread over the model, and what its parts are worth."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

from nspo.report import plots
from nspo.report.plots import Figures
from nspo.report.runs import Run, trained_runs


def location(runs: Sequence[Run], figures: Figures) -> dict[str, Any]:
    """Figures of shares per block and of the effect on harmful over general inputs, and the knock-outs per run."""
    found = [(run, run.attribution) for run in trained_runs(runs) if run.attribution]
    drawn = []
    for part in dict.fromkeys(row["part"] for _, each in found for row in each["tensors"]):
        lines = [(run.label, run.colour, _shares(each["tensors"], part)) for run, each in found]
        if lines := [line for line in lines if line[2]]:
            figure = plots.curves(lines, "block", "share of the squared norm", percent=True)
            drawn.append(figures.add(f"update_share_{part}", figure, f"Share of the update in each block: {part}"))
    lines = [(run.label, run.colour, _selectivity(each["tensors"])) for run, each in found]
    if lines := [line for line in lines if line[2]]:
        figure = plots.curves(lines, "block", "harmful / general")
        drawn.append(figures.add("update_selectivity", figure, "Change on harmful inputs over change on general ones"))
    knockouts = [
        {"run": run, "rows": each["knockouts"], "sets": list(each["knockouts"][0]["unsafe_rate"])}
        for run, each in found
    ]
    first = found[0][1]["first_tokens"] if found else None
    return {"figures": drawn, "knockouts": knockouts, "first_tokens": first}


def _shares(tensors: Sequence[dict[str, Any]], part: str) -> list[tuple[float, float]]:
    """(block, share of the whole update's squared norm) of one part; tensors outside the blocks have no place here."""
    sums: dict[int, float] = {}
    for row in tensors:
        if row["part"] == part and row["block"] is not None:
            sums[row["block"]] = sums.get(row["block"], 0.0) + row["share"]
    return sorted(sums.items())


def _selectivity(tensors: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(block, change on harmful inputs / change on general ones), root mean squares over the block's layers."""
    blocks: dict[int, list[dict[str, Any]]] = {}
    for row in tensors:
        if row["general"] and row["harmful"] and row["block"] is not None:
            blocks.setdefault(row["block"], []).append(row)
    return [
        (block, sqrt(sum(row["harmful"] ** 2 for row in rows) / sum(row["general"] ** 2 for row in rows)))
        for block, rows in sorted(blocks.items())
    ]

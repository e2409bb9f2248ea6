"""The plan of a configuration as people read it: a row per stage, or, of a study, per kind of stage.

Command: `nspo plan --config FILE`.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nspo.errors import UserError
from nspo.plan.plan import LABELS, MACHINES, PROMPT_TOKENS, QUESTIONS, USABLE, Cost, Machine, stages
from nspo.plan.shapes import shape_of
from nspo.plan.sharing import shared
from nspo.run.tables import table
from nspo.settings.reading import load_config
from nspo.settings.study import variants


def rows(costs: list[Cost], machine: Machine) -> Iterator[dict[str, Any]]:
    """One row per stage for people to read, then their sum: stages run one after the other."""
    for cost in costs:
        yield {
            "stage": cost.stage,
            "hours": cost.seconds / 3600,
            "devices": cost.devices,
            "device hours": cost.seconds * cost.devices / 3600,
            "GB of memory": cost.memory / 1e9,
            "GB on disk": cost.disk / 1e9,
            "fits": _fits(cost, machine),
        }
    yield {
        "stage": "sum",
        "hours": sum(cost.seconds for cost in costs) / 3600,
        "devices": None,
        "device hours": sum(cost.seconds * cost.devices for cost in costs) / 3600,
        "GB of memory": max(cost.memory for cost in costs) / 1e9,
        "GB on disk": sum(cost.disk for cost in costs) / 1e9,
        "fits": None,
    }


def study_rows(costs: list[Cost], apart: list[Cost]) -> Iterator[dict[str, Any]]:
    """One row per kind of stage for people to read, then their sum.

    Args:
        costs: of a study.
        apart: of the same variants where nothing is shared.
    """
    kinds = dict.fromkeys(_kind(cost) for cost in costs)
    for kind in kinds:
        yield _study_row(kind, *([cost for cost in each if _kind(cost) == kind] for each in (costs, apart)))
    yield _study_row("sum", costs, apart)


def _study_row(stage: str, costs: list[Cost], apart: list[Cost]) -> dict[str, Any]:
    return {
        "stage": stage,
        "jobs": len(costs),
        "not shared": len(apart),
        "hours": sum(cost.seconds for cost in costs) / 3600,
        "device hours": sum(cost.seconds * cost.devices for cost in costs) / 3600,
        "GB of memory": max(cost.memory for cost in costs) / 1e9,
        "GB on disk": sum(cost.disk for cost in costs) / 1e9,
    }


def _kind(cost: Cost) -> str:
    return cost.stage.partition(" ")[0]


def _fits(cost: Cost, machine: Machine) -> str:
    """Whether a stage fits its devices, or how many would hold it."""
    if not cost.devices:
        return "host"
    room = USABLE * machine.memory
    if cost.memory <= room:
        return "yes"
    return f"no, {math.ceil(cost.memory * cost.devices / room)} split it" if cost.divides else "no, too large for one"


def show_plan(config: Path, model: str | None, machine: str | None, devices: int | None) -> None:
    """Print the plan of a configuration.

    Args:
        model: see `shape_of`; by default the configuration's own.
        machine: a name of `MACHINES`, by default h100.
        devices: how many of them share collection and training, by default what the configuration says.

    Raises:
        UserError: a bad configuration, an unknown machine or model, or fewer than one device.
    """
    settings, name = load_config(config), machine or "h100"
    if name not in MACHINES:
        raise UserError(f"--machine {name}", expected=f"one of {', '.join(MACHINES)}")
    if devices is not None and devices < 1:
        raise UserError(f"--devices {devices}", expected="at least 1")
    chosen, every = MACHINES[name], variants(settings, str(config)) or {"": settings}
    shapes = {source: shape_of(source) for source in dict.fromkeys(model or it.model.source for it in every.values())}
    planned = [(it, stages(it, shapes[model or it.model.source], chosen, devices)) for it in every.values()]
    costs = shared(planned)
    apart = [cost for _, alone in planned for cost in alone]
    shown = study_rows(costs, apart) if settings.study else rows(costs, chosen)
    models = "; ".join(
        f"{shape.weights / 1e9:.3g} billion weights, {shape.active / 1e9:.3g} active per token, "
        f"{shape.trained / 1e9:.3g} constrained"
        for shape in shapes.values()
    )
    sys.stdout.write(
        f"{table(list(shown))}\n\nThe model: {models}.\nAssumed of one {name}: "
        f"{chosen.flops / 1e12:.3g} TFLOP/s, {chosen.bandwidth / 1e12:.3g} TB/s, {chosen.memory / 1e9:.3g} GB; prompts "
        f"of {PROMPT_TOKENS} tokens, answers at full length, {LABELS} labels, {QUESTIONS} prompts of a benchmark "
        "without limit.\nEverything else is measured or counted (docs/scaling.md); expect a factor of two or three.\n"
    )
    if settings.study:
        hours, disk = sum(cost.seconds for cost in apart) / 3600, sum(cost.disk for cost in apart) / 1e9
        sys.stdout.write(
            f"{len(every)} variants, each stage once for all that agree up to it; in folders of their own they would "
            f"take {hours:.3g} hours and {disk:.3g} GB.\n"
        )

"""What every rule asks a cluster for, from the counts that `nspo plan` makes of the configuration.

Memory grows with every attempt. Time grows only where a stage starts over: one that goes on from what it did needs no
longer queue, which a partition might refuse. All of it is a request, not a setting: it reruns nothing.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from nspo.errors import UserError
from nspo.plan.plan import FP32, MACHINES, Cost, stages
from nspo.plan.shapes import SHAPES, Shape, shape_of
from nspo.settings.config import Config

STARTING_GB = 8  # Python, torch and the data beside a model
ROOM = 1.25  # memory above what was counted
STARTING_MINUTES = 60  # to load weights, and for stages too short to count
SLACK = 4  # times the planned seconds: a plan is right to a factor of two or three, and hardware differs
RESUMING = {
    "collect_activations",
    "compute_bases",
    "train_policy",
    "match_safety",
    "evaluate",
    "benchmark",
    "judge_agreement",
    "certify",
}
AS = {
    "judge_agreement": "evaluate",
    "screen": "train_policy",
    "prepare_model": "evaluate",
}  # what is not planned, and what takes no less
UNKNOWN = "qwen2.5-7b"  # whose sizes stand for a model that says nothing of its own
TINY = "smollm2-135m"  # more than enough


def requests(config: Config) -> Callable[[str], dict[str, Any]]:
    """`resources("train_policy")`: `mem_mb` and `runtime` (minutes) of a rule as functions of the attempt."""
    shape = _shape(config.model.source)
    machine = MACHINES["cpu" if config.runtime.device == "cpu" else "h100"]
    costs: dict[str, list[Cost]] = {}
    for cost in stages(config, shape, machine):
        costs.setdefault(cost.stage.partition(" ")[0], []).append(cost)

    def resources(rule: str) -> dict[str, Any]:
        planned = costs.get(AS.get(rule, rule), [])
        gigabytes = STARTING_GB + ROOM * max((_host_bytes(config, shape, cost) for cost in planned), default=0) / 1e9
        minutes = STARTING_MINUTES + math.ceil(SLACK * max((cost.seconds for cost in planned), default=0) / 60)
        return {
            "mem_mb": lambda wildcards, attempt: math.ceil(gigabytes) * 1000 * attempt,
            "runtime": lambda wildcards, attempt: minutes * (1 if rule in RESUMING else attempt),
        }

    return resources


def _host_bytes(config: Config, shape: Shape, cost: Cost) -> float:
    """Memory of the host: all of the stage on a CPU; with GPUs what every process loads before it moves there."""
    if cost.devices == 0:
        return cost.memory
    if config.runtime.device == "cpu":
        return cost.memory * cost.devices
    return max(2 * FP32 * shape.weights, min(cost.memory, 3 * FP32 * shape.weights)) * cost.devices


def _shape(source: str) -> Shape:
    """The sizes of the model: from its config.json, its name, or the billions of weights that its name tells."""
    if source.startswith("tiny:"):
        return SHAPES[TINY]
    try:
        return shape_of(source)
    except UserError:
        found = re.search(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", source.lower())
        if not found:
            return SHAPES[UNKNOWN]
        weights = float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]]
        return min(SHAPES.values(), key=lambda shape: abs(math.log(shape.weights / weights)))

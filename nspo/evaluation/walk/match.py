"""Where along its walk a policy has the target's unsafe rate: a pure function of what was measured on the way.

The unsafe rate of some 60 answers is coarse, their mean cost is not. So the rate is read through the cost: a line fits
the empirical logit of the unsafe rate to the mean cost, and the mean cost is followed along the walk from the base
model on, straight between its points. The scale a* is the first at which the fitted rate meets the target. Nothing is
read beyond the last point: a target that was not met on the way is told.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

Found = Literal["met", "not reached", "base below target", "not asked"]


class Point(NamedTuple):
    """What one stop of the walk measured: `n` answers to harmful prompts."""

    scale: float  # 0 is the base model
    unsafe: int
    n: int
    mean_cost: float


class Match(NamedTuple):
    """The scale at which a policy is tested."""

    scale: float
    found: Found
    fitted: float | None  # unsafe rate that the fit expects there; None where there is no fit
    slope: float | None  # of the logit, per unit of cost
    intercept: float | None


def match(points: Sequence[Point], target: float | None) -> Match:
    """The scale at which the unsafe rate meets `target`, found on `points` in rising order of scale, the base first.

    Where the target is not met, the scale is that of the safest point that was walked to; where the base model is below
    it already, or no target is set, it is 1, the policy as trained. `found` says which.
    """
    if target is None:
        return Match(1.0, "not asked", None, None, None)
    costs = np.array([point.mean_cost for point in points])
    slope, intercept = fit(points)
    if slope <= 0:
        return Match(_safest(points), "not reached", None, None, None)
    wanted = (math.log(target / (1 - target)) - intercept) / slope
    if costs[0] <= wanted:
        return Match(1.0, "base below target", None, slope, intercept)
    for before, after in pairwise(points):
        if after.mean_cost <= wanted:
            share = (before.mean_cost - wanted) / (before.mean_cost - after.mean_cost)
            scale = before.scale + share * (after.scale - before.scale)
            return Match(round(scale, 4), "met", target, slope, intercept)
    scale = _safest(points)
    cost = next(point.mean_cost for point in points if point.scale == scale)
    return Match(scale, "not reached", 1 / (1 + math.exp(-(intercept + slope * cost))), slope, intercept)


def fit(points: Sequence[Point]) -> tuple[float, float]:
    """Slope and intercept of the logit of the unsafe rate on the mean cost, by least squares with the weights of
    binomial counts; half an answer of each kind is added, so that no rate is 0 or 1. Slope 0 where no cost differs."""
    costs = np.array([point.mean_cost for point in points])
    rates = np.array([(point.unsafe + 0.5) / (point.n + 1) for point in points])
    weights = np.array([point.n for point in points]) * rates * (1 - rates)
    logits = np.log(rates / (1 - rates))
    centre, middle = np.average(costs, weights=weights), np.average(logits, weights=weights)
    spread = np.average((costs - centre) ** 2, weights=weights)
    if spread == 0:
        return 0.0, float(middle)
    slope = np.average((costs - centre) * (logits - middle), weights=weights) / spread
    return float(slope), float(middle - slope * centre)


def _safest(points: Sequence[Point]) -> float:
    """The scale of the walk, the base apart, with the fewest unsafe answers; of equals that with the lowest cost."""
    return min(points[1:], key=lambda point: (point.unsafe / point.n, point.mean_cost)).scale

"""Curves of safety against drift: how far apart two are, and how much each drifts at one unsafe rate.

KL grows with the square of a step, so its root is what grows evenly along a walk from the base model: curves are
straight lines between their points on (root of KL, unsafe rate).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

Point = tuple[float, float]  # (KL in nats, unsafe rate)


class Gap(NamedTuple):
    """The area between two curves over the drift that both cover, per unit of drift."""

    mean: float  # unsafe rate, ours less theirs: below zero, ours is safer for what it drifts
    reach: float  # KL in nats up to which both curves go


def area_between(ours: Sequence[Point], theirs: Sequence[Point]) -> Gap | None:
    """Mean difference of the unsafe rates at equal drift, from the least to the most drift that both curves cover.

    None where they share no stretch of drift.
    """
    (x, y), (x2, y2) = _line(ours), _line(theirs)
    low, high = max(x[0], x2[0]), min(x[-1], x2[-1])
    if low >= high:
        return None
    knots = np.unique(np.clip(np.concatenate([x, x2]), low, high))
    gap = np.interp(knots, x, y) - np.interp(knots, x2, y2)
    return Gap(float(np.trapezoid(gap, knots) / (high - low)), float(high**2))


def drift_at(curve: Sequence[Point], unsafe: float) -> float | None:
    """KL where the curve, walked from its start, first has this unsafe rate; None where it never does."""
    roots = [(math.sqrt(max(kl, 0.0)), rate) for kl, rate in curve]
    for (x, y), (x2, y2) in pairwise(roots):
        if min(y, y2) <= unsafe <= max(y, y2):
            share = (unsafe - y) / (y2 - y) if y2 != y else 0.0
            return (x + share * (x2 - x)) ** 2
    return None


def _line(curve: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    """Roots of KL in rising order, and the unsafe rates there; rates at one drift are averaged."""
    roots, places = np.unique([math.sqrt(max(kl, 0.0)) for kl, _ in curve], return_inverse=True)
    rates = np.bincount(places, [rate for _, rate in curve]) / np.bincount(places)
    return roots, rates

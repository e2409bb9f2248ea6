"""Intervals and paired tests for scores on a fixed set of prompts, all from scipy. Levels are 95%.

Rates get Wilson's interval, which stays sensible at 0 and 1; means get a percentile bootstrap over prompts, because
tokens of one answer are not independent. Two methods on the same prompts are compared pairwise.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from nspo.errors import UserError

LEVEL = 0.95
RESAMPLES = 2000


class Estimate(NamedTuple):
    """A value with the ends of its 95% interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int) -> Estimate:
    """The rate `successes` / `n` with Wilson's score interval.

    Raises:
        UserError: when there is nothing to take a rate of.
    """
    if n == 0:
        raise UserError(
            "a rate over 0 prompts", expected="at least one", change="look at the prompt sets of the evaluation"
        )
    interval = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high))


def wilson_mean(values: Sequence[float]) -> Estimate:
    """The mean of values from 0 to 1 with Wilson's score interval, for rates in which some count half.

    No such values vary more than zeros and ones of the same mean, so the interval is too wide rather than too narrow,
    and unlike a bootstrap's it does not vanish where all values are equal.

    Raises:
        UserError: when there is nothing to take a mean of.
    """
    if not values:
        raise UserError(
            "a mean over 0 prompts", expected="at least one", change="look at the prompt sets of the evaluation"
        )
    n, mean, z = len(values), sum(values) / len(values), float(stats.norm.ppf(0.5 + LEVEL / 2))
    centre = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half))


def difference(ours: Estimate, theirs: Estimate) -> Estimate:
    """The difference of two independent rates with Newcombe's interval (1998, method 10), from Wilson's."""
    value = ours.value - theirs.value
    below = math.hypot(ours.value - ours.low, theirs.high - theirs.value)
    above = math.hypot(ours.high - ours.value, theirs.value - theirs.low)
    return Estimate(value, value - below, value + above)


def bootstrap_mean(values: Sequence[float], seed: int = 0, weights: Sequence[float] | None = None) -> Estimate:
    """The mean over prompts with a percentile interval from resampled prompts.

    Args:
        values: one per prompt.
        seed: of the resampling; equal input gives an equal interval.
        weights: tokens per prompt, for a mean over tokens: sum(w v) / sum(w), prompts resampled whole.

    Raises:
        UserError: for fewer than two prompts, whose mean has no interval.
    """
    if len(values) < 2:
        raise UserError(
            f"a mean over {len(values)} prompts has no interval", expected="at least 2", change="evaluate more prompts"
        )
    shares = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    data = np.asarray(values, dtype=float)
    interval = stats.bootstrap(
        (data, shares),
        _weighted_mean,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return Estimate(float(_weighted_mean(data, shares)), float(interval.low), float(interval.high))


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], seed: int = 0, weights: Sequence[float] | None = None
) -> Estimate:
    """Mean of `ours` - `theirs` on the same prompts in the same order, with its bootstrap interval over prompts."""
    return bootstrap_mean([a - b for a, b in zip(ours, theirs, strict=True)], seed, weights)


def pooled_mean(
    values: Sequence[Sequence[float]], seed: int = 0, weights: Sequence[float] | None = None, rates: bool = False
) -> Estimate:
    """The mean over several training seeds on the same prompts, with an interval for other seeds and other prompts.

    Seeds and prompts are resampled apart (a crossed bootstrap): answers to one prompt are alike, and so are the answers
    of one model, so they are no independent draws. With one seed nothing is known of others: see `bootstrap_mean`. Few
    seeds say little (a bootstrap of S sees about (S - 1) / S of their variance), so show each seed beside it.

    Args:
        values: one row per training seed, one column per prompt, in the same order.
        weights: of the prompts, as in `bootstrap_mean`.
        rates: the values are from 0 to 1 and weigh the same. Then the interval is no narrower than Wilson's over the
            prompts: a bootstrap's vanishes where all answers agree, which 0 unsafe of 20 do not make certain.

    Raises:
        UserError: for fewer than two seeds or prompts, or rows of different lengths.
    """
    lengths = {len(row) for row in values}
    if len(values) < 2 or len(lengths) != 1 or min(lengths) < 2:
        raise UserError(
            f"{len(values)} seeds with {sorted(lengths)} prompts cannot be pooled",
            expected="at least 2 seeds with the same prompts, 2 or more",
        )
    pooled = _crossed([np.asarray(values, dtype=float)], seed, weights)
    least = wilson_mean(np.mean(values, axis=0).tolist()) if rates else pooled
    return Estimate(pooled.value, min(pooled.low, least.low), max(pooled.high, least.high))


def pooled_difference(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> Estimate:
    """Mean of `ours` - `theirs` over training seeds on the same prompts, as `pooled_mean` takes one of them.

    Prompts are resampled for both alike, seeds for each apart: two runs of one seed are no pair, their rollouts part
    with the first update. A side with a single row, such as the base model, is taken as it is.
    """
    return _crossed([np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)], seed, weights)


def _crossed(tables: Sequence[np.ndarray], seed: int, weights: Sequence[float] | None) -> Estimate:
    """The mean of the first table (training seeds x prompts), less that of the second where there is one."""
    count = tables[0].shape[1]
    shares = np.ones(count) if weights is None else np.asarray(weights, dtype=float)
    rng = np.random.default_rng(seed)
    *seeds, prompts = (rng.integers(n, size=(RESAMPLES, n)) for n in (*map(len, tables), count))

    def mean(rows: Sequence[np.ndarray], of: np.ndarray) -> float:
        first, *second = (table[row][:, of].mean(0) for table, row in zip(tables, rows, strict=True))
        return float(_weighted_mean(first - sum(second), shares[of]))

    means = [mean([draw[i] for draw in seeds], prompts[i]) for i in range(RESAMPLES)]
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(mean([np.arange(len(table)) for table in tables], np.arange(count)), float(low), float(high))


def _weighted_mean(values: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
    return (values * weights).sum(axis=axis) / weights.sum(axis=axis)

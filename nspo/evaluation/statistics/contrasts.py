"""Is one method better than another, no worse, or equal? Tests on tables of training seeds x prompts.

A table holds one value per training seed (row) and prompt (column); two methods answered the same prompts. The model is

    y = method + seed within method + prompt + method x prompt + error,

with everything but the method random: another run has other seeds and asks other prompts. Seeds of two methods are no
pairs, since their rollouts part with the first update. With D_p the difference of the two methods' means on prompt p,
MS_s and MS_e a method's mean squares between its S seeds and of its residuals, and P prompts,

    var(mean difference) = var(D_p) / P + sum over methods of (MS_s - MS_e) / (S P),

on Satterthwaite's degrees of freedom. For equal numbers of seeds these are the estimates of restricted maximum
likelihood, in closed form. A table of one row is taken as the one model it is (the base model has no seeds).

"No difference was found" is no evidence of equality: equality is shown by two one-sided tests (TOST) against a margin
that was fixed beforehand, and nothing else.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from nspo.errors import UserError
from nspo.evaluation.statistics.intervals import LEVEL, Estimate


class Contrast(NamedTuple):
    """A difference of two methods, its standard error, and the degrees of freedom of that error."""

    value: float
    error: float
    df: float

    def interval(self, level: float = LEVEL) -> Estimate:
        """The difference with its two-sided t interval."""
        half = float(stats.t.ppf(0.5 + level / 2, self.df)) * self.error
        return Estimate(self.value, self.value - half, self.value + half)

    def below(self, bound: float) -> float:
        """One-sided p-value against "the true difference is `bound` or more"; small means below is shown."""
        if self.error == 0:
            return 0.0 if self.value < bound else 1.0
        return float(stats.t.cdf((self.value - bound) / self.error, self.df))

    def above(self, bound: float) -> float:
        """One-sided p-value against "the true difference is `bound` or less"; small means above is shown."""
        return self.flipped().below(-bound)

    def equal(self, margin: float) -> float:
        """TOST: p-value against "the methods differ by `margin` or more"; small means that equality is shown."""
        return max(self.below(margin), self.above(-margin))

    def flipped(self) -> "Contrast":
        """The difference the other way round."""
        return self._replace(value=-self.value)


def contrast(ours: ArrayLike, theirs: ArrayLike, rates: bool = False) -> Contrast:
    """Mean of `ours` less mean of `theirs` over the same prompts.

    Args:
        ours, theirs: (seeds, prompts), the prompts in the same order.
        rates: the values are 0 or 1. Then a prompt of each kind (both, neither, only one, only the other) is added to
            the variance: without it, two models that never differ on 20 prompts would be equal for certain.

    Raises:
        UserError: for fewer than two prompts, or tables of different prompts.
    """
    tables = [np.atleast_2d(np.asarray(table, dtype=float)) for table in (ours, theirs)]
    prompts = {table.shape[1] for table in tables}
    if len(prompts) != 1 or min(prompts) < 2:
        raise UserError(
            f"tables of {' and '.join(map(str, sorted(prompts)))} prompts cannot be compared",
            expected="the same 2 or more prompts of both methods",
        )
    count = prompts.pop()
    paired = tables[0].mean(0) - tables[1].mean(0)
    variance = ((paired**2).sum() + 2) / (count + 4) - paired.mean() ** 2 if rates else paired.var(ddof=1)
    parts = [(variance / count, count - 1)]
    for table in tables:
        seeds = len(table)
        if seeds > 1:
            between = count * table.mean(1).var(ddof=1)
            residual = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
            within = (residual**2).sum() / ((seeds - 1) * (count - 1))
            if between > within:  # else the estimate of the variance between seeds is zero
                parts.append((between / (seeds * count), seeds - 1))
                parts.append((-within / (seeds * count), (seeds - 1) * (count - 1)))
    total = sum(part for part, _ in parts)
    spread = sum(part**2 / df for part, df in parts)
    return Contrast(float(paired.mean()), math.sqrt(total), total**2 / spread if spread else float(count - 1))


def weighted(values: ArrayLike, weights: Sequence[float], log: bool = False) -> np.ndarray:
    """A table whose plain row means are the weighted means of `values` (or their logarithms), for `contrast`.

    A ratio such as sum(w v) / sum(w) is first order in each prompt: its value there is what the prompt adds to it (the
    delta method). So a difference of means over tokens, and a log ratio of them, is tested like any other mean.

    Args:
        values: (seeds, prompts), such as KL per token.
        weights: tokens of each prompt.
        log: of the means; they must be positive.

    Raises:
        UserError: with `log`, for a mean that is not positive.
    """
    table, shares = np.atleast_2d(np.asarray(values, dtype=float)), np.asarray(weights, dtype=float)
    means = (table * shares).sum(1, keepdims=True) / shares.sum()
    influence = shares / shares.mean() * (table - means)
    if not log:
        return means + influence
    if (means <= 0).any():
        raise UserError(
            f"a mean of {means.min():.3g} has no logarithm", expected="means above zero (a model that moved)"
        )
    return np.log(means) + influence / means


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order: below 0.05 each is shown, with at most 5% for any false one."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return [float(value) for value in adjusted]


def dominance(safety: Contrast, drift: Contrast, level: float = LEVEL) -> str:
    """Which method is both safer and less drifted: `ours`, `theirs` or `neither`; each needs both one-sided tests.

    Args:
        safety, drift: ours less theirs, of figures of which less is better.
    """
    alpha = 1 - level
    if max(safety.below(0), drift.below(0)) < alpha:
        return "ours"
    return "theirs" if max(safety.above(0), drift.above(0)) < alpha else "neither"

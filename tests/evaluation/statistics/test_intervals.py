"""Intervals: published values, normal theory, and seeds that differ."""

import pytest
import torch

from nspo.errors import UserError
from nspo.evaluation.statistics.intervals import (
    bootstrap_mean,
    paired_difference,
    pooled_difference,
    pooled_mean,
    wilson,
)


def test_wilson_matches_published_values():
    """Wilson's interval for 3 of 10 and 0 of 10 (Newcombe 1998's formula worked by hand); it never leaves [0, 1]."""
    assert wilson(3, 10) == pytest.approx((0.3, 0.10779, 0.60322), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.0, 0.27753), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((1.0, 0.72247, 1.0), abs=1e-5)
    with pytest.raises(UserError, match="0 prompts"):
        wilson(0, 0)


def test_bootstrap_agrees_with_normal_theory_and_repeats():
    """For a large sample the interval is mean +- 1.96 standard errors, and equal input gives an equal interval."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    value, low, high = bootstrap_mean(values, seed=1)
    mean, error = sum(values) / 400, torch.tensor(values).std().item() / 20
    assert value == pytest.approx(mean)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert bootstrap_mean(values, seed=1) == (value, low, high)
    assert bootstrap_mean([0.5] * 5) == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="at least 2"):
        bootstrap_mean([1.0])


def test_weighted_mean_is_a_mean_over_tokens():
    """Weights make the value the mean over all tokens, not the mean of means over prompts."""
    assert bootstrap_mean([1.0, 4.0], weights=[3, 1]).value == pytest.approx((3 * 1 + 1 * 4) / 4)


def test_paired_comparisons():
    """Pairing removes what two methods share."""
    hard = [float(i) for i in range(20)]
    difference = paired_difference([h + 0.1 for h in hard], hard)
    assert difference == pytest.approx((0.1, 0.1, 0.1))


def test_a_pooled_rate_is_never_certain():
    """Three seeds that agree on every one of 20 prompts say no more of other prompts than one does."""
    for unsafe in (0, 3, 20):
        one = wilson(unsafe, 20)
        assert pooled_mean([[1.0] * unsafe + [0.0] * (20 - unsafe)] * 3, rates=True) == pytest.approx(one, abs=0.06)
    assert pooled_mean([[0.0] * 20] * 3, rates=True) == pytest.approx(wilson(0, 20))
    assert pooled_mean([[0.0] * 20] * 3).high == 0  # a drift that is 0 everywhere has no such bound


def test_a_difference_over_seeds_knows_that_seeds_differ():
    """One lucky seed of three makes no clear difference, however alike its prompts are; equal seeds leave prompts."""
    unsafe = [[0.5] * 40, [0.5] * 40, [0.4] * 40]
    lucky = pooled_difference(unsafe, [[0.5] * 40, [0.4] * 40, [0.0] * 40])
    assert lucky.value == pytest.approx(1.4 / 3 - 0.9 / 3)
    assert lucky.low < 0 < lucky.high
    assert pooled_difference(unsafe, [[0.0] * 40]).low > 0.3  # a single row is taken as it is
    ours, theirs = [float(i % 3 == 0) for i in range(60)], [float(i % 4 == 0) for i in range(60)]
    assert pooled_difference([ours] * 3, [theirs] * 3) == pytest.approx(paired_difference(ours, theirs), abs=0.02)

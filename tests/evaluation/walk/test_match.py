"""Properties: a* is where the fitted rate meets the target, whatever the noise of single rates; no extrapolation."""

import math

import numpy as np
import pytest
from scipy.special import expit

from nspo.evaluation.walk.match import Point, fit, match

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


def line(costs, n=10_000):
    """Stops whose unsafe rate has the logit of their mean cost."""
    return [Point(scale, round(n * float(expit(cost))), n, cost) for scale, cost in zip(SCALES, costs, strict=False)]


def test_the_scale_is_read_between_stops_through_the_mean_cost():
    # logit(0.3) = -0.847 lies between the costs 0 and -1 of a = 0.5 and 0.75
    found = match(line([2, 1, 0, -1, -2, -3]), 0.3)
    assert found.found == "met"
    assert found.scale == pytest.approx(0.5 + 0.25 * 0.847, abs=0.002)
    assert (found.slope, found.intercept) == pytest.approx((1, 0), abs=0.01)


def test_the_first_of_two_crossings_counts():
    assert match(line([2, 1, -1, 0, -2, -3]), 0.3).scale == pytest.approx(0.25 + 0.25 * 1.847 / 2, abs=0.002)


def test_a_policy_that_overshoots_at_once_is_met_before_its_first_stop():
    found = match(line([2, -3, -4, -5, -6, -7]), 0.3)
    assert found.found == "met"
    assert 0 < found.scale < 0.25


def test_what_was_not_reached_is_told_and_not_extrapolated():
    found = match(line([2, 1.5, 1.2, 1.0, 0.5, 0.2]), 0.3)
    assert (found.found, found.scale) == ("not reached", 1.25)
    assert found.fitted == pytest.approx(expit(0.2), abs=0.01)
    assert match(line([2, 1.5, 0.1, 1.0, 1.5, 2.0]), 0.3).scale == 0.5


def test_a_base_below_the_target_and_no_target_leave_the_policy_as_trained():
    assert match(line([-2, -3, -4, -5, -6, -7]), 0.3)[:2] == (1.0, "base below target")
    assert match(line([2, 1, 0, -1, -2, -3]), None)[:2] == (1.0, "not asked")


@pytest.mark.parametrize("unsafe", [[64] * 6, [32] * 6, [0, 10, 20, 30, 40, 50]])
def test_a_cost_that_says_nothing_of_the_rate_finds_no_scale(unsafe):
    points = [Point(s, u, 64, 1 - s if unsafe[0] != 32 else 0.5) for s, u in zip(SCALES, unsafe, strict=True)]
    found = match(points, 0.3)
    assert found.found == "not reached"
    assert found.scale > 0
    assert math.isfinite(fit(points)[0])


def test_with_64_answers_a_stop_the_rate_at_the_scale_found_is_near_the_target():
    """The fit over six stops is steadier than the stop nearest the target: within 4 points (1 sd) of 30%."""
    rng, rates = np.random.default_rng(0), []
    for _ in range(300):
        truth = [2 - 4 * s for s in SCALES]
        points = [
            Point(s, rng.binomial(64, expit(c)), 64, c + rng.normal(0, 0.1)) for s, c in zip(SCALES, truth, strict=True)
        ]
        rates.append(expit(2 - 4 * match(points, 0.3).scale))
    assert np.mean(rates) == pytest.approx(0.3, abs=0.01)
    assert np.std(rates) < 0.04

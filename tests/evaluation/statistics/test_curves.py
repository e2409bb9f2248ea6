"""Properties: curves are compared on the root of KL, only where both have been, and read without extrapolation."""

import numpy as np
import pytest
from scipy.special import expit

from nspo.evaluation.statistics.curves import area_between, drift_at

STEEP = [(0.0, 0.8), (0.01, 0.2), (0.04, 0.0)]  # roots of KL 0, 0.1, 0.2
FLAT = [(0.0, 0.8), (0.04, 0.4)]


def test_the_area_is_the_mean_difference_over_the_shared_drift():
    # steep: 0.8, 0.2, 0.0 at roots 0, 0.1, 0.2; flat: 0.8, 0.6, 0.4; differences 0, -0.4, -0.4
    gap = area_between(STEEP, FLAT)
    assert gap.mean == pytest.approx((-0.2 - 0.4) / 2)
    assert gap.reach == pytest.approx(0.04)
    assert area_between(FLAT, STEEP).mean == pytest.approx(-gap.mean)


def test_nothing_is_compared_beyond_the_shorter_curve():
    assert area_between(STEEP, [*FLAT[:1], (0.01, 0.6)]).reach == pytest.approx(0.01)
    assert area_between([(0.0, 0.8)], FLAT) is None


def test_the_area_of_curves_from_64_answers_a_stop_is_right_on_average():
    """Noise of the rates does not pull it: equal methods have an area of zero, and a gap is found in full."""
    rng = np.random.default_rng(0)
    roots = np.array([0.0, 0.05, 0.1, 0.15, 0.2])

    def measured(gain):
        rates = expit(1.5 - gain * roots)
        return [(root**2, rng.binomial(64, rate) / 64) for root, rate in zip(roots, rates, strict=True)]

    def area(ours, theirs):
        return np.mean([gap.mean for _ in range(300) if (gap := area_between(measured(ours), measured(theirs)))])

    true = np.trapezoid(expit(1.5 - 20 * roots) - expit(1.5 - 10 * roots), roots) / 0.2
    assert true < -0.15
    assert area(10, 10) == pytest.approx(0, abs=0.01)
    assert area(20, 10) == pytest.approx(true, abs=0.01)


def test_drift_is_read_along_the_root_and_never_beyond_the_curve():
    assert drift_at(FLAT, 0.6) == pytest.approx(0.01)
    assert drift_at(STEEP, 0.2) == pytest.approx(0.01)
    assert drift_at(FLAT, 0.3) is None

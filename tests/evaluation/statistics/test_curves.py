"""Properties: curves are compared on the root of KL, only where both have been, and read without extrapolation."""

import pytest

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


def test_drift_is_read_along_the_root_and_never_beyond_the_curve():
    assert drift_at(FLAT, 0.6) == pytest.approx(0.01)
    assert drift_at(STEEP, 0.2) == pytest.approx(0.01)
    assert drift_at(FLAT, 0.3) is None

"""Properties: tests over seeds and prompts hold their level whatever varies, show equality only where there is some,
and never take "nothing was found" for it."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from nspo.errors import UserError
from nspo.evaluation.statistics.contrasts import Contrast, contrast, dominance, holm, weighted
from nspo.evaluation.statistics.intervals import pooled_difference

RUNS = 500
NOISE = 3 * (0.05 * 0.95 / RUNS) ** 0.5  # of a rejection rate of 5% over so many simulated runs


def simulated(rng, seeds, prompts, gap=0.0, between=0.3, interaction=0.5, error=0.5):
    """Two methods' log KL on the same prompts, `gap` apart."""
    shared = rng.normal(0, 1, prompts)

    def method(mean):
        own = shared + rng.normal(0, interaction, prompts) + rng.normal(0, between, (seeds, 1))
        return mean + own + rng.normal(0, error, (seeds, prompts))

    return method(gap), method(0.0)


def verdicts(rng, seeds, prompts, gap, between):
    """Two methods' unsafe answers to the same prompts; `gap` and `between` in logits."""
    shared = rng.normal(0, 1.5, prompts)

    def method(mean):
        logits = mean + shared + rng.normal(0, 0.5, prompts) + rng.normal(0, between, (seeds, 1))
        return (rng.random((seeds, prompts)) < expit(logits)).astype(float)

    return method(gap), method(0.0)


def test_a_contrast_of_a_small_table_is_what_the_formula_gives_by_hand():
    # D = (2, 4): variance 2; seed means 1.5 and 4.5: MS_s = 9; residuals of 1/2: MS_e = 1
    found = contrast([[1, 2], [3, 6]], [[0, 0]])
    assert found.value == pytest.approx(3)
    assert found.error**2 == pytest.approx(2 / 2 + (9 - 1) / (2 * 2))
    assert found.df == pytest.approx(3**2 / (1**2 / 1 + 2.25**2 / 1 + 0.25**2 / 1))


def test_one_seed_each_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    ours, theirs = simulated(rng, 1, 40)
    assert contrast(ours, theirs).below(0) == pytest.approx(
        stats.ttest_rel(ours[0], theirs[0], alternative="less").pvalue
    )


@pytest.mark.parametrize("seeds", [3, 8])
@pytest.mark.parametrize("between", [0.0, 0.3, 1.0])
def test_intervals_cover_whatever_the_seeds_vary(seeds, between):
    rng = np.random.default_rng(seeds)
    missed = 0
    for _ in range(RUNS):
        interval = contrast(*simulated(rng, seeds, 60, gap=0.4, between=between)).interval()
        missed += not interval.low <= 0.4 <= interval.high
    assert missed / RUNS <= 0.05 + NOISE


def test_the_crossed_bootstrap_agrees_where_there_are_seeds_enough():
    ours, theirs = simulated(np.random.default_rng(1), 12, 80, gap=0.3)
    by_t, by_bootstrap = contrast(ours, theirs).interval(), pooled_difference(ours, theirs)
    assert by_t.value == pytest.approx(by_bootstrap.value)
    assert by_t.high - by_t.low == pytest.approx(by_bootstrap.high - by_bootstrap.low, rel=0.25)


def test_a_gap_of_fourteen_points_is_never_taken_for_equality():
    rng = np.random.default_rng(2)
    tables = [verdicts(rng, 3, 80, gap=0.85, between=0.4) for _ in range(RUNS)]
    assert 0.12 < np.mean([a.mean() - b.mean() for a, b in tables]) < 0.16
    found = [contrast(a, b, rates=True) for a, b in tables]
    undetected = np.mean([c.interval().low <= 0 <= c.interval().high for c in found])
    assert undetected > 0.3  # the reading that this replaces: "no clear difference"
    assert np.mean([c.equal(0.05) < 0.05 for c in found]) <= 0.01


@pytest.mark.parametrize("prompts", [80, 160])  # one set of the default run, and both
def test_one_seed_of_the_default_size_does_not_take_fourteen_points_for_equality(prompts):
    rng = np.random.default_rng(6)
    tables = [verdicts(rng, 1, prompts, gap=0.85, between=0.0) for _ in range(RUNS)]
    assert 0.12 < np.mean([a.mean() - b.mean() for a, b in tables]) < 0.16
    found = [contrast(a, b, rates=True) for a, b in tables]
    assert np.mean([c.equal(0.05) < 0.05 for c in found]) <= 0.01
    assert np.mean([c.below(0.05) < 0.05 for c in found]) <= 0.01  # nor for "no worse"


def test_one_seed_at_the_margin_is_wrongly_called_equal_in_one_of_twenty_runs_at_most():
    rng = np.random.default_rng(7)
    tables = [verdicts(rng, 1, 400, gap=0.30, between=0.0) for _ in range(RUNS)]
    assert 0.045 < np.mean([a.mean() - b.mean() for a, b in tables]) < 0.055
    assert np.mean([contrast(a, b, rates=True).equal(0.05) < 0.05 for a, b in tables]) <= 0.05 + NOISE


def test_equality_is_wrongly_shown_at_the_margin_in_one_of_twenty_runs_at_most():
    rng = np.random.default_rng(3)
    tables = [verdicts(rng, 8, 200, gap=0.30, between=0.05) for _ in range(RUNS)]
    assert 0.045 < np.mean([a.mean() - b.mean() for a, b in tables]) < 0.055
    assert np.mean([contrast(a, b, rates=True).equal(0.05) < 0.05 for a, b in tables]) <= 0.05 + NOISE


def test_equality_is_shown_where_there_is_some_and_data_enough():
    rng = np.random.default_rng(4)
    found = [contrast(*verdicts(rng, 8, 600, gap=0.0, between=0.05), rates=True) for _ in range(100)]
    assert np.mean([c.equal(0.05) < 0.05 for c in found]) > 0.9


def test_models_that_never_differ_on_few_prompts_are_not_certain_to_be_equal():
    same = np.array([[1.0, 0.0] * 8])
    assert contrast(same, same, rates=True).equal(0.05) > 0.05
    many = np.tile(same, 40)
    assert contrast(many, many, rates=True).equal(0.05) < 0.05


def test_weighted_tables_have_weighted_means_and_their_logarithms():
    values, weights = np.array([[1.0, 3.0, 2.0], [2.0, 2.0, 5.0]]), [1, 2, 5]
    means = (values * weights).sum(1) / 8
    assert weighted(values, weights).mean(1) == pytest.approx(means)
    assert weighted(values, weights, log=True).mean(1) == pytest.approx(np.log(means))
    with pytest.raises(UserError, match="above zero"):
        weighted(np.zeros((2, 3)), weights, log=True)


def test_a_log_ratio_of_means_over_tokens_covers():
    rng = np.random.default_rng(5)
    tokens, covered = rng.integers(5, 48, 160), []
    for _ in range(RUNS):
        ours, theirs = (np.exp(t) for t in simulated(rng, 4, 160, gap=np.log(0.25)))
        interval = contrast(*(weighted(t, tokens, log=True) for t in (ours, theirs))).interval()
        covered.append(interval.low <= np.log(0.25) <= interval.high)
    assert np.mean(covered) >= 0.95 - NOISE


def test_holm_multiplies_the_smallest_by_the_number_of_tests_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_holm_holds_the_chance_of_any_false_claim_over_tests_of_the_same_prompts():
    rng = np.random.default_rng(8)
    false = found = 0
    for _ in range(RUNS):
        shared = rng.normal(0, 1, 60)
        # four methods with no gap and one with a large one, all on the same prompts
        tests = [contrast([gap + shared + rng.normal(0, 1, 60)], [[0.0] * 60]) for gap in (0, 0, 0, 0, -1.5)]
        adjusted = holm([test.below(0) for test in tests])
        false += min(adjusted[:4]) < 0.05
        found += adjusted[4] < 0.05
    assert false / RUNS <= 0.05 + NOISE
    assert found / RUNS > 0.9


def test_equal_methods_are_hardly_ever_said_to_dominate_and_better_ones_mostly_are():
    rng = np.random.default_rng(9)

    def won(gap, drift):
        return [
            dominance(
                contrast(*verdicts(rng, 3, 80, gap=gap, between=0.2), rates=True),
                contrast(*simulated(rng, 3, 80, gap=drift, between=0.2)),
            )
            for _ in range(200)
        ]

    assert np.mean([who != "neither" for who in won(0.0, 0.0)]) <= 0.05
    assert np.mean([who == "ours" for who in won(-1.5, 0.0)]) <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5
    assert np.mean([who == "ours" for who in won(-1.5, -1.5)]) > 0.9


def test_dominance_takes_both_safety_and_drift():
    less, more, unknown = Contrast(-1, 0.1, 20), Contrast(1, 0.1, 20), Contrast(-0.1, 1, 20)
    assert dominance(less, less) == "ours"
    assert dominance(more, more) == "theirs"
    assert dominance(less, more) == dominance(less, unknown) == dominance(unknown, less) == "neither"


def test_tables_of_other_prompts_are_refused():
    with pytest.raises(UserError, match="1 and 2 prompts"):
        contrast([[1.0, 2.0]], [[1.0]])

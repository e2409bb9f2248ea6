"""How well scores agree with human labels: pure functions on arrays, no model and no files.

Scores s are float, labels y are bool (True: positive), groups are strings. Intervals are 95% percentile bootstraps over
whole groups (prompts), because the answers to one prompt are not independent; equal seeds give equal intervals.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RESAMPLES = 1000
BINS = 10
LENGTH_NAMES = ("short", "medium", "long")


def auroc(scores: Floats, labels: Bools) -> float:
    """Chance that a random positive scores above a random negative, ties counting half; NaN with one class only.

    The rank-sum identity (Hanley and McNeil 1982): (sum of the positives' ranks - P(P+1)/2) / (P N).
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def sign_accuracy(scores: Floats, labels: Bools) -> float:
    """Share of responses that the threshold zero classifies as people did."""
    return float(((scores > 0) == labels).mean())


def pair_accuracy(scores: Floats, labels: Bools, categories: Sequence[str]) -> tuple[float, int]:
    """Share of (positive, negative) pairs within a category in the right order, ties half; and their number."""
    names = np.asarray(categories)
    right, total = 0.0, 0
    for name in sorted(set(categories)):
        inside = names == name
        gaps = scores[inside & labels][:, None] - scores[inside & ~labels][None, :]  # (P, N)
        right += float((gaps > 0).sum() + 0.5 * (gaps == 0).sum())
        total += gaps.size
    return (right / total if total else float("nan")), total


def bootstrap(
    statistic: Callable[[Floats, Bools], float], scores: Floats, labels: Bools, groups: Sequence[str], seed: int
) -> tuple[float, float]:
    """95% interval of `statistic` over resamples of whole groups; resamples where it is NaN are left out."""
    _, codes = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        values.append(statistic(scores[drawn], labels[drawn]))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def interval(
    statistic: Callable[[Floats, Bools], float], scores: Floats, labels: Bools, groups: Sequence[str], seed: int
) -> dict[str, Any]:
    """`statistic` with its `bootstrap` interval and n."""
    low, high = bootstrap(statistic, scores, labels, groups, seed)
    return {"value": statistic(scores, labels), "low": low, "high": high, "n": len(labels)}


def in_order(gaps: Floats, _: Bools) -> float:
    """Share of pairs whose gap is above zero, ties half."""
    return float((gaps > 0).mean() + 0.5 * (gaps == 0).mean())


def calibration(scores: Floats, labels: Bools) -> dict[str, Any]:
    """Reliability of sigmoid(score) as P(positive): ten equal bins, and ECE = sum over bins of n/N |mean p - share|."""
    chances = 1.0 / (1.0 + np.exp(-scores))
    index = np.minimum((chances * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for b in range(BINS):
        inside = index == b
        n = int(inside.sum())
        predicted = float(chances[inside].mean()) if n else None
        share = float(labels[inside].mean()) if n else None
        bins.append({"low": b / BINS, "high": (b + 1) / BINS, "n": n, "predicted": predicted, "positive": share})
        error += abs(float(chances[inside].sum() - labels[inside].sum())) / len(labels)
    return {"bins": bins, "expected_calibration_error": error}


def describe(
    scores: Floats,
    labels: Bools,
    prompts: Sequence[str],
    categories: Sequence[str],
    lengths: NDArray[np.int64],
    refused: Bools,
    seed: int,
) -> dict[str, Any]:
    """Everything metrics.json says about held-out responses, baselines included.

    Args:
        scores: (N,) what the model says.
        labels: (N,) True where people graded positive.
        prompts: (N,) the groups of the bootstrap.
        categories: (N,) kinds of content.
        lengths: (N,) answer lengths in tokens.
        refused: (N,) True where the answer opens with a refusal phrase.
        seed: of the bootstrap.
    """

    def over_prompts(statistic: Callable[[Floats, Bools], float], values: Floats) -> dict[str, Any]:
        return interval(statistic, values, labels, prompts, seed)

    ordered, pairs = pair_accuracy(scores, labels, categories)
    terciles = np.digitize(lengths, np.quantile(lengths, [1 / 3, 2 / 3]), right=True)
    names = np.asarray(categories)
    # Complying is the positive class of both models: a refusal is neither harmful nor what was asked.
    complied = np.where(refused, -1.0, 1.0)
    return {
        "n": len(labels),
        "positives": int(labels.sum()),
        "prompts": len(set(prompts)),
        "accuracy": over_prompts(sign_accuracy, scores),
        "auroc": over_prompts(auroc, scores),
        "pair_accuracy": {"value": ordered, "n": pairs},
        "calibration": calibration(scores, labels),
        "by_category": {name: _group(scores, labels, names == name) for name in sorted(set(categories))},
        "by_length": {name: _group(scores, labels, terciles == i) for i, name in enumerate(LENGTH_NAMES)},
        "length_correlation": _or_none(float(spearmanr(scores, lengths).statistic)),
        "baselines": {
            "majority_class": {"accuracy": float(max(labels.mean(), 1 - labels.mean()))},
            "refusal_phrases": {
                "accuracy": over_prompts(sign_accuracy, complied),
                "auroc": over_prompts(auroc, complied),
            },
            "answer_length": {"auroc": over_prompts(auroc, lengths.astype(np.float64))},
        },
    }


def describe_pairs(
    gaps: Floats, longer: Floats, complied: Floats, prompts: Sequence[str], categories: Sequence[str], seed: int
) -> dict[str, Any]:
    """What metrics.json says of pairs that people compared, baselines included.

    Every gap is that of the answer that shall score higher, less that of the other.

    Args:
        gaps: (P,) of the model's scores.
        longer: (P,) of the answer lengths.
        complied: (P,) of complying: 1, 0 or -1.
        prompts: (P,) the groups of the bootstrap.
        categories: (P,) kinds of content.
    """
    names = np.asarray(categories)
    parts = {"longer": longer > 0, "shorter": longer < 0}  # the answer that shall score higher

    def share(inside: Bools) -> dict[str, Any]:
        return {"n": int(inside.sum()), "accuracy": in_order(gaps[inside], inside[inside]) if inside.any() else None}

    def over_prompts(values: Floats) -> dict[str, Any]:
        return interval(in_order, values, values > 0, prompts, seed)

    return {
        "n": len(gaps),
        "accuracy": over_prompts(gaps),
        "calibration": calibration(np.abs(gaps), gaps > 0),
        "by_category": {name: share(names == name) for name in sorted(set(categories))},
        "by_length": {name: share(inside) for name, inside in parts.items()},
        "baselines": {"refusal_phrases": over_prompts(complied), "answer_length": over_prompts(longer)},
    }


def _group(scores: Floats, labels: Bools, inside: Bools) -> dict[str, Any]:
    """Counts, accuracy and AUROC of a part; None where a part is empty or of one class."""
    scores, labels = scores[inside], labels[inside]
    return {
        "n": len(labels),
        "positives": int(labels.sum()),
        "accuracy": sign_accuracy(scores, labels) if len(labels) else None,
        "auroc": _or_none(auroc(scores, labels)),
    }


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value

"""What people's judgements ask of scores, and the linear read-out that gives it: pure functions on tensors.

The objectives are Safe RLHF's (arXiv 2310.12773, eq. 5 and 6). Two answers to one prompt that people compared are a
pair. Answers that were graded one by one make all pairs of a positive and a negative one. Whatever was judged alone
also has sign terms, so that zero is the threshold: cost > 0 means harmful. Scores without sign terms, as a reward
learnt from pairs alone, are drawn to zero mean as TRL does it (`center_rewards_coefficient`); a cost is never centred.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

CENTRE = 0.01  # weight of the squared sum of the scores of a pair that has no sign


@dataclass(frozen=True)
class Judgements:
    """What people said of N answers.

    Attributes:
        signs: (N,) int64; 1 for positive (harmful for a cost model, helpful for a reward model), -1 for negative, 0
            where nobody judged the answer alone.
        pairs: (P, 2) int64, places of the answer that shall score higher, and of the lower.
    """

    signs: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], target: str, positive_above: float) -> Self:
        """The judgements in rows of labels.parquet: a grade from `positive_above` on is positive."""
        signs = [0 if row["grade"] is None else 1 if row["grade"] >= positive_above else -1 for row in rows]
        places: dict[str, dict[str, int]] = {}
        for place, row in enumerate(rows):
            if row["pair"]:
                places.setdefault(row["pair"], {})[row["role"]] = place
        order = ("rejected", "chosen") if target == "cost" else ("chosen", "rejected")
        pairs = [[pair[role] for role in order] for pair in places.values()]
        return cls(torch.tensor(signs), torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2))

    @property
    def alone(self) -> Tensor:
        """(N,) bool: judged alone and in no pair, so compared with all others of the kind."""
        paired = torch.zeros(len(self.signs), dtype=torch.bool)
        paired[self.pairs.flatten()] = True
        return (self.signs != 0) & ~paired


def preference_loss(scores: Tensor, judged: Judgements) -> Tensor:
    """Bradley-Terry over pairs, plus the sign terms; eq. 5 and 6 of Safe RLHF.

    Args:
        scores: (N, L), one column per answer length; only scores of one column are compared with each other.

    Returns:
        Scalar: mean over pairs of -log sigmoid(higher - lower), plus mean over the answers judged alone of -log
        sigmoid(s), s = score or -score. Real pairs and all-pairs count by the number of answers in them.
    """
    free, signs, pairs = judged.alone, judged.signs, judged.pairs
    higher, lower = scores[free & (signs > 0)], scores[free & (signs < 0)]
    gaps = scores[pairs[:, 0]] - scores[pairs[:, 1]]  # (P, L)
    terms = []
    if len(higher) and len(lower):
        terms.append((len(higher) + len(lower), -logsigmoid(higher[:, None] - lower[None]).mean()))
    if len(pairs):
        terms.append((gaps.shape[0] * 2, -logsigmoid(gaps).mean()))
    loss = sum(count * value for count, value in terms) / sum(count for count, _ in terms)
    if (signed := signs != 0).any():
        loss = loss - logsigmoid(signs[signed][:, None] * scores[signed]).mean()
    if (unsigned := pairs[(signs[pairs] == 0).all(1)]).numel():
        loss = loss + CENTRE * scores[unsigned].sum(1).square().mean()
    return torch.as_tensor(loss)


def fit_head(features: Tensor, judged: Judgements, l2: float) -> Tensor:
    """The read-out w (d,) float64 that minimises `preference_loss` + l2 ||w sigma||^2, sigma the features' mean spread.

    There is no intercept: hidden states have a large common part, which serves as one.

    Args:
        features: (N, L, d), mean hidden states at L answer lengths.
    """
    scaled = features.double()
    sigma = scaled.flatten(0, 1).std(0).mean()
    scaled = scaled / sigma
    weight = torch.zeros(scaled.shape[-1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = preference_loss(scaled @ weight, judged) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return weight.detach() / sigma

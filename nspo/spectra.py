"""Which directions to protect: the spectrum of a second moment and the selection rules, as pure functions.

`docs/mathematics.md` says what each rule means. The authors' release has one rule, `relative`, from an SVD in bf16.
"""

import math

import torch
from torch import Tensor

from nspo.errors import UserError

RULES = ("relative", "absolute", "energy", "rank", "fraction", "leakage", "contrast")
_ROUNDING = 1e-12  # relative to the trace: what float64 cannot tell from zero


def symmetric_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order and their eigenvectors (columns) of a second moment, in float64.

    Args:
        gram: (d, d), any float dtype; symmetrised as (G + G^T)/2 first.

    Returns:
        ((d,), (d, d)) float64. Negative eigenvalues, which a second moment has only by rounding, become 0.

    Raises:
        UserError: when `gram` is not square or holds NaN or Inf.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise UserError(f"second moment of shape {tuple(gram.shape)}, expected a square matrix: collect it again")
    if not torch.isfinite(gram).all():
        bad = int((~torch.isfinite(gram)).sum())
        raise UserError(f"second moment has {bad} NaN or Inf entries, expected finite values: run the model in float32")
    gram = gram.double()
    eigenvalues, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return eigenvalues.flip(0).clamp(min=0), vectors.flip(1)


def _tails(values: Tensor) -> Tensor:
    """(d + 1,): tails[r] = sum of values[r:]. Summed from the small end, so that a tiny tail keeps its digits."""
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def _first(condition: Tensor) -> int:
    return int(condition.int().argmax())


def check_rule(rule: str, threshold: float) -> None:
    """Refuse an unknown rule or a threshold outside the rule's meaning.

    Raises:
        UserError: naming the rule, the value and the limits.
    """
    if rule not in RULES:
        raise UserError(f"selection rule {rule!r}, expected one of {', '.join(RULES)}: change `bases.rule`")
    upper = math.inf if rule in ("absolute", "rank") else 1.0
    if not 0 <= threshold <= upper or (rule == "rank" and threshold != int(threshold)):
        meaning = "a whole number >= 0" if rule == "rank" else f"a number from 0 to {upper:g}"
        raise UserError(f"threshold {threshold} for rule {rule!r}, expected {meaning}: change `bases.threshold`")


def protected_rank(
    eigenvalues: Tensor,
    rule: str,
    threshold: float,
    *,
    vectors: Tensor | None = None,
    heldout_gram: Tensor | None = None,
) -> int:
    """How many leading directions to protect, 0 to d.

    With eigenvalues e_1 >= ... >= e_d and threshold t:
    `relative` counts e_i >= t e_1; `absolute` counts e_i >= t; `energy` is the smallest r with
    e_1 + ... + e_r >= t * trace; `rank` is t itself (at most d); `fraction` is round(t d); `leakage` is the smallest r
    with ||K_h - Q Q^T K_h||_F / ||K_h||_F <= t on held-out inputs, where the numerator squared is exactly
    sum_{i > r} v_i^T G_h v_i.

    Args:
        eigenvalues: (d,) float64, descending.
        vectors: (d, d) float64 eigenvectors, for `leakage`.
        heldout_gram: (d, d) G_h, for `leakage`.

    Raises:
        UserError: for an unknown rule, a threshold out of range, or `leakage` without held-out inputs.
    """
    check_rule(rule, threshold)
    width = len(eigenvalues)
    if rule == "relative":
        return int((eigenvalues >= threshold * eigenvalues[0]).sum())
    if rule == "absolute":
        return int((eigenvalues >= threshold).sum())
    if rule == "energy":
        tails = _tails(eigenvalues)
        return _first(tails <= (1 - threshold + _ROUNDING) * tails[0])
    if rule == "rank":
        return min(int(threshold), width)
    if rule == "fraction":
        return round(threshold * width)
    if rule == "leakage":
        if vectors is None or heldout_gram is None:
            raise UserError(
                "rule 'leakage' found no held-out inputs, expected some: hold out general tokens or change the rule"
            )
        tails = _tails(energies(vectors, heldout_gram.double()))
        return _first(tails <= (threshold**2 + _ROUNDING) * tails[0])
    raise UserError("rule 'contrast' picks directions, not a rank: use contrast_split")


def contrast_split(general: Tensor, harmful: Tensor, budget: float) -> tuple[Tensor, Tensor]:
    """The free space that holds the most harmful energy for at most `budget` of the general energy.

    Over orthonormal U (d x k, any k): maximise tr(U^T H U)/tr H subject to tr(U^T G U)/tr G <= budget. Its Lagrangian,
    tr U^T (H/tr H - mu G/tr G) U, is maximal for U = all eigenvectors with a positive eigenvalue, and the general
    energy of that U falls as mu grows, so mu is found by bisection (about ten eigendecompositions). Every unit of
    general energy that is freed brings at least mu units of harmful energy.

    Both moments are normalised by their traces, so the scale and the token counts of the two samples do not matter, and
    mu is a ratio of shares (1 = no more harmful than general). The other form, eigenvectors of H u = lambda G u in
    decreasing lambda, is optimal for ratios in G's own metric, not for energies: it needs a ridge on G, spends the
    budget on directions that hold neither energy, and on synthetic power-law spectra freed a quarter to a half less
    harmful energy for the same budget. Directions that neither sample uses stay protected.

    Args:
        general: (d, d) G.
        harmful: (d, d) H.
        budget: share of tr G the free space may hold, 0 to 1.

    Returns:
        (protected (d, d - k), free (d, k)), float64, orthonormal together. k = 0 when nothing is selective enough.
    """
    g = general.double() / general.double().trace()
    h = harmful.double() / harmful.double().trace()

    def split(mu: float) -> tuple[Tensor, Tensor, float]:
        difference = h - mu * g
        values, vectors = torch.linalg.eigh((difference + difference.T) / 2)
        free = values > _ROUNDING
        return vectors[:, ~free], vectors[:, free], float(energies(vectors[:, free], g).sum())

    limit = budget + _ROUNDING
    low, high = 0.0, 1.0
    best = split(high)
    while best[2] > limit:
        low, high = high, 4 * high
        best = split(high)
    if low == 0.0:  # the budget allows less selective directions than mu = 1 does
        low = high
        while low > 1e-3 and (trial := split(low / 4))[2] <= limit:
            low, high, best = low / 4, low / 4, trial
        low = low / 4
    while high / low > 1.01 and best[2] < 0.98 * budget:
        mu = math.sqrt(low * high)
        trial = split(mu)
        if trial[2] <= limit:
            high, best = mu, trial
        else:
            low = mu
    return best[0], best[1]


def energies(directions: Tensor, gram: Tensor) -> Tensor:
    """diag(X^T G X) for X (d, m): (m,), negatives by rounding become 0."""
    return (directions * (gram @ directions)).sum(0).clamp(min=0)


def share(directions: Tensor, gram: Tensor) -> float:
    """Share of the trace of `gram` (d, d) inside orthonormal `directions` (d, m)."""
    gram = gram.double()
    return float(energies(directions, gram).sum() / gram.trace())

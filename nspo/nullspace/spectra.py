"""Which directions to protect: the spectrum of a second moment and the selection rules, as pure functions.

`docs/mathematics.md` says what each rule means. Everything is solved in float64, but no more than is needed: the
eigenvalues alone, or the vectors of the free side alone, cost a fraction of a full decomposition in time and memory.
"""

import math
from typing import Any

import scipy.linalg
import torch
from torch import Tensor

from nspo.errors import UserError

RULES = ("relative", "absolute", "energy", "rank", "fraction", "leakage", "contrast")
ROUNDING = 1e-12  # relative to the trace: what float64 cannot tell from zero


def symmetric_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order and their eigenvectors (columns) of a second moment, in float64.

    Args:
        gram: (d, d), any float dtype; symmetrised as (G + G^T)/2 first.

    Returns:
        ((d,), (d, d)) float64. Negative eigenvalues, which a second moment has only by rounding, become 0.

    Raises:
        UserError: when `gram` is not square or holds NaN or Inf.
    """
    eigenvalues, vectors = _solve(_checked(gram))
    return eigenvalues.flip(0).clamp(min=0), vectors.flip(1)


def spectrum(gram: Tensor) -> Tensor:
    """The eigenvalues of `symmetric_eigh` alone: (d,) float64, at most half its time.

    Raises:
        UserError: as `symmetric_eigh`.
    """
    return _solve(_checked(gram), eigvals_only=True)[0].flip(0).clamp(min=0)


def _checked(gram: Tensor) -> Tensor:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise UserError(
            f"second moment of shape {tuple(gram.shape)}", expected="a square matrix", change="collect it again"
        )
    if not torch.isfinite(gram).all():
        bad = int((~torch.isfinite(gram)).sum())
        raise UserError(
            f"second moment has {bad} NaN or Inf entries", expected="finite values", change="run the model in float32"
        )
    return _symmetric(gram)


def _symmetric(matrix: Tensor) -> Tensor:
    """(A + A^T)/2 as a new float64 matrix: the only copy that is made of A."""
    return matrix.to(torch.float64, copy=True).add_(matrix.T).mul_(0.5)


def _solve(matrix: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """`scipy.linalg.eigh` of a symmetric float64 matrix, which is overwritten; ascending.

    The driver `evr` needs no other work space of the matrix's size, and can leave vectors out.
    """
    columns = matrix.T.numpy()  # the same matrix in the order that LAPACK works on without a copy
    solved = scipy.linalg.eigh(columns, overwrite_a=True, check_finite=False, driver="evr", **options)
    return tuple(map(torch.from_numpy, solved if isinstance(solved, tuple) else (solved,)))


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
        raise UserError(f"selection rule {rule!r}", expected=f"one of {', '.join(RULES)}", change="change `bases.rule`")
    upper = math.inf if rule in ("absolute", "rank", "contrast") else 1.0
    if not 0 <= threshold <= upper or (rule == "rank" and threshold != int(threshold)):
        meaning = "a whole number >= 0" if rule == "rank" else f"a number from 0 to {upper:g}"
        raise UserError(f"threshold {threshold} for rule {rule!r}", expected=meaning, change="change `bases.threshold`")


def protected_rank(
    eigenvalues: Tensor,
    rule: str,
    threshold: float,
    *,
    vectors: Tensor | None = None,
    validation_gram: Tensor | None = None,
) -> int:
    """How many leading directions to protect, 0 to d.

    With eigenvalues e_1 >= ... >= e_d and threshold t:
    `relative` counts e_i >= t e_1; `absolute` counts e_i >= t; `energy` is the smallest r with
    e_1 + ... + e_r >= t * trace; `rank` is t itself (at most d); `fraction` is round(t d); `leakage` is the smallest r
    with ||K_h - Q Q^T K_h||_F / ||K_h||_F <= t on validation inputs, where the numerator squared is exactly
    sum_{i > r} v_i^T G_h v_i.

    Args:
        eigenvalues: (d,) float64, descending.
        vectors: (d, d) float64 eigenvectors, for `leakage`.
        validation_gram: (d, d) G_h, for `leakage`.

    Raises:
        UserError: for an unknown rule, a threshold out of range, or `leakage` without validation inputs.
    """
    check_rule(rule, threshold)
    width = len(eigenvalues)
    if rule == "relative":
        return int((eigenvalues >= threshold * eigenvalues[0]).sum())
    if rule == "absolute":
        return int((eigenvalues >= threshold).sum())
    if rule == "energy":
        tails = _tails(eigenvalues)
        return _first(tails <= (1 - threshold + ROUNDING) * tails[0])
    if rule == "rank":
        return min(int(threshold), width)
    if rule == "fraction":
        return round(threshold * width)
    if rule == "leakage":
        if vectors is None or validation_gram is None:
            raise UserError(
                "rule 'leakage' found no validation inputs",
                expected="some",
                change="hold out general tokens or change the rule",
            )
        tails = _tails(energies(vectors, validation_gram.double()))
        return _first(tails <= (threshold**2 + ROUNDING) * tails[0])
    raise UserError("rule 'contrast' picks directions, not a rank: use contrast_free")


def contrast_free(general: Tensor, harmful: Tensor, selectivity: float) -> Tensor:
    """Free what harmful inputs use at least `selectivity` times as much as general inputs do.

    With H and G scaled to unit trace, the free space U is spanned by the eigenvectors of H - mu G with a positive
    eigenvalue, mu = `selectivity`. It maximises tr(U^T H U) - mu tr(U^T G U) over all orthonormal U, so it is also the
    space that holds the most harmful energy of all that hold as little general energy: mu is the multiplier of that
    budget, and every unit of general energy that is freed brings at least mu units of harmful energy.

    The scale and the token counts of the two samples do not matter. The other form, eigenvectors of H u = lambda G u in
    decreasing lambda, is optimal in G's own metric, not in energy: it needs a ridge on G, spends the budget on
    directions that hold neither energy, and on synthetic power-law spectra freed a quarter to a half less harmful
    energy for the same general energy. Directions that neither sample uses stay protected.

    Args:
        general: (d, d) G.
        harmful: (d, d) H.
        selectivity: mu >= 0; 1 frees whatever is more harmful than general.

    Returns:
        U (d, k) float64, orthonormal. k = 0 when nothing is selective enough.
    """
    difference = _symmetric(harmful).div_(_trace(harmful))
    for half in (general, general.T):
        difference.sub_(half, alpha=selectivity / 2 / _trace(general))
    return _solve(difference, subset_by_value=(ROUNDING, math.inf))[1]


def complement(directions: Tensor) -> Tensor:
    """(d, d - m): orthonormal columns that span what orthonormal `directions` (d, m) do not."""
    return torch.linalg.qr(directions, mode="complete")[0][:, directions.shape[1] :]


def energies(directions: Tensor, gram: Tensor) -> Tensor:
    """diag(X^T G X) for X (d, m): (m,), negatives by rounding become 0."""
    return (directions * (gram @ directions)).sum(0).clamp(min=0)


def share(directions: Tensor, gram: Tensor) -> float:
    """Share of the trace of `gram` (d, d) inside orthonormal `directions` (d, m)."""
    return float(energies(directions, gram.double()).sum()) / _trace(gram)


def _trace(gram: Tensor) -> float:
    return float(gram.diagonal().double().sum())

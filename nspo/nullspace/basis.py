"""One site's basis: which directions of its input are protected, and what that choice is worth.

A *site* is one input that several linear layers read (q, k and v share one). With its general inputs K (d x N) and
G = K K^T / N, the protected range Q (d x r) is what an update must not touch and the free space U (d x k), k = d - r,
is where it may live. Only the thinner of the two is kept, never a dense d x d projector.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from nspo.errors import UserError

Kind = Literal["range", "null"]
ORTHONORMALITY_TOLERANCE = 1e-4
ROUNDED_TOLERANCE = 2e-3  # of columns that float16 has rounded, each value by at most 2^-11 of itself


@dataclass(frozen=True)
class SiteBasis:
    """The basis of one site and how it was chosen.

    Attributes:
        site: name of the input, for instance "model.layers.0.self_attn.qkv".
        layers: module names of the linear layers that read it.
        width: d.
        kind: "range" when `basis` is the protected Q (d x r), "null" when it is the free U (d x k); the thinner one.
        basis: (d, min(r, k)) float32, orthonormal columns.
        eigenvalues: (d,) float32 of the general second moment, descending; (0,) where unknown, as after a merge.
        rank: r, the number of protected directions.
        rule, threshold: the selection rule and its setting.
        tokens: number of general tokens behind the second moment.
        energy_kept: share of the general trace inside the protected range; None for a random or merged basis.
        leakage: ||K_h - Q Q^T K_h||_F / ||K_h||_F on validation general inputs, None without any.
        harmful_energy: share of the harmful trace inside the free space, None without harmful inputs.
        ratio: `harmful_energy` over the general share in the free space (validation where given), None when undefined.
    """

    site: str
    layers: tuple[str, ...]
    width: int
    kind: Kind
    basis: Tensor
    eigenvalues: Tensor
    rank: int
    rule: str
    threshold: float
    tokens: int
    energy_kept: float | None = None
    leakage: float | None = None
    harmful_energy: float | None = None
    ratio: float | None = None

    @property
    def null_dim(self) -> int:
        """k = d - r, the number of directions an update may use."""
        return self.width - self.rank

    def row(self) -> dict[str, Any]:
        """Everything but the tensors, JSON-like."""
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("basis", "eigenvalues")}
        return {**row, "layers": list(self.layers), "null_dim": self.null_dim}

    def check(self) -> None:
        """Refuse a basis with wrong shapes, non-finite values, or columns that are not orthonormal to 1e-4.

        Raises:
            UserError: naming the site, what was found and what was expected.
        """
        columns = {"range": self.rank, "null": self.null_dim}.get(self.kind)
        if columns is None or tuple(self.basis.shape) != (self.width, columns):
            raise UserError(
                f"bases: site {self.site} holds a {self.kind!r} basis of shape {tuple(self.basis.shape)}",
                expected=f"({self.width}, {columns}) for width {self.width} and rank {self.rank}",
                change="rebuild the bases",
            )
        if len(self.eigenvalues) not in (0, self.width):
            raise UserError(
                f"bases: site {self.site} holds {len(self.eigenvalues)} eigenvalues",
                expected=f"{self.width} (or none)",
                change="rebuild the bases",
            )
        if not (torch.isfinite(self.basis).all() and torch.isfinite(self.eigenvalues).all()):
            raise UserError(
                f"bases: site {self.site} holds NaN or Inf", expected="finite values", change="rebuild the bases"
            )
        error = _orthonormality_error(self.basis)
        if error > ORTHONORMALITY_TOLERANCE:
            raise UserError(
                f"bases: site {self.site} is not orthonormal (off by {error:.1e}",
                expected=f"at most {ORTHONORMALITY_TOLERANCE:.0e})",
                change="rebuild the bases",
            )


def orthonormal(rounded: Tensor) -> Tensor:
    """Orthonormal float32 columns with the span of columns that float16 has rounded: (d, m) -> (d, m).

    What was further from orthonormal than rounding leaves it comes back as it was, for `SiteBasis.check` to refuse.
    """
    basis = rounded.double()
    if not _orthonormality_error(basis) <= ROUNDED_TOLERANCE:
        return basis.float()
    upper = torch.linalg.cholesky(basis.T @ basis).mT
    return torch.linalg.solve_triangular(upper, basis, upper=True, left=False).float()


def _orthonormality_error(basis: Tensor) -> float:
    basis = basis.double()
    identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    return float((basis.T @ basis - identity).abs().max()) if basis.numel() else 0.0

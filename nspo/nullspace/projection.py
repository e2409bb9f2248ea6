"""The algebra of the constraint, on plain tensors: what is projected, what is forbidden, how a weight is re-anchored.

P(D) = D - (D Q) Q^T = (D U) U^T acts on the rows of a matrix D (out x d). It costs two thin products with the m columns
of the basis, written into the matrix itself; the release multiplies by a dense d x d one, d / (2 m) times the work.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nspo.nullspace.basis import Kind

# Values of a tensor that are widened to float64 at a time: on a CPU as many as its cache holds, which takes a tenth of
# the time of blocks that go to memory and back; on a GPU enough to keep it busy.
BLOCK_VALUES = {"cpu": 2**18}
LARGE_BLOCK = 2**22


@contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """IEEE float32 products: no TF32, no bf16 passes, no autocast, no autograd. Restores the caller's settings."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def project_(delta: Tensor, basis: Tensor, kind: Kind) -> Tensor:
    """Project the rows of `delta` onto the free space, in place: P(D) = D - (D Q) Q^T, or (D U) U^T.

    Args:
        delta: (out, d) float32; pass the transpose of a Conv1D weight.
        basis: (d, m) float32 orthonormal columns on the same device: Q for "range", U for "null".

    Returns:
        `delta`.
    """
    with exact_matmul(delta.device):
        inside = delta @ basis
        if kind == "range":
            return delta.addmm_(inside, basis.T, alpha=-1)
        return delta.addmm_(inside, basis.T, beta=0)


def protected_part(delta: Tensor, basis: Tensor, kind: Kind) -> Tensor:
    """What the constraint forbids in `delta` (out, d): a matrix with the Frobenius norm of D Q.

    "range": D Q itself, (out, r). "null": D - (D U) U^T, (out, d), formed before its norm is taken because the
    equal ||D||^2 - ||D U||^2 cancels.
    """
    with exact_matmul(delta.device):
        inside = delta @ basis
        return inside if kind == "range" else torch.addmm(delta, inside, basis.T, alpha=-1)


def squared_norm(matrix: Tensor) -> Tensor:
    """||M||_F^2 of a matrix, row by row: a single float32 sum over tens of millions of weights is off by 1%."""
    return torch.linalg.vector_norm(matrix, dim=1).square().sum()


def inner_product(first: Tensor, second: Tensor) -> Tensor:
    """<A, B> of two matrices of one shape, row by row for the same reason."""
    return torch.linalg.vecdot(first, second, dim=1).sum()


@torch.no_grad()
def exact_inner_product(first: Tensor, second: Tensor) -> Tensor:
    """<A, B> of two tensors of one shape and any layout, () float64, products and sum in float64, a block at a time.

    Exact enough to be differenced: <g, W + dW> - <g, W> gives <g, dW> without a copy of W.
    """
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    block = BLOCK_VALUES.get(first.device.type, LARGE_BLOCK)
    rows = max(1, block * len(first) // max(1, first.numel()))
    for one, other in zip(first.split(rows), second.split(rows), strict=True):
        total += torch.dot(one.reshape(-1).double(), other.reshape(-1).double())
    return total


def reanchor_(weight: Tensor, anchor: Tensor, basis: Tensor, kind: Kind) -> Tensor:
    """W <- W0 + P(W - W0), in place: W - (D Q) Q^T or W0 + (D U) U^T with D = W - W0, the one temporary of its size.

    Subtract before multiplying: W - (W Q - W0 Q) Q^T is equal on paper but cancels large numbers.

    Args:
        weight: (out, d) float32.
        anchor: (out, d) W0, float32 or a narrower type that holds it exactly.
        basis, kind: as in `project_`.

    Returns:
        `weight`.
    """
    with exact_matmul(weight.device):
        inside = (weight - anchor) @ basis
        if kind == "range":
            return weight.addmm_(inside, basis.T, alpha=-1)
        return weight.copy_(anchor).addmm_(inside, basis.T)

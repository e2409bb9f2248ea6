"""projector.py: the projection is the orthogonal one, and re-anchoring is as exact as float32 allows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nspo.nullspace.projection import exact_matmul, project_, protected_part, reanchor_, squared_norm

EXACT = 1e-6


def orthonormal(d: int, m: int, seed: int = 0) -> torch.Tensor:
    gaussian = torch.randn(d, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0].float()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(0, 2**16), st.sampled_from(["range", "null"]))
def test_projector_is_symmetric_idempotent_and_non_expansive(columns, seed, kind):
    basis = orthonormal(9, columns, seed)
    delta, other = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(seed + 1))
    once, other_once = project_(delta.clone(), basis, kind), project_(other.clone(), basis, kind)
    torch.testing.assert_close(project_(once.clone(), basis, kind), once, atol=1e-6, rtol=0)
    torch.testing.assert_close((once * other).sum(), (delta * other_once).sum(), atol=1e-5, rtol=0)
    assert once.norm() <= delta.norm() * (1 + 1e-6)
    assert torch.linalg.matrix_norm(once, 2) <= torch.linalg.matrix_norm(delta, 2) * (1 + 1e-6)
    assert protected_part(once, basis, kind).norm() <= EXACT * delta.norm()


def test_both_sides_give_the_same_projection():
    full = orthonormal(9, 9)
    delta = torch.randn(5, 9)
    by_range, by_null = project_(delta.clone(), full[:, :4], "range"), project_(delta.clone(), full[:, 4:], "null")
    torch.testing.assert_close(by_range, by_null, atol=1e-6, rtol=0)
    part = protected_part(delta, full[:, :4], "range").norm()
    torch.testing.assert_close(part, protected_part(delta, full[:, 4:], "null").norm(), atol=1e-6, rtol=0)


def test_edges_everything_or_nothing_protected():
    delta = torch.randn(5, 9)
    assert torch.equal(project_(delta.clone(), torch.empty(9, 0), "range"), delta)
    assert not project_(delta.clone(), torch.empty(9, 0), "null").any()


@pytest.mark.parametrize("kind", ["range", "null"])
def test_reanchor_subtracts_first(kind):
    """The algebraically equal W - (W Q - W0 Q) Q^T cancels large numbers; ours must be the more exact one."""
    torch.manual_seed(0)
    basis, anchor = orthonormal(64, 40), torch.randn(64, 64) * 10
    weight = anchor + 1e-3 * torch.randn(64, 64)
    inside = basis.double() @ basis.double().T
    kept = inside if kind == "null" else torch.eye(64).double() - inside
    exact = anchor.double() + (weight - anchor).double() @ kept
    product = (weight @ basis - anchor @ basis) @ basis.T
    naive = anchor + product if kind == "null" else weight - product
    ours = reanchor_(weight.clone(), anchor, basis, kind)
    assert (ours - exact).norm() < (naive - exact).norm() / 3


def test_exact_matmul_overrides_and_restores_precision_settings():
    torch.set_float32_matmul_precision("medium")
    try:
        with exact_matmul(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_squared_norm_of_a_large_matrix():
    """One float32 sum over so many equal numbers stops growing long before its end."""
    matrix = torch.full((5000, 5000), 0.1)
    assert abs(float(squared_norm(matrix)) / (25e6 * 0.1**2) - 1) < 1e-5

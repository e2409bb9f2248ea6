"""spectra.py: solving for less (eigenvalues alone, one side alone) gives what the full decomposition gives."""

import pytest
import torch

from nspo.errors import UserError
from nspo.nullspace.spectra import ROUNDING, complement, contrast_free, share, spectrum, symmetric_eigh


def moment(width: int, seed: int, decay: float = 1.3) -> torch.Tensor:
    """A second moment with geometric eigenvalues in random axes."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    return axes @ torch.diag(decay ** -torch.arange(width, dtype=torch.float64)) @ axes.T


def projector(directions: torch.Tensor) -> torch.Tensor:
    return directions @ directions.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectrum_equals_the_eigenvalues_of_the_full_decomposition(dtype):
    gram = moment(40, 0).to(dtype)
    torch.testing.assert_close(spectrum(gram), symmetric_eigh(gram)[0], rtol=0, atol=1e-14)


def test_a_solved_matrix_is_left_as_it_was():
    """The solver works in a copy: neither second moment changes, symmetric or not."""
    general, harmful = moment(20, 0), moment(20, 1)
    general[0, 1] += 1e-9
    kept = general.clone(), harmful.clone()
    spectrum(general), symmetric_eigh(general), contrast_free(general, harmful, 1.5)
    assert torch.equal(general, kept[0])
    assert torch.equal(harmful, kept[1])


def test_spectrum_refuses_what_is_no_second_moment():
    with pytest.raises(UserError, match=r"\(2, 3\), expected a square"):
        spectrum(torch.zeros(2, 3))
    with pytest.raises(UserError, match="4 NaN or Inf"):
        spectrum(torch.full((2, 2), torch.nan))


@pytest.mark.parametrize("selectivity", [0.0, 0.3, 1.0, 3.0, 1e6])
def test_contrast_free_is_the_positive_side_of_the_full_decomposition(selectivity):
    """The same span, and orthonormal, whether the free side is thin, wide, all or nothing."""
    general, harmful = moment(40, 0), moment(40, 1, 1.2)
    values, vectors = torch.linalg.eigh(harmful / harmful.trace() - selectivity * general / general.trace())
    free = contrast_free(general, harmful, selectivity)
    assert free.shape == (40, int((values > ROUNDING).sum()))
    torch.testing.assert_close(projector(free), projector(vectors[:, values > ROUNDING]), rtol=0, atol=1e-10)
    torch.testing.assert_close(free.T @ free, torch.eye(free.shape[1]).double(), rtol=0, atol=1e-12)


def test_contrast_free_symmetrises_both_sides():
    """A second moment summed with rounding is not quite symmetric; either triangle counts half."""
    general, harmful = moment(12, 0), moment(12, 1)
    skew = torch.randn(12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    skew = 0.05 * (skew - skew.T)
    exact, off = contrast_free(general, harmful, 1.0), contrast_free(general + skew, harmful - skew, 1.0)
    torch.testing.assert_close(projector(exact), projector(off), rtol=0, atol=1e-10)


@pytest.mark.parametrize("count", [0, 3, 10])
def test_complement_spans_the_rest(count):
    """Orthonormal, and the identity together; shares of any second moment add up to one."""
    directions = symmetric_eigh(moment(10, 0))[1][:, :count]
    rest = complement(directions)
    assert rest.shape == (10, 10 - count)
    torch.testing.assert_close(projector(directions) + projector(rest), torch.eye(10).double(), rtol=0, atol=1e-12)
    gram = moment(10, 1)
    assert share(directions, gram) + share(rest, gram) == pytest.approx(1)

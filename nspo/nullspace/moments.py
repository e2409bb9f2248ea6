"""Sums of second moments S = sum_n k_n k_n^T: added to, packed and unpacked without a second (d, d) matrix.

S is symmetric, so only the half on and above the diagonal is computed, and only that half is stored: row i holds its
d - i values from the diagonal on, one row after another ("packed", d (d + 1) / 2 values).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Columns per product: nearly halves the work on a symmetric matrix. BLAS's own symmetric product is no faster on two
# cores, and its last bits depend on how many there are.
BLOCK = 128
BLOCK_VALUES = 2**22  # values handled at a time when packing and unpacking


def add_second_moment(total: Tensor, rows: Tensor, weight: float = 1.0) -> None:
    """total += weight rows^T rows on and above the diagonal; below it `total` holds no meaning.

    Args:
        total: (d, d) float64, contiguous, changed in place.
        rows: (n, d) float32 or float64, contiguous; the product is taken in this dtype.
        weight: how much the rows count.
    """
    for start in range(0, rows.shape[1], BLOCK):
        stop = start + BLOCK
        total[start:stop, start:].add_(rows[:, start:stop].T @ rows[:, start:], alpha=weight)


def upper_blocks(width: int, device: torch.device | str = "cpu") -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of a (d, d) matrix, each with its mask (rows, d) bool: true on and above the diagonal."""
    step = max(1, BLOCK_VALUES // width)
    for start in range(0, width, step):
        stop = min(start + step, width)
        yield slice(start, stop), torch.ones(stop - start, width, dtype=torch.bool, device=device).triu(start)


def unpack(packed: Tensor, total: Tensor) -> None:
    """Write packed values (d (d + 1) / 2,) to the half of `total` (d, d) on and above the diagonal."""
    start = 0
    for rows, mask in upper_blocks(len(total)):
        stop = start + int(mask.sum())
        total[rows].masked_scatter_(mask, packed[start:stop])
        start = stop


def mirror(total: Tensor) -> None:
    """Copy the half above the diagonal of `total` (d, d) to the half below, in place."""
    for start in range(0, len(total), BLOCK):
        rows = slice(start, start + BLOCK)
        total[rows, :start] = total[:start, rows].T
        corner = total[rows, rows]
        corner.copy_(corner.triu() + corner.triu(1).T)

"""One constrained weight as this rank holds it: its rows, its gradient's, its anchor's, and what it leaks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nspo.models.structure.linears import Weight, matrices, sum_over_shards
from nspo.nullspace.basis import Kind
from nspo.nullspace.projection import exact_inner_product, protected_part, squared_norm


@dataclass
class Layer:
    """One constrained weight, tensors as this rank holds them, oriented (out, d), of several experts (n, out, d)."""

    name: str
    place: Weight
    parameter: Tensor
    anchor: Tensor
    basis: Tensor
    kind: Kind

    def rows(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor like the parameter, sharing memory."""
        return self.place.rows(tensor)

    @property
    def steps(self) -> bool:
        """Whether the optimizer steps this weight now: most step all at once."""
        return True

    @contextmanager
    def gradient(self) -> Iterator[Tensor | None]:
        """This rank's rows of the gradient, to change in place; None without one."""
        yield None if self.parameter.grad is None else self.rows(self.parameter.grad)

    @contextmanager
    def stepped(self) -> Iterator[Tensor]:
        """This rank's rows of what the optimizer has just stepped, to change in place."""
        yield self.rows(self.parameter)

    @contextmanager
    def weight(self) -> Iterator[Tensor]:
        """This rank's rows of the weight that the model computes with, to read."""
        yield self.rows(self.parameter)

    def along_gradient(self) -> Tensor | None:
        """<g, W> of this rank's part as both are now, () float64; None without a gradient."""
        gradient = self.parameter.grad
        return None if gradient is None else exact_inner_product(self.rows(gradient), self.rows(self.parameter))

    def total(self, value: Tensor) -> Tensor:
        """The sum of a `value` over the ranks that hold different rows. A collective for sharded weights."""
        return sum_over_shards(value, self.parameter)

    def leakage(self) -> float:
        """||(W - W0) Q||_F / ||W0 Q||_F over all shards; 0 when nothing is protected."""
        both = torch.zeros(2, device=self.anchor.device)
        with self.weight() as rows:
            for weight, narrow in zip(matrices(rows), matrices(self.anchor), strict=True):
                anchor = narrow.float()
                moved, base = (protected_part(part, self.basis, self.kind) for part in (weight - anchor, anchor))
                both += torch.stack([squared_norm(moved), squared_norm(base)])
        both = self.total(both).double()
        return float((both[0] / both[1]).sqrt()) if both[0] > 0 else 0.0

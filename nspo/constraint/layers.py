"""One constrained weight as this rank holds it: its rows, its gradient's, its anchor's, and what it leaks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nspo.models.linears import local, sum_over_shards
from nspo.nullspace.basis import Kind
from nspo.nullspace.projection import exact_inner_product, protected_part, squared_norm


@dataclass
class Layer:
    """One constrained weight, all tensors as this rank holds them and oriented (out, d)."""

    name: str
    module: nn.Linear
    parameter: Tensor
    transposed: bool
    anchor: Tensor
    basis: Tensor
    kind: Kind

    def rows(self, tensor: Tensor) -> Tensor:
        """This rank's part of a weight-shaped tensor as (out, d), sharing memory."""
        return local(tensor).T if self.transposed else local(tensor)

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
        return None if gradient is None else exact_inner_product(local(gradient), local(self.parameter))

    def total(self, value: Tensor) -> Tensor:
        """The sum of a `value` over the ranks that hold different rows. A collective for sharded weights."""
        return sum_over_shards(value, self.parameter)

    def leakage(self) -> float:
        """||(W - W0) Q||_F / ||W0 Q||_F over all shards; 0 when nothing is protected."""
        anchor = self.anchor.float()
        with self.weight() as rows:
            moved = squared_norm(protected_part(rows - anchor, self.basis, self.kind))
        base = squared_norm(protected_part(anchor, self.basis, self.kind))
        both = self.total(torch.stack([moved, base])).double()
        return float((both[0] / both[1]).sqrt()) if both[0] > 0 else 0.0

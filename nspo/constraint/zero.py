"""The constraint under DeepSpeed ZeRO-2 and ZeRO-3, whose optimizer steps on flat fp32 partitions of the weights.

ZeRO steps a torch optimizer, one group of weights after another, and copies what that stepped to the model. So the
optimizer's own hooks serve here too: before its step each rank finds its averaged, clipped gradients on its flat
partition, after it the new masters. A partition cuts weights anywhere and a projection needs whole rows: each layer is
gathered alone, every rank projects its share of the rows, and the result goes back to the partitions.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nspo.constraint.layers import Layer
from nspo.models.structure.linears import whole_shape
from nspo.nullspace.projection import exact_inner_product


@dataclass
class Partition:
    """This rank's part of one weight: `count` values from `offset` in the flat master, from `start` in the weight."""

    flat: Tensor
    offset: int = 0
    start: int = 0
    count: int = 0

    def gather(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """The whole weight, or gradient, of which `flat` holds this rank's part. A collective."""
        everything = torch.zeros(shape.numel(), dtype=flat.dtype, device=flat.device)
        everything[self.start : self.start + self.count] = flat[self.offset : self.offset + self.count]
        dist.all_reduce(everything)
        return everything.view(shape)

    def scatter(self, everything: Tensor, flat: Tensor) -> None:
        """Write this rank's part of the whole weight to `flat`."""
        flat[self.offset : self.offset + self.count] = everything.view(-1)[self.start : self.start + self.count]


@dataclass
class ZeroLayer(Layer):
    """One constrained weight under ZeRO; anchor and rows are this rank's share of the rows."""

    partition: Partition

    def rows(self, tensor: Tensor) -> Tensor:
        """This rank's share of the rows of a whole weight-shaped tensor, sharing memory."""
        return own_rows(super().rows(tensor))

    @property
    def steps(self) -> bool:
        """As `Layer.steps`: only the group that ZeRO steps now has its gradients in place."""
        return self.partition.flat.grad is not None

    @contextmanager
    def gradient(self) -> Iterator[Tensor | None]:
        """As `Layer.gradient`; there is always one. A collective."""
        assert self.partition.flat.grad is not None, "ask while it steps"
        with self._gathered(self.partition.flat.grad) as rows:
            yield rows

    @contextmanager
    def stepped(self) -> Iterator[Tensor]:
        """As `Layer.stepped`, of the fp32 masters. A collective."""
        with self._gathered(self.partition.flat.detach()) as rows:
            yield rows

    @contextmanager
    def weight(self) -> Iterator[Tensor]:
        """As `Layer.weight`: under ZeRO-3 gathered for as long. A collective."""
        with whole(self.parameter):
            yield self.rows(self.parameter)

    def along_gradient(self) -> Tensor | None:
        """As `Layer.along_gradient`, of the fp32 masters on this rank's partition."""
        here = self.partition
        if here.flat.grad is None:
            return None
        mine = slice(here.offset, here.offset + here.count)
        return exact_inner_product(here.flat.grad[mine], here.flat.detach()[mine])

    def total(self, value: Tensor) -> Tensor:
        """The sum of a `value` over all ranks. A collective."""
        value = value.clone()
        dist.all_reduce(value)
        return value

    @contextmanager
    def _gathered(self, flat: Tensor) -> Iterator[Tensor]:
        """This rank's rows of what `flat` is a part of; what is written to them reaches every rank's partition."""
        everything = self.partition.gather(flat, whole_shape(self.parameter))
        rows = self.rows(everything).clone()
        yield rows
        everything.zero_()
        self.rows(everything).copy_(rows)
        dist.all_reduce(everything)
        self.partition.scatter(everything, flat)


def own_rows(rows: Tensor) -> Tensor:
    """This rank's share of the rows, sharing memory."""
    return rows.tensor_split(dist.get_world_size())[dist.get_rank()]


def whole(parameter: Tensor) -> AbstractContextManager[None]:
    """A context in which a parameter that ZeRO-3 has partitioned is whole on every rank, to read. A collective."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[None] = GatheredParameters([parameter])
    return context


def zero_optimizer(optimizer: Any) -> Any:
    """DeepSpeed's own optimizer inside accelerate's wrapper, or None for any other optimizer."""
    while optimizer is not None and not _of_deepspeed(optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def partitions(zero: Any) -> dict[int, Partition]:
    """Where this rank keeps its part of each trainable weight, by the weight's id."""
    found = {}
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3: every rank holds an equal stretch of every weight
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            for parameter in group:
                _, offset, length = zero.grad_position[zero.get_param_id(parameter)]
                start = length * dist.get_rank()
                count = max(0, min(length, parameter.ds_numel - start))  # less where the last stretch is padded
                found[id(parameter)] = Partition(flat, offset, start, count)
        return found
    for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        for parameter in group:  # ZeRO-2: every rank holds a stretch of all weights, strung together
            here = parameter._hp_mapping
            found[id(parameter)] = Partition(flat)
            if here is not None:
                master, weight = here.hp_fragment_address, here.lp_fragment_address
                found[id(parameter)] = Partition(flat, master.start, weight.start, weight.numel)
    return found


def _of_deepspeed(optimizer: Any) -> bool:
    return any(cls.__module__.startswith("deepspeed.runtime") for cls in type(optimizer).__mro__)

"""The anchor W0: the weights that a constraint is measured from, a layer at a time."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nspo.constraint.zero import whole
from nspo.errors import UserError
from nspo.models.structure.linears import Weight, find_weights, local, whole_shape


def own_weights(weights: Mapping[str, Weight]) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters by holder as they are now."""
    for holder, weight in weights.items():
        with whole(weight.parameter):
            yield holder, weight.parameter


def copied_weights(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the weights of `layers` by holder on the CPU, in bf16 where that loses nothing; for `given_weights`."""
    weights = holders(find_weights(model, layers))
    return {name: narrow(weight.parameter.detach().cpu().clone()) for name, weight in weights.items()}


def given_weights(anchor: Mapping[str, Tensor], weights: Mapping[str, Weight]) -> Iterator[tuple[str, Tensor]]:
    """The copies of `copied_weights` by holder, placed and sharded as the model's own weights are."""
    for name, weight in weights.items():
        yield name, _placed(anchor[name].to(torch.float32), weight.parameter)


def saved_weights(folder: Path, model: nn.Module, weights: Mapping[str, Weight]) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint of `model` by holder, one read at a time, placed and sharded as the model's own are.

    Raises:
        UserError: when the folder has no safetensors, lacks a weight, or has another shape for it.
    """
    from nspo.models.folders.weights import open_weights  # here: a constraint without a folder needs no transformers

    saved = open_weights(folder, model)
    for name, weight in weights.items():
        key, parameter = weight.key, weight.parameter
        if key not in saved.names:
            raise UserError(
                f"anchor {folder} has no weight {key}", expected="the base of this model", change="change `anchor`"
            )
        if saved.shape(key) != tuple(whole_shape(parameter)):
            raise UserError(
                f"anchor {folder} has {key} of shape {saved.shape(key)}, the model has "
                f"{tuple(whole_shape(parameter))}: change `anchor`"
            )
        yield name, _placed(saved.read(key), parameter)


def holders(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """One weight for every parameter, by the name of its holder: experts share one."""
    return {weight.holder: weight for weight in weights.values()}


def _placed(value: Tensor, weight: Tensor) -> Tensor:
    """`value` on the device of `weight`, and sharded as it is: every rank keeps its own rows, without communication."""
    value = value.to(local(weight).device)
    if isinstance(weight, DTensor):
        value = distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
    return value


def narrow(weight: Tensor) -> Tensor:
    """The same values in bf16 where that loses nothing (half the memory), else in float32."""
    small = weight.bfloat16()
    return small if torch.equal(small.to(weight.dtype), weight) else weight.float()

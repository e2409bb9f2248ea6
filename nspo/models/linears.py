"""The linear layers of a model by canonical name, through DDP, FSDP2 and torch.compile, and their sharded norms."""

import math
import re
from collections.abc import Iterable
from typing import Any

from torch import Size, Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from nspo.errors import UserError

_WRAPPERS = re.compile(
    r"^(module|base_model\.model)\.|(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def canonical_name(name: str) -> str:
    """The name a module or parameter has in the bare model, without what DDP, FSDP, torch.compile or PEFT add."""
    while (bare := _WRAPPERS.sub("", name)) != name:
        name = bare
    return name


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` keeps its weight as (input, output), as transformers' `Conv1D` (GPT-2) does."""
    return type(module).__name__ == "Conv1D"  # by name, so that bases load without importing transformers


def input_width(module: nn.Linear) -> int:
    """Width d of the input that a linear layer reads."""
    return whole_shape(module.weight)[0 if is_transposed(module) else 1]


def whole_shape(weight: Tensor) -> Size:
    """The shape of a weight over all ranks; DeepSpeed's ZeRO-3 leaves an empty tensor in its place."""
    return getattr(weight, "ds_shape", weight.shape)


def find_linears(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    """The linear modules with these canonical names, found through any wrappers.

    Raises:
        UserError: for a layer that is missing, is not linear, is wrapped by LoRA, is a stack of experts, is quantised,
            or has no data (meta).
    """
    # Any: a Conv1D passes for a Linear in the types, `is_transposed` tells them apart
    modules: dict[str, Any] = {canonical_name(name): module for name, module in model.named_modules()}
    found: dict[str, nn.Linear] = {}
    for name in names:
        module = modules.get(name)
        if module is None:
            raise UserError(f"the model has no layer {name}, the bases expect it: use the bases of this model")
        if hasattr(module, "base_layer"):
            raise UserError(
                f"layer {name} is wrapped by {type(module).__module__}.{type(module).__name__}, expected a plain "
                "linear layer: merge or unload the adapter first, or train nspo.null_space_adapter of the bare "
                "model, which needs no constrain()"
            )
        if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)):
            raise UserError(f"layer {name} holds fused 3-D experts, expected nn.Linear: leave it out of the bases")
        if not (isinstance(module, nn.Linear) or is_transposed(module)):
            raise UserError(f"layer {name} is a {type(module).__name__}, expected nn.Linear: leave it out of the bases")
        weight = module.weight
        if weight.is_meta:
            raise UserError(f"layer {name} has its weight on the meta device, expected data: load the weights first")
        plain = type(weight.data) in (Tensor, DTensor) and weight.is_floating_point() and weight.itemsize > 1
        if not plain or len(whole_shape(weight)) != 2:
            kind = f"{type(weight.data).__name__} {weight.dtype} of shape {tuple(weight.shape)}"
            raise UserError(
                f"layer {name} has a quantised or flattened weight ({kind}), expected a float matrix: "
                "load it unquantised"
            )
        found[name] = module
    return found


def layer_norms(model: nn.Module, names: Iterable[str]) -> dict[str, float]:
    """Frobenius norm of the weight of every named linear layer. Sharded weights are summed over ranks: call on all.

    Raises:
        UserError: as `find_linears`.
    """
    return {name: frobenius(module.weight) for name, module in find_linears(model, names).items()}


def frobenius(weight: Tensor) -> float:
    """||weight||_F in float32, over all shards of a DTensor."""
    return math.sqrt(sum_over_shards(local(weight).float().square().sum(dim=-1).sum(), weight).item())


def local(tensor: Tensor) -> Tensor:
    """The part of a (possibly sharded) tensor that this rank holds, detached, sharing memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_over_shards(value: Tensor, like: Tensor) -> Tensor:
    """Add up per-rank `value`s over the mesh dimensions that shard `like`; replicas count once.

    A collective when `like` is a DTensor: call it on every rank.
    """
    if not isinstance(like, DTensor):
        return value
    placements = [Replicate() if placement.is_replicate() else Partial() for placement in like.placements]
    return DTensor.from_local(value, like.device_mesh, placements, run_check=False).full_tensor()

"""The weights that a basis can constrain, by canonical name, through DDP, FSDP2 and torch.compile, and their norms.

Most are the weight of a linear layer and go by the layer's name. Experts lie together in one 3-D parameter: what reads
the input of the block (`gate_up_proj`, `up_proj`) goes by the parameter's name, because one basis serves all experts;
what reads an expert's own values (`down_proj`) by that name and the expert: `model.layers.0.mlp.experts.down_proj.17`.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nspo.errors import UserError

_WRAPPERS = re.compile(
    r"^(module|base_model\.model)\.|(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_EXPERTS = re.compile(r"(?P<module>.+)\.(?P<attribute>[A-Za-z_]\w*)(\.(?P<expert>\d+))?")


@dataclass(frozen=True)
class Weight:
    """A weight that reads one input, wherever its module keeps it.

    Attributes:
        holder: canonical name of the linear layer, or of the 3-D parameter, which experts share.
        module: the module.
        attribute: what the module calls the parameter.
        transposed: whether it is kept as (input, output), as Conv1D and gpt-oss do.
        expert: which expert of a 3-D parameter; None for all of them, and for a linear layer.
    """

    holder: str
    module: nn.Module
    attribute: str
    transposed: bool
    expert: int | None = None

    @property
    def parameter(self) -> Tensor:
        """The parameter as the module has it now."""
        found: Tensor = getattr(self.module, self.attribute)
        return found

    @property
    def key(self) -> str:
        """The parameter's canonical name."""
        return f"{self.holder}.weight" if self.attribute == "weight" else self.holder

    @property
    def bias(self) -> Tensor | None:
        """What the module adds to the output."""
        return getattr(self.module, "bias" if self.attribute == "weight" else f"{self.attribute}_bias", None)

    @property
    def experts(self) -> int:
        """How many experts the parameter holds; 0 for a linear layer."""
        shape = whole_shape(self.parameter)
        return shape[0] if len(shape) == 3 else 0

    @property
    def width(self) -> int:
        """Length d of the vectors that it reads."""
        return whole_shape(self.parameter)[-2 if self.transposed else -1]

    @property
    def size(self) -> int:
        """How many numbers it has, over all ranks."""
        shape = whole_shape(self.parameter)
        return shape.numel() if self.expert is None else shape[1:].numel()

    def rows(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor like the parameter, sharing memory: (out, d), of several experts (n, out, d).

        A rank that does not hold the one expert has no rows.
        """
        rows = local(tensor)
        if self.transposed:
            rows = rows.mT
        if self.expert is None:
            return rows
        here = self.expert - _first_row(tensor)
        return rows[here] if 0 <= here < len(rows) else rows.new_empty(0, rows.shape[-1])


def matrices(rows: Tensor) -> Sequence[Tensor]:
    """What `Weight.rows` gives as matrices (out, d), one after another: of several experts there may be many."""
    return rows.unbind() if rows.ndim == 3 else (rows,)


def canonical_name(name: str) -> str:
    """The name a module or parameter has in the bare model, without what DDP, FSDP, torch.compile or PEFT add."""
    while (bare := _WRAPPERS.sub("", name)) != name:
        name = bare
    return name


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` keeps its weight as (input, output), as transformers' `Conv1D` (GPT-2) does."""
    return type(module).__name__ == "Conv1D"  # by name, so that bases load without importing transformers


def whole_shape(weight: Tensor) -> Size:
    """The shape of a weight over all ranks; DeepSpeed's ZeRO-3 leaves an empty tensor in its place."""
    return getattr(weight, "ds_shape", weight.shape)


def locate(model: nn.Module, names: Iterable[str]) -> dict[str, Weight]:
    """Where the model keeps the weights with these canonical names, through any wrappers; values are not looked at.

    Raises:
        UserError: for a name that the model lacks, or that is no linear layer or is wrapped by LoRA; or when only some
            experts of a parameter are named, because the others cannot be frozen apart.
    """
    modules: dict[str, Any] = {canonical_name(name): module for name, module in model.named_modules()}
    found = {name: _locate(name, modules) for name in names}
    named: dict[str, int] = {}
    for weight in found.values():
        if weight.expert is not None:
            named[weight.holder] = named.get(weight.holder, 0) + 1
    for weight in found.values():
        if weight.expert is not None and named[weight.holder] != weight.experts:
            raise UserError(
                f"the bases hold {named[weight.holder]} of the {weight.experts} experts of {weight.holder}",
                expected="all",
                change="they are one parameter, and the others would move freely",
            )
    return found


def _locate(name: str, modules: dict[str, Any]) -> Weight:
    module = modules.get(name)
    if module is None and (match := _EXPERTS.fullmatch(name)):
        owner: Any = modules.get(match["module"])
        attribute = match["attribute"]
        parameter = None if owner is None else owner._parameters.get(attribute)
        if parameter is not None and len(whole_shape(parameter)) == 3:
            expert = None if match["expert"] is None else int(match["expert"])
            if expert is None or expert < whole_shape(parameter)[0]:
                holder = f"{match['module']}.{attribute}"
                return Weight(holder, owner, attribute, bool(getattr(owner, "is_transposed", False)), expert)
        module = owner if hasattr(owner, "base_layer") else None
    if module is None:
        raise UserError(f"the model has no layer {name}, the bases expect it: use the bases of this model")
    if hasattr(module, "base_layer"):
        raise UserError(
            f"layer {name} is wrapped by {type(module).__module__}.{type(module).__name__}",
            expected="a plain linear layer",
            change=(
                "merge or unload the adapter first, or train nspo.null_space_adapter of the bare "
                "model, which needs no constrain()"
            ),
        )
    if not (isinstance(module, nn.Linear) or is_transposed(module)):
        raise UserError(
            f"layer {name} is a {type(module).__name__}", expected="nn.Linear", change="leave it out of the bases"
        )
    return Weight(name, module, "weight", is_transposed(module))


def find_weights(model: nn.Module, names: Iterable[str]) -> dict[str, Weight]:
    """The weights with these canonical names, checked to hold what can be constrained.

    Raises:
        UserError: as `locate`, or for a weight that is quantised or has no data (meta).
    """
    found = locate(model, names)
    for name, weight in found.items():
        parameter = weight.parameter
        if parameter.is_meta:
            raise UserError(
                f"layer {name} has its weight on the meta device", expected="data", change="load the weights first"
            )
        plain = type(parameter.data) in (Tensor, DTensor) and parameter.is_floating_point() and parameter.itemsize > 1
        if not plain or len(whole_shape(parameter)) not in (2, 3):
            kind = f"{type(parameter.data).__name__} {parameter.dtype} of shape {tuple(parameter.shape)}"
            raise UserError(
                f"layer {name} has a quantised or flattened weight ({kind})",
                expected="a float matrix",
                change="load it unquantised",
            )
    return found


def layer_norms(model: nn.Module, names: Iterable[str]) -> dict[str, float]:
    """Frobenius norm of every named weight. Sharded weights are summed over ranks: call on all.

    Raises:
        UserError: as `find_weights`.
    """
    return {name: frobenius(weight, weight.parameter) for name, weight in find_weights(model, names).items()}


def frobenius(weight: Weight, value: Tensor) -> float:
    """The Frobenius norm of a `value` of the weight's parameter in float32, over all shards of a DTensor."""
    return math.sqrt(sum_over_shards(weight.rows(value).float().square().sum(dim=-1).sum(), value).item())


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


def _first_row(tensor: Tensor) -> int:
    """The index, among all rows, of the first that this rank holds."""
    if not isinstance(tensor, DTensor):
        return 0
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1][0]

"""Refusals: where the guarantee of the constraint would not hold, training stops before it starts, in one line."""

import re
from collections.abc import Container, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from nspo.errors import UserError
from nspo.models.structure.linears import Weight, canonical_name

_UNSUPPORTED_OPTIMIZERS = re.compile(r"schedulefree|lomo|layerwise", re.IGNORECASE)


def refuse_engines(model: nn.Module, optimizer: Any, zero: Any = None) -> None:
    """Refuse wrappers and optimizers whose writes to the weights nobody could follow or correct.

    Args:
        zero: DeepSpeed's own optimizer around `optimizer`, where there is one.

    Raises:
        UserError: DeepSpeed without `zero`, or with one that `refuse_zero` refuses, FSDP1, no torch optimizer, or one
            that steps on sparse gradients or outside `step()`.
    """
    if zero is not None:
        refuse_zero(zero)
    origins = [f"{cls.__module__}.{cls.__name__}".lower() for it in (model, optimizer) for cls in type(it).__mro__]
    of_deepspeed = any("deepspeed" in origin for origin in origins)
    if zero is None and (of_deepspeed or any(hasattr(p, "ds_id") for p in model.parameters())):
        raise UserError(
            "the model or optimizer belongs to DeepSpeed, which steps on flat partitions: pass the optimizer that "
            "deepspeed.initialize (or accelerate) returned, with zero_stage 2 or 3"
        )
    flat = any(type(parameter).__name__ == "FlatParameter" for parameter in model.parameters())
    if flat or any(cls.__name__ == "FullyShardedDataParallel" for m in model.modules() for cls in type(m).__mro__):
        raise UserError(
            "the model is wrapped in FSDP1, which discards writes to its weights: use FSDP2 (`fully_shard`, "
            "fsdp_version: 2)"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            f"optimizer is a {type(optimizer).__name__}",
            expected="a torch.optim.Optimizer",
            change="pass the optimizer itself",
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError(
            "optimizer SparseAdam takes sparse gradients, those of linear layers are dense: use Adam or AdamW instead"
        )
    averaged = any("train_mode" in group for group in optimizer.param_groups)  # the mark of schedule-free optimizers
    if averaged or _UNSUPPORTED_OPTIMIZERS.search(type(optimizer).__name__):
        raise UserError(
            f"optimizer {type(optimizer).__name__} does not do all its writing in step(): use AdamW, SGD or another "
            "optimizer that does (no schedule-free, LOMO or layer-wise optimizers)"
        )


def refuse_zero(zero: Any) -> None:
    """Refuse all that DeepSpeed does but ZeRO-2 and ZeRO-3 on float32 weights that stay on the GPUs.

    Raises:
        UserError: another stage, weights in 16 bits, quantised or kept twice, offloading, or processes left out.
    """
    name, settings = type(zero).__name__, vars(zero)
    if name not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"):
        raise UserError(f"DeepSpeed steps with {name}", expected="ZeRO stage 2 or 3 (zero_stage)")
    if not settings.get("partition_gradients", True):
        raise UserError("DeepSpeed runs ZeRO stage 1", expected="stage 2 or 3 (zero_stage)")
    if any(settings.get(key) for key in ("cpu_offload", "offload_optimizer", "offload_param")):
        raise UserError(
            "DeepSpeed offloads weights or optimizer", expected="all on the GPUs", change="set their device to none"
        )
    if zero.dtype != torch.float32:
        raise UserError(
            f"DeepSpeed rounds its masters to {str(zero.dtype).removeprefix('torch.')} weights, "
            "which leaves the null space",
            expected='float32: turn its bf16 and fp16 off (mixed_precision: "no"), autocast gives speed',
        )
    quantised = getattr(settings.get("parameter_offload"), "zero_quantized_weights", False)
    if quantised or settings.get("zero_hpz_partition_size", 1) > 1:
        raise UserError(
            "DeepSpeed computes with copies of its masters (ZeRO++)",
            expected="the masters",
            change="leave zero_quantized_weights and zero_hpz_partition_size out",
        )
    if dist.get_world_size(zero.dp_process_group) != dist.get_world_size():
        raise UserError("DeepSpeed shares out among a part of the processes", expected="data parallelism over all")


def refuse_late_freeze(model: nn.Module, weights: Mapping[str, Weight], zero: Any = None) -> None:
    """Refuse to freeze what DDP, or DeepSpeed's `zero`, already expects gradients of.

    Args:
        weights: the constrained weights by name.

    Raises:
        UserError: other trainable parameters inside `DistributedDataParallel` or DeepSpeed.
    """
    covered = {id(weight.parameter) for weight in weights.values()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]
    replicas = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())
    if trainable and (replicas or zero is not None):
        engine = "DDP" if replicas else "DeepSpeed"
        raise UserError(
            f"{len(trainable)} parameters outside the bases are trainable under {engine}, which cannot freeze them "
            "now: call nspo.freeze_uncovered(model, bases) before wrapping, or pass "
            "freeze_rest=False"
        )


def refuse_weights(
    model: nn.Module, weights: Mapping[str, Weight], held: Container[int], freeze_rest: bool, zero: Any = None
) -> None:
    """Refuse constrained `weights`, by name, that could not be kept in place or exact.

    Args:
        held: the ids of the parameters that the optimizer steps.
        zero: DeepSpeed's own optimizer, where there is one.

    Raises:
        UserError: a weight that is shared, not float32, frozen, sharded by columns or unknown to the optimizer, a bias
            that stays trainable, or experts under DeepSpeed or cut through by the sharding.
    """
    names: dict[int, list[str]] = {}
    for full, own in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(own), []).append(canonical_name(full))
    for name, weight in weights.items():
        parameter, bias = weight.parameter, weight.bias
        others = sorted({other for other in names.get(id(parameter), []) if other != weight.key})
        if others:
            raise UserError(
                f"layer {name} shares its weight with {others[0]}",
                expected="its own",
                change="untie them or leave it out",
            )
        if parameter.dtype != torch.float32:
            raise UserError(
                f"layer {name} has {str(parameter.dtype).removeprefix('torch.')} weights",
                expected="float32 master weights",
                change="load the model in float32 and use autocast (bf16=True) for speed",
            )
        if not parameter.requires_grad:
            raise UserError(
                f"layer {name} is frozen",
                expected="a trainable weight",
                change="unfreeze it or leave it out of the bases",
            )
        if zero is not None and weight.experts:
            raise UserError(
                f"layer {name} is in a 3-D parameter of {weight.experts} experts, which DeepSpeed would gather for "
                "each: use FSDP2 (`fully_shard`, fsdp_version: 2), or leave the experts out of the bases"
            )
        if isinstance(parameter, DTensor):
            _refuse_sharding(name, weight, parameter)
        if id(parameter) not in held:
            raise UserError(
                f"the optimizer does not hold the weight of layer {name}: build it from the prepared model's parameters"
            )
        if bias is not None and bias.requires_grad and not freeze_rest:
            raise UserError(
                f"layer {name} has a trainable bias, which no basis can constrain: freeze it or pass freeze_rest=True"
            )


def _refuse_sharding(name: str, weight: Weight, parameter: DTensor) -> None:
    for dim, placement in enumerate(parameter.placements):
        if parameter.device_mesh.size(dim) == 1 or placement.is_replicate():
            continue
        if weight.experts and not placement.is_shard(0):
            raise UserError(
                f"layer {name} is sharded as {placement} through its experts",
                expected="whole experts per rank",
                change="shard dimension 0 (the default of fully_shard) or replicate",
            )
        if (placement.is_shard(0 if weight.transposed else 1) and not weight.experts) or placement.is_partial():
            raise UserError(
                f"layer {name} is sharded as {placement} on its input dimension",
                expected="whole rows per rank",
                change="shard the output dimension (the default of fully_shard) or replicate",
            )

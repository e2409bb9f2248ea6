"""How the processes of a run split the model: checked before training, and undone where the policy is saved.

Nothing here is set for one process or plain replicas (DDP). The accelerate configurations are in `config/accelerate`.
"""

from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer

from nspo.constraint.zero import whole
from nspo.errors import UserError
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import TrainingSettings

ZERO = ("zero2", "zero3")  # of policy.sharding: DeepSpeed
WHOLE_ONLY = ("after", "lora", "adapter", "ogpsa")  # constraints that read or write whole weights


def check_processes(training: TrainingSettings, method: MethodSettings, processes: PartialState) -> None:
    """Refuse a run that was started with another number of processes than its settings say, or cannot share its pairs.

    Raises:
        UserError: saying how to start it, or which key to change.
    """
    if processes.num_processes != training.processes:
        raise UserError(
            f"{processes.num_processes} processes run",
            expected=f"the {training.processes} of policy.processes",
            change=f"start the stage with `accelerate launch --multi_gpu --num_processes {training.processes} -m nspo "
            "train-policy ...`",
        )
    if training.sharding != "none" and (method.pulls or method.constraint.kind in WHOLE_ONLY):
        raise UserError(
            f"policy.sharding is {training.sharding!r}, but {method.title} needs whole weights on every process",
            expected="'none'",
        )
    if method.loss.on_pairs and training.pairs_per_update % training.processes:
        raise UserError(
            f"minibatch_size / group_size ({training.pairs_per_update} pairs per update) must be divisible by "
            f"policy.processes ({training.processes}) for the loss {method.loss.kind!r}: raise policy.minibatch_size"
        )


def engine_of(accelerator: Accelerator) -> str:
    """What accelerate really does: a value of `policy.sharding`, or the name of what nspo does not run."""
    kind, parallel = accelerator.distributed_type, accelerator.parallelism_config
    if parallel is not None and parallel.non_data_parallel_size > 1:
        return "tensor or context parallelism"
    if kind == DistributedType.FSDP:
        return "fsdp2" if accelerator.is_fsdp2 else "FSDP1"
    if kind == DistributedType.DEEPSPEED:
        return f"zero{accelerator.deepspeed_plugin.zero_stage}"
    replicas = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    return "none" if kind in replicas else kind.value


def prepare_engine(trainer: Trainer, sharding: str, autocast: str) -> None:
    """Check that the trainer shards as `policy.sharding` says, and have it compute what unsharded training computes.

    Raises:
        UserError: another engine, or none: accelerate ignores sharding on the CPU.
    """
    found = engine_of(trainer.accelerator)
    if found != sharding:
        told = "replicas" if sharding == "none" else f"`--config_file config/accelerate/{sharding}.yaml`, on GPUs"
        raise UserError(
            f"policy.sharding is {sharding!r}, but accelerate runs {found!r}",
            expected=f"{told}, or another policy.sharding (none, fsdp2, zero2 or zero3)",
        )
    model: Any = trainer.model
    if sharding == "fsdp2":
        # fp32 weights are gathered and autocast rounds, as without sharding: FSDP's own bf16 would blur the probes.
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        # Else transformers does not know accelerate's FSDP2, and a rank whose answers end early stops the others.
        model._is_fsdp_managed_module = True
    if sharding in ZERO and autocast == "bf16":
        # Weights stay float32 and the model itself autocasts, as accelerate has it without DeepSpeed.
        model.forward = convert_outputs_to_fp32(torch.autocast(model.device.type, torch.bfloat16)(model.forward))


def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    """The trained float32 weights by name, whole on the main process, tied ones once. A collective if sharded."""
    model: Any = trainer.model
    if engine_of(trainer.accelerator) in ZERO:
        return _whole_of_zero(model, trainer.accelerator.is_main_process)
    state: dict[str, Tensor] = trainer.accelerator.get_state_dict(model)
    return {name: value for name, value in state.items() if name not in model.all_tied_weights_keys}


def _whole_of_zero(model: Any, keep: bool) -> dict[str, Tensor]:
    """As `whole_weights`, a weight at a time: accelerate would gather ZeRO-3's in 16 bits."""
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in model.all_tied_weights_keys:
            with whole(value):
                if keep:
                    state[name] = value.detach().cpu().clone()
    return state

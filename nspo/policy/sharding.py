"""How the processes of a run split the model: checked before training, and undone where the policy is saved.

Nothing here is set for one process or plain replicas (DDP). The accelerate configurations are in `config/accelerate`.
"""

from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer

from nspo.errors import UserError
from nspo.policy_settings import MethodSettings, TrainingSettings


def check_processes(training: TrainingSettings, method: MethodSettings, processes: PartialState) -> None:
    """Refuse a run that was started with another number of processes than its settings say, or cannot share its pairs.

    Raises:
        UserError: saying how to start it, or which key to change.
    """
    if processes.num_processes != training.processes:
        raise UserError(
            f"policy.processes is {training.processes}, but {processes.num_processes} of them run: start the stage "
            f"with `accelerate launch --multi_gpu --num_processes {training.processes} -m nspo train-policy ...`"
        )
    if method.preference and training.pairs_per_update % training.processes:
        raise UserError(
            f"minibatch_size / group_size ({training.pairs_per_update} pairs per update) must be divisible by "
            f"policy.processes ({training.processes}) for objective {method.objective!r}: raise policy.minibatch_size"
        )


def engine_of(accelerator: Accelerator) -> str:
    """What accelerate really does: none, fsdp1, fsdp2, zero1 to zero3, or its own name for anything else."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return "fsdp2" if accelerator.is_fsdp2 else "fsdp1"
    replicas = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    return "none" if kind in replicas else kind.value.lower()


def prepare_engine(trainer: Trainer, sharding: str) -> None:
    """Check that the trainer shards as `policy.sharding` says, and have it compute what unsharded training computes.

    Raises:
        UserError: another engine, or none: accelerate ignores FSDP on the CPU.
    """
    found = engine_of(trainer.accelerator)
    if found != sharding:
        raise UserError(
            f"policy.sharding is {sharding!r}, but accelerate runs {found!r}: start the stage with `accelerate launch "
            f"--config_file config/accelerate/{sharding}.yaml` on GPUs, or change policy.sharding"
        )
    if sharding == "fsdp2":
        # fp32 weights are gathered and autocast rounds, as without sharding: FSDP's own bf16 would blur the probes.
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        # Else transformers does not know accelerate's FSDP2, and a rank whose answers end early stops the others.
        model: Any = trainer.model
        model._is_fsdp_managed_module = True


def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    """The trained float32 weights by name, whole on the main process. A collective where they are sharded."""
    state: dict[str, Tensor] = trainer.accelerator.get_state_dict(trainer.model)
    return state

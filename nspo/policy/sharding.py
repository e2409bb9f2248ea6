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
    """What accelerate really does: "none" (one process or replicas), "fsdp2", or the name of what nspo does not run."""
    kind, parallel = accelerator.distributed_type, accelerator.parallelism_config
    if parallel is not None and parallel.non_data_parallel_size > 1:
        return "tensor or context parallelism"
    if kind == DistributedType.FSDP:
        return "fsdp2" if accelerator.is_fsdp2 else "FSDP1"
    replicas = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    return "none" if kind in replicas else kind.value


def prepare_engine(trainer: Trainer, sharding: str) -> None:
    """Check that the trainer shards as `policy.sharding` says, and have it compute what unsharded training computes.

    Raises:
        UserError: another engine, or none: accelerate ignores FSDP on the CPU.
    """
    found = engine_of(trainer.accelerator)
    if found != sharding:
        raise UserError(
            f"policy.sharding is {sharding!r}, but accelerate runs {found!r}: expected "
            + ("`--config_file config/accelerate/fsdp2.yaml`, on GPUs" if sharding == "fsdp2" else "replicas")
            + ", or another policy.sharding (none or fsdp2)"
        )
    if sharding == "fsdp2":
        # fp32 weights are gathered and autocast rounds, as without sharding: FSDP's own bf16 would blur the probes.
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        # Else transformers does not know accelerate's FSDP2, and a rank whose answers end early stops the others.
        model: Any = trainer.model
        model._is_fsdp_managed_module = True


def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    """The trained float32 weights by name, whole on the main process, tied ones once. A collective if sharded."""
    model: Any = trainer.model
    state: dict[str, Tensor] = trainer.accelerator.get_state_dict(model)
    return {name: value for name, value in state.items() if name not in model.all_tied_weights_keys}

"""What every trainer is told alike, so that methods differ in their objective only."""

from pathlib import Path
from typing import Any

import torch

from nspo.policy.sharding import ZERO
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.runtime import RuntimeSettings


def shared_arguments(
    training: TrainingSettings,
    method: MethodSettings,
    seed: int,
    device: torch.device,
    work: Path,
    runtime: RuntimeSettings,
) -> dict[str, Any]:
    """Fields of transformers' `TrainingArguments`: optimizer, length, arithmetic, logging."""
    return {
        "output_dir": str(work),
        "seed": seed,
        "max_steps": training.steps * training.updates_per_step,
        "learning_rate": method.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "use_cpu": device.type == "cpu",
        "gradient_checkpointing": runtime.recompute_activations,
        "bf16": training.autocast == "bf16" and training.sharding not in ZERO,  # to DeepSpeed: weights in bf16
        "fp16": False,
        "logging_steps": 1,
        "logging_strategy": "steps",
        "save_strategy": "no",
        "save_total_limit": 1,
        "report_to": "none",  # trackers are given as callbacks, after ours (`nspo.policy.trackers`)
        "project": "nspo",
        "run_name": work.name,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "ddp_find_unused_parameters": False,
    }

"""Rollouts by vLLM (`policy.rollout: vllm`), inside the training processes or at a server: what TRL is told about it.

vLLM computes with other kernels, in bf16, so the policy that sampled an answer is not to the last digit the policy that
is trained. With mu the sampler's and pi_old the trainer's probability of a token, each token's loss is weighted by
min(pi_old / mu, 3), held constant: truncated importance sampling (the release's configuration of verl has none). Per
token, because the ratio of a whole answer multiplies the rounding of hundreds of tokens. Everything else, the
constraint among it, is as with transformers: vLLM only reads the weights, before it answers.

The answers of a seed differ from those of transformers, and an interrupted run resumes with other answers than the
uninterrupted one would have sampled: vLLM's random numbers are its own.
"""

from typing import Any

import torch
from transformers import Trainer

from nspo.errors import UserError
from nspo.models.vllm_engine import check_engine
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.runtime import VLLMSettings

RATIO_LIMIT = 3.0


def check_rollout(training: TrainingSettings, vllm: VLLMSettings, device: torch.device, processes: int) -> None:
    """Refuse vLLM where it cannot run, before anything is loaded.

    Raises:
        UserError: the package or the GPU is missing, or the processes cannot share it out.
    """
    if training.rollout != "vllm":
        return
    if device.type != "cuda":
        raise UserError(
            f"policy.rollout is 'vllm', but the stage runs on {device.type}",
            expected=(
                "an NVIDIA GPU (vLLM's CPU build packs its weights and takes no new ones): set "
                "policy.rollout: transformers"
            ),
        )
    check_engine("policy.rollout", training.rollout, device)
    if vllm.server is None and processes % vllm.tensor_parallel:
        raise UserError(
            f"runtime.vllm.tensor_parallel is {vllm.tensor_parallel}",
            expected=f"a divisor of the {processes} training processes",
            change="change it",
        )


def vllm_arguments(training: TrainingSettings, vllm: VLLMSettings) -> dict[str, Any]:
    """Fields of TRL's `GRPOConfig` about who samples the answers, all written out."""
    return {
        "use_vllm": training.rollout == "vllm",
        "vllm_mode": "colocate" if vllm.server is None else "server",
        "vllm_server_base_url": vllm.server,
        "vllm_gpu_memory_utilization": vllm.gpu_memory,
        "vllm_tensor_parallel_size": vllm.tensor_parallel,
        "vllm_max_model_length": training.max_prompt_tokens + training.max_new_tokens,
        "vllm_model_impl": "vllm",
        "vllm_enable_sleep_mode": False,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": RATIO_LIMIT,
        "vllm_importance_sampling_clip_min": None,
    }


def end_rollouts(trainer: Trainer) -> None:
    """Stop a vLLM inside this process while the process group that it shares still stands."""
    generation = getattr(trainer, "vllm_generation", None)
    if generation is not None and generation.mode == "colocate":
        generation.llm.llm_engine.engine_core.shutdown()

"""Greedy answers by vLLM (`evaluation.engine: vllm`, `benchmarks.engine: vllm`), on NVIDIA GPUs or by its CPU build.

vLLM computes with other kernels and another order of sums, so where two tokens are nearly as likely its answer may be
another than that of transformers. Which of the two answered is therefore a setting that every file records, not a
matter of `runtime`, and a model is never compared with a base that the other one answered for.

Prompts go in as token ids, so no special token is added a second time; the stop tokens are those of `generate`. The
weights keep the number type that the stage loads them in: vLLM's own choice would round fp32 to 16 bits, and so lose
what a small learning rate changed. vLLM makes its own batches, so `batch_size` is for transformers; answers come
`CHUNK` prompts at a time, which is the most that an interruption loses.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.errors import UserError, first_line
from nspo.models.generation import Generate, Ids, by_length, ended, generate, stop_ids
from nspo.run.progress import track
from nspo.settings.runtime import VLLMSettings
from nspo.settings.types import Engine

CHUNK = 512


def check_engine(key: str, engine: Engine, device: torch.device) -> None:
    """Refuse vLLM, where the setting `key` asks for it, on a machine where it cannot run.

    Raises:
        UserError: the package is missing, or was built for another device than the stage runs on.
    """
    if engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"{key} is 'vllm', but the package vllm is not installed: pip install -r requirements-vllm.lock on a "
            f"machine with an NVIDIA GPU, or set {key}: transformers"
        )
    if (found := vllm_device()) != device.type:
        raise UserError(
            f"{key} is 'vllm', but the stage runs on {device.type} and the installed vllm on {found}: "
            f"set {key}: transformers, or runtime.device"
        )


def vllm_device() -> str:
    """The type of device that the installed vLLM would compute on here: `cuda`, `cpu`, ... or `no device`."""
    from vllm.platforms import current_platform

    return current_platform.device_type or "no device"


@contextmanager
def answering(
    engine: Engine, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vllm: VLLMSettings
) -> Iterator[Generate]:
    """What answers prompts greedily: `model` itself, or vLLM with the same weights until the block ends.

    Args:
        folder: where `model` was loaded from.
    """
    if engine == "transformers":
        yield partial(generate, model, tokenizer)
        return
    with closing(_VLLM(engine_arguments(folder, model.dtype, vllm), stop_ids(model, tokenizer))) as served:
        yield served.generate


def engine_arguments(folder: Path, dtype: torch.dtype, vllm: VLLMSettings) -> dict[str, Any]:
    """What vLLM's `LLM` is told: the longest context that fits (-1), and the number type instead of its own choice."""
    return {
        "model": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": -1,
        "gpu_memory_utilization": vllm.gpu_memory,
        "tensor_parallel_size": vllm.tensor_parallel,
        "generation_config": "vllm",  # not the folder's own
        "seed": 0,
    }


def sampling_arguments(max_new_tokens: int, stops: Sequence[int]) -> dict[str, Any]:
    """What vLLM's `SamplingParams` are told: greedy, ended by `stops`, ids without text."""
    return {
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": max_new_tokens,
        "stop_token_ids": list(stops),
        "detokenize": False,
    }


class _VLLM:
    """vLLM's engine, started by the first prompt that it is asked."""

    def __init__(self, arguments: dict[str, Any], stops: Sequence[int]) -> None:
        self.arguments, self.stops = arguments, stops
        self.started: Any = None

    def generate(
        self, prompts: Sequence[Ids], max_new_tokens: int, _batch_size: int, description: str
    ) -> Iterator[tuple[int, list[int]]]:
        """See `nspo.models.generation.generate`.

        Raises:
            UserError: vLLM cannot start, or has no room for the longest prompt and its answer.
        """
        order = by_length(list(map(len, prompts)))
        if not order:
            return
        from vllm import SamplingParams, TokensPrompt

        engine = self._engine()
        longest, room = len(prompts[order[-1]]) + max_new_tokens, engine.model_config.max_model_len
        if longest > room:
            raise UserError(
                f"{description}: the longest prompt and its answer take {longest} tokens, vLLM has room for {room}: "
                "raise runtime.vllm.gpu_memory or lower max_new_tokens"
            )
        sampling = SamplingParams(**sampling_arguments(max_new_tokens, self.stops))
        with track(description, len(prompts), "prompt") as bar:
            for start in range(0, len(order), CHUNK):
                batch = order[start : start + CHUNK]
                asked = [TokensPrompt(prompt_token_ids=list(prompts[i])) for i in batch]
                for index, answered in zip(batch, engine.generate(asked, sampling, use_tqdm=False), strict=True):
                    yield index, ended(answered.outputs[0].token_ids, self.stops)
                bar.update(len(batch))

    def close(self) -> None:
        """End the engine's processes and give its memory back."""
        if self.started is not None:
            self.started.llm_engine.engine_core.shutdown()

    def _engine(self) -> Any:
        if self.started is None:
            from vllm import LLM

            try:
                self.started = LLM(**self.arguments)
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"vLLM cannot start on {self.arguments['model']}: {first_line(error)} (its own log says more; "
                    "runtime.vllm.gpu_memory is the share of each GPU that it may take)"
                ) from error
        return self.started

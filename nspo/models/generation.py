"""Answers to tokenised prompts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nspo.errors import UserError
from nspo.run.progress import track

Ids = Sequence[int]
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# (tokenised prompts, tokens per answer, prompts per batch, description) to greedy answers, as `generate` yields them
Generate = Callable[[Sequence[Ids], int, int, str], Iterator[tuple[int, list[int]]]]


def pad_left(rows: Sequence[Ids], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Ids (B, T) int64 padded on the left, and their mask (B, T) int64 with 1 for real tokens."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def plain_generation(model: PreTrainedModel) -> GenerationConfig:
    """A model's generation settings without what its folder says of sampling: only the special tokens are left.

    transformers and TRL fill in from there whatever a call leaves open: beams, penalties, `min_p`, tokens that are
    suppressed or forced. Here it is the configuration that says how answers are made.
    """
    return GenerationConfig(**{name: getattr(model.generation_config, name) for name in SPECIAL_TOKENS})


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token id that ends an answer, by the model's generation settings and its tokenizer.

    Raises:
        UserError: when there is none that the model can say.
    """
    eos = model.generation_config.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    said = model.config.get_text_config().vocab_size
    if not (stops := sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None and 0 <= i < said})):
        raise UserError(
            f"the model has no stop token among its {said} tokens, so none of its answers would end",
            expected="eos_token_id in its generation_config.json, or eos_token in its tokenizer_config.json",
        )
    return stops


def by_length(lengths: Sequence[int]) -> list[int]:
    """The places of sequences of these lengths, shortest first."""
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The places of sequences of these lengths, shortest first, in batches of at most `batch_size`.

    No sequence of a batch is more than twice as long as another: less than half of a batch is padding.
    """
    found: list[list[int]] = []
    for place in by_length(lengths):
        if not found or len(found[-1]) == batch_size or lengths[place] > 2 * lengths[found[-1][0]]:
            found.append([])
        found[-1].append(place)
    return found


def ended(answer: Ids, stops: Sequence[int]) -> list[int]:
    """An answer up to and including its first stop token."""
    return list(answer[: next((n + 1 for n, token in enumerate(answer) if token in stops), len(answer))])


def refuse_unknown(ids: Ids, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, what: str) -> None:
    """Refuse a text with a token for which the model has no row, as when a tokenizer got tokens and the model did not.

    Raises:
        UserError: naming the token.
    """
    rows = config.get_text_config().vocab_size
    if (largest := max(ids, default=0)) >= rows:
        raise UserError(
            f"{what}: a text holds the token {tokenizer.decode([largest])!r} ({largest}), but the model knows {rows} "
            "tokens: take the tokenizer that belongs to it, or the token out of the text or the chat template"
        )


@torch.no_grad()  # no inference mode: FSDP2 keeps its buffers for training
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    batch_size: int,
    description: str,
    temperature: float = 0.0,
) -> Iterator[tuple[int, list[int]]]:
    """Answers to tokenised prompts, batched by length; shows progress under `description`.

    What the model's own generation settings ask for, such as a penalty on repetition (Qwen2.5's do), is left out.

    Args:
        temperature: of plain sampling from torch's generator; 0 is greedy.

    Yields:
        (index into `prompts`, answer ids up to and including the first stop token), in order of prompt length.
    """
    for prompt in prompts:
        refuse_unknown(prompt, tokenizer, model.config, description)
    with track(description, len(prompts), "prompt") as bar:
        for batch in batches(list(map(len, prompts)), batch_size):
            ids, mask = pad_left([prompts[i] for i in batch], tokenizer.pad_token_id, model.device)
            inputs = {"input_ids": ids, "attention_mask": mask}
            yield from zip(batch, answers(model, tokenizer, inputs, max_new_tokens, temperature), strict=True)
            bar.update(len(batch))


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[list[int]]:
    """The answer to every row of one batch of inputs, `input_ids` (B, T) among them, as `generate` yields it."""
    stops = stop_ids(model, tokenizer)
    generator: Any = model  # the type PreTrainedModel does not declare generate
    given, model.generation_config = model.generation_config, plain_generation(model)
    try:
        output = generator.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=0 if temperature > 0 else None,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
    finally:
        model.generation_config = given
    return [ended(row, stops) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]

"""How far a tuned model has drifted from its base, token by token on the base model's own answers (teacher forced).

Four figures per prompt, from float32 log-softmax: KL(base || tuned) in nats per answer token, the same over the first
answer tokens (where a refusal is decided, and to which the mean over all tokens is nearly blind), the change of the
answer's negative log-likelihood, and the share of tokens on which both models' first choice agrees. Every answer token
counts, the closing stop token too; prompt and padding never do.

Both models run side by side on the same batch, so logits need not be stored (`Remembered` stores the base's, where it
is compared with again and again); only those at answer positions are computed.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.errors import UserError
from nspo.models.generation import batches, pad_left
from nspo.run.progress import track

LOGITS_BUDGET = 2**25  # logits of one model held at a time: 128 MiB in float32
FIGURES = ("kl_per_token", "kl_first_tokens", "nll_change", "top1_agreement")


def token_drift(base_logits: Tensor, tuned_logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What changed at each answer token.

    Args:
        base_logits, tuned_logits: (T, V), any float dtype, at the positions that predict `targets`.
        targets: (T,) int64, the base model's answer.

    Returns:
        (KL(base || tuned) in nats (T,) float32, change of -log p(target) in nats (T,) float32, whether the most likely
        token is the same (T,) bool).
    """
    base, tuned = base_logits.float().log_softmax(-1), tuned_logits.float().log_softmax(-1)
    kl = (base.exp() * (base - tuned)).sum(-1)
    at = targets[:, None]
    nll_change = (base.gather(-1, at) - tuned.gather(-1, at)).squeeze(-1)
    return kl, nll_change, base_logits.argmax(-1) == tuned_logits.argmax(-1)


class Remembered:
    """A base model that answers a batch it has seen from memory, for drift that is measured many times.

    Logits wait in main memory. Once every batch was seen, `release` lets the model itself go.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: PreTrainedModel | None = model
        self.device, self.config = model.device, model.config
        self.seen: dict[bytes, Tensor] = {}

    def __call__(self, input_ids: Tensor, **options: Any) -> SimpleNamespace:
        """The model's logits, computed once per batch of ids."""
        key = input_ids.cpu().numpy().tobytes()
        if key not in self.seen:
            if self.model is None:
                raise LookupError("a batch that was not seen before the model was released")
            self.seen[key] = self.model(input_ids=input_ids, **options).logits.cpu()
        return SimpleNamespace(logits=self.seen[key].to(self.device))

    def release(self) -> None:
        """Let the model go, and its memory with it; from now on only batches that were seen are answered."""
        self.model = None


@torch.no_grad()  # no inference mode: FSDP2 keeps its buffers for training
def drift(
    base: PreTrainedModel | Remembered,
    tuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[Sequence[int]],
    first_tokens: int,
    batch_size: int,
    description: str = "drift",
) -> dict[str, list[float]]:
    """Drift of `tuned` from `base` on given answers; shows progress under `description`.

    Neither batch size nor padding changes a figure (beyond float32 rounding). Put both models in evaluation mode first.

    Args:
        prompt_ids, answer_ids: token ids per prompt, and of the base model's greedy answer to it (at least one token).
        first_tokens: how many leading answer tokens count for `kl_first_tokens` (fewer in shorter answers).
        batch_size: most prompts per forward pass; long answers take fewer, so that memory stays bounded.

    Returns:
        One value per prompt, in the given order, under each name of `FIGURES`. Means are over the prompt's own tokens:
        weight them by `token_weights` for a mean over all tokens.

    Raises:
        UserError: when the models' vocabularies differ in size, or an answer is empty.
    """
    vocabulary, other = base.config.get_text_config().vocab_size, tuned.config.get_text_config().vocab_size
    if vocabulary != other:
        raise UserError(f"tuned model has {other} tokens, its base {vocabulary}: compare a model with its own base")
    if empty := sum(not answer for answer in answer_ids):
        raise UserError(
            f"{empty} base answers have no token", expected="at least a stop token", change="evaluate the base again"
        )
    same = tuned is (base.model if isinstance(base, Remembered) else base)  # as where a walk starts
    figures = {name: [0.0] * len(prompt_ids) for name in FIGURES}
    with track(description, len(prompt_ids), "prompt") as bar:
        for batch in bounded_batches(prompt_ids, answer_ids, batch_size, vocabulary):
            ids, mask = pad_left([[*prompt_ids[i], *answer_ids[i]] for i in batch], tokenizer.pad_token_id, base.device)
            longest = max(len(answer_ids[i]) for i in batch)
            logits = last_logits(base, ids, mask, longest)
            others = logits if same else last_logits(tuned, ids, mask, longest)
            for row, index in enumerate(batch):
                tokens = len(answer_ids[index])
                kl, nll_change, agree = token_drift(
                    logits[row, -tokens:], others[row, -tokens:].to(base.device), ids[row, -tokens:]
                )
                figures["kl_per_token"][index] = kl.mean().item()
                figures["kl_first_tokens"][index] = kl[:first_tokens].mean().item()
                figures["nll_change"][index] = nll_change.mean().item()
                figures["top1_agreement"][index] = agree.float().mean().item()
            bar.update(len(batch))
    return figures


def token_weights(lengths: Sequence[int], first_tokens: int) -> dict[str, list[int]]:
    """How many of an answer's `lengths` tokens stand behind each prompt's value, for every name of `FIGURES`."""
    return {name: [min(n, first_tokens) if name == "kl_first_tokens" else n for n in lengths] for name in FIGURES}


def bounded_batches(
    prompt_ids: Sequence[Sequence[int]], answer_ids: Sequence[Sequence[int]], batch_size: int, vocabulary: int
) -> list[list[int]]:
    """Indices grouped by similar length, each group within `batch_size` and the budget of logits."""
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompt_ids, answer_ids, strict=True)]
    found: list[list[int]] = []
    for batch in batches(lengths, batch_size):
        rows = max(1, LOGITS_BUDGET // ((max(len(answer_ids[i]) for i in batch) + 1) * vocabulary))
        found += [batch[first : first + rows] for first in range(0, len(batch), rows)]
    return found


def last_logits(model: PreTrainedModel | Remembered, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """(B, count, V): logits that predict the last `count` tokens of rows padded on the left."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # a row's first real token is position 0, whatever its padding
    output = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=positions.to(model.device),
        use_cache=False,
        logits_to_keep=count + 1,
    )
    return output.logits[:, :-1]

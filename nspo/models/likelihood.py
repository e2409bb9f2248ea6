"""How likely a model finds given answers: the mean negative log-likelihood of their tokens, in the chat format."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.models.drift import bounded_batches, last_logits
from nspo.models.generation import pad_left
from nspo.run.progress import track


@torch.inference_mode()
def answer_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[Sequence[int]],
    batch_size: int,
    description: str,
) -> list[float]:
    """-1/T sum over an answer's T tokens of log p(token | prompt, tokens before), in nats, one value per answer.

    Neither batch size nor padding changes a value (beyond float32 rounding). Put the model in evaluation mode first.

    Args:
        prompt_ids, answer_ids: token ids; an answer has at least one.
        batch_size: most answers per forward pass; long ones take fewer, so that memory stays bounded.
    """
    found = [0.0] * len(prompt_ids)
    with track(description, len(prompt_ids), "answer") as bar:
        for batch in bounded_batches(prompt_ids, answer_ids, batch_size, model.config.get_text_config().vocab_size):
            ids, mask = pad_left(
                [[*prompt_ids[i], *answer_ids[i]] for i in batch], tokenizer.pad_token_id, model.device
            )
            logits = last_logits(model, ids, mask, max(len(answer_ids[i]) for i in batch))
            for row, index in enumerate(batch):
                tokens = ids[row, -len(answer_ids[index]) :, None]
                chances = logits[row, -len(tokens) :].float().log_softmax(-1)
                found[index] = -chances.gather(-1, tokens).mean().item()
            bar.update(len(batch))
    return found

"""General sequences that rivals of the constraint learn from: the prompts behind the bases, answered by the base model.

The same data as K has: the first training prompts of every general domain and of the harmless look-alikes. The
answers are the base model's own, greedy, since what must not change is what it says.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.data.tables import Prompts
from nspo.models.generation import generate
from nspo.models.structure.positions import fitting

BATCH = 32
BENIGN = "benign"  # the look-alikes, among the prompts and among the inputs behind the bases
IGNORED = -100

Sequence_ = tuple[list[int], list[int]]  # prompt and answer


def general_sequences(
    prompts: Prompts, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, per_domain: int, max_new_tokens: int
) -> dict[str, list[Sequence_]]:
    """Tokenised prompts with the base model's greedy answers, by domain: the first `per_domain` training prompts."""
    asked = {**prompts.by_domain("general", "train", per_domain), BENIGN: prompts.of(BENIGN, "train", limit=per_domain)}
    found = {}
    for domain, rows in asked.items():
        what = f"base answers, {domain}"
        ids = fitting(rows, tokenizer, base.config, max_new_tokens, what).ids
        answers = dict(generate(base, tokenizer, ids, max_new_tokens, BATCH, what))
        found[domain] = [(ids[i], answers[i]) for i in range(len(ids)) if answers[i]]
    return {domain: sequences for domain, sequences in found.items() if sequences}


def endless(sequences: Sequence[Sequence_], size: int) -> Iterator[list[Sequence_]]:
    """Batches of `size` in a fixed order, around and around."""
    around = itertools.cycle(sequences)
    while True:
        yield list(itertools.islice(around, size))


def encode(batch: Sequence[Sequence_], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask (B, T) int64 padded on the right, and targets (B, T - 1), `IGNORED` outside the answers."""
    ids = pad_sequence([torch.tensor(p + a) for p, a in batch], batch_first=True, padding_value=pad_id)
    mask = pad_sequence([torch.ones(len(p) + len(a), dtype=torch.long) for p, a in batch], batch_first=True)
    targets = ids[:, 1:].clone()
    for row, (prompt, answer) in enumerate(batch):
        targets[row, : len(prompt) - 1] = IGNORED
        targets[row, len(prompt) + len(answer) - 1 :] = IGNORED
    return ids.to(device), mask.to(device), targets.to(device)

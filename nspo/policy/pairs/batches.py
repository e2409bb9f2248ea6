"""From pairs of answers to the batches of the trainer: order, contexts, and what the base model makes of each token."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from nspo.run.progress import track

LONGEST_PREFIX = 100  # tokens of a harmful answer that a safe one may have to follow, as in the release of W-DOOR
IGNORED = -100  # the target of a token that is no part of an answer, in torch's cross entropy


@dataclass(frozen=True)
class Side:
    """One of the two answers of a pair.

    Attributes:
        context: token ids that the answer follows.
        ids: token ids of the answer.
        base: (len(ids),) float32, what the base model gives each of them, as a log-probability.
    """

    text: str
    score: float
    safe: bool
    helpfulness: float
    context: list[int]
    ids: list[int]
    base: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def of(cls, row: dict[str, Any], side: str) -> "Side":
        """One side of a row of the file."""
        scores = row[f"{side}_score"], row[f"{side}_safe"], row[f"{side}_helpfulness"]
        return cls(row[side], *scores, row["prompt_ids"], row[f"{side}_ids"])


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, the first of which is preferred.

    Attributes:
        label: the distance that BFPO asks for.
        token_weights: (len(chosen.ids),) float32, how much W-DOOR makes of each token.
        weight: how much the pair counts in a mean over pairs.
    """

    role: str
    prompt: str
    chosen: Side
    rejected: Side
    label: float = 0.0
    token_weights: Tensor = field(default_factory=lambda: torch.zeros(0))
    weight: float = 1.0

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Pair":
        """The pair of a row of the file."""
        return cls(row["role"], row["prompt"], Side.of(row, "chosen"), Side.of(row, "rejected"))


def in_order(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """`count` pairs: first as they were sampled, then shuffled anew for every further pass."""
    order, shuffle = list(pairs), random.Random(seed)
    found: list[Pair] = []
    while len(found) < count:
        found += order
        shuffle.shuffle(order)
    return found[:count]


def with_prefixes(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Half of the chosen answers to harmful prompts follow the beginning of the rejected one, of 1 to 100 tokens."""
    draw = random.Random(seed)

    def prefixed(pair: Pair) -> Pair:
        length = draw.randint(1, LONGEST_PREFIX) * draw.randint(0, 1)
        if pair.role != "harmful":
            return pair
        context = pair.chosen.context + pair.rejected.ids[:length]
        return replace(pair, chosen=replace(pair.chosen, context=context))

    return [prefixed(pair) for pair in pairs]


def encode(sides: Sequence[Side], pad_id: int) -> dict[str, Tensor]:
    """Ids and mask (N, T) int64 padded on the right; `targets` (N, T - 1) int64, `IGNORED` outside the answers."""
    ids = [torch.tensor(side.context + side.ids) for side in sides]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "targets": _aligned([torch.tensor(side.ids) for side in sides], sides, IGNORED),
    }


def _aligned(values: Sequence[Tensor], sides: Sequence[Side], fill: int) -> Tensor:
    """(N, T - 1): a value for every token of the answers, where the model predicts it, and `fill` elsewhere."""
    rows = [
        torch.cat([value.new_full((len(side.context) - 1,), fill), value])
        for value, side in zip(values, sides, strict=True)
    ]
    return pad_sequence(rows, batch_first=True, padding_value=fill)


@dataclass(frozen=True)
class Collator:
    """Makes a batch of B pairs: what `encode` makes of their 2B answers, the chosen ones first, and

    base (2B, T - 1): log-probabilities of the base model; token_weights (B, T - 1), harmful, label, weight (B,).
    """

    pad_id: int

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """The batch."""
        chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        batch = encode([*chosen, *rejected], self.pad_id)
        weights = _aligned([pair.token_weights for pair in pairs], chosen, 0)
        weights = torch.nn.functional.pad(weights, (0, batch["targets"].shape[1] - weights.shape[1]))
        return batch | {
            "base": _aligned([side.base for side in (*chosen, *rejected)], [*chosen, *rejected], 0),
            "token_weights": weights,
            "harmful": torch.tensor([pair.role == "harmful" for pair in pairs]),
            "label": torch.tensor([pair.label for pair in pairs]),
            "weight": torch.tensor([pair.weight for pair in pairs]),
        }


def answer_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(N, T - 1) float32: log-probability of every token of the answers, zero elsewhere; of a batch of `encode`."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits = output.logits[:, :-1].float().transpose(1, 2)
    return -cross_entropy(logits, batch["targets"], ignore_index=IGNORED, reduction="none")


@torch.no_grad()
def every_logps(
    model: Any, sides: Sequence[Side], pad_id: int, batch_size: int, bf16: bool, description: str
) -> Iterator[Tensor]:
    """(len(ids),) float32 on the CPU for every answer, in order, in the arithmetic of training."""
    device = model.device
    with track(description, len(sides), "answer") as bar:
        for first in range(0, len(sides), batch_size):
            some = sides[first : first + batch_size]
            batch = {name: value.to(device) for name, value in encode(some, pad_id).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logps = answer_logps(model, batch).cpu()
            for row, side in zip(logps, some, strict=True):
                yield row[len(side.context) - 1 :][: len(side.ids)].clone()
            bar.update(len(some))

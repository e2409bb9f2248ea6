"""Prompts to token sequences: which prompts are read, in which chunks, and which of their tokens are kept.

A chunk holds some prompts of one domain and split. It is the unit of work, of resuming and of sharing work among
processes, and everything about it follows from the settings and the prompts alone, never from how many processes run.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from nspo.activations.store import BENIGN, HARMFUL, IMAGE
from nspo.data.tables import Prompts
from nspo.errors import UserError
from nspo.files.manifest import fingerprint
from nspo.models.chat import chat_ids
from nspo.models.generation import by_length
from nspo.settings.bases import ActivationSettings

CHUNK = 64  # prompts of a chunk, until a domain and split has too many chunks:
CHUNKS = 8  # each stores second moments of its own, so their number is bounded


@dataclass(frozen=True)
class Chunk:
    """Prompts of one domain and split, tokenised in the chat format.

    Attributes:
        index: its place among all chunks.
        domain, split: where the prompts come from; `split` is `basis` or `validation`, which
            takes prompts of the validation split.
        first: how many prompts of the same domain and split come before.
        prompts: token ids of every prompt.
        images: the image file and the text of every prompt; empty where they are text alone.
        budget: the most tokens to keep; None keeps all.
        left_out: prompts of this domain and split that were too long, counted in its first chunk.
        data: fingerprint of ids and texts.
    """

    index: int
    domain: str
    split: str
    first: int
    prompts: tuple[tuple[int, ...], ...]
    budget: int | None
    left_out: int
    data: str
    images: tuple[tuple[Path, str], ...] = ()

    @property
    def name(self) -> str:
        """How progress and errors call it."""
        following = f" from prompt {self.first + 1} on" if self.first else ""
        return f"{self.domain} ({self.split}){following}"

    def most_tokens(self, max_new_tokens: int) -> int:
        """How many tokens it has if all answers are as long as they may be: known before any is generated."""
        return sum(len(ids) + max_new_tokens for ids in self.prompts)


@dataclass(frozen=True)
class Answered:
    """A prompt with its answer.

    Attributes:
        sample: the prompt's place in its domain and split.
        ids: token ids of both.
        prompt_length: how many of them are the prompt.
        kept: (len(ids),) bool, which positions are kept.
    """

    sample: int
    ids: tuple[int, ...]
    prompt_length: int
    kept: Tensor


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads.

    Attributes:
        sequences: its rows.
        inputs: of the model: `input_ids` and `attention_mask` (B, T) int64, and what goes with images.
        kept: (B, T) bool, which positions are kept.
    """

    sequences: tuple[Answered, ...]
    inputs: dict[str, Tensor]
    kept: Tensor


def make_chunks(
    settings: ActivationSettings, prompts: Path, tokenizer: PreTrainedTokenizerBase, room: float = math.inf
) -> list[Chunk]:
    """All chunks, in the order of the store's parts.

    Args:
        room: the most tokens of a prompt that the model can read and answer (`nspo.models.structure.positions`).

    Raises:
        UserError: a domain with a reserved name, or one whose prompts are all too long.
    """
    table = Prompts(prompts)
    general = table.by_domain("general", "train")
    if reserved := {HARMFUL, BENIGN, IMAGE} & general.keys():
        raise UserError(f"data.general: the domain name {min(reserved)!r} is reserved: rename the domain")
    wanted: list[tuple[str, str, str | None, int]]
    wanted = [(domain, "general", domain, settings.samples) for domain in general]
    wanted += [(HARMFUL, "harmful", None, settings.harmful_samples), (BENIGN, "benign", None, settings.benign_samples)]
    chunks: list[Chunk] = []
    for name, role, domain, samples in wanted:
        for split, source, count in (("basis", "train", samples), ("validation", "validation", samples // 2)):
            if count:
                rows = table.of(role, source, domain)
                kept, left_out = _fitting(f"{name} ({split})", rows, count, prompt_limit(settings, room), tokenizer)
                chunks += divide(len(chunks), name, split, kept, left_out, settings.tokens_per_domain)
    return chunks


def prompt_limit(settings: ActivationSettings, room: float, images: bool = False) -> tuple[float, str]:
    """The most tokens of a prompt, and what says so, with what to change; images fill as many as the model has."""
    if settings.max_prompt_tokens <= room and not images:
        return settings.max_prompt_tokens, f"activations.max_prompt_tokens ({settings.max_prompt_tokens}): raise it"
    return room, (
        f"the {room:g} positions of the model that an answer leaves: lower activations.max_new_tokens "
        f"({settings.max_new_tokens})"
    )


def _fitting(
    name: str, rows: Sequence[dict[str, str]], count: int, limit: tuple[float, str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[tuple[dict[str, str], tuple[int, ...]]], int]:
    """The first `count` prompts within `limit` (`prompt_limit`), with their ids; and how many longer came between."""
    kept: list[tuple[dict[str, str], tuple[int, ...]]] = []
    left_out = 0
    for row in rows:
        ids = tuple(chat_ids(tokenizer, row["prompt"]))
        if len(ids) > limit[0]:
            left_out += 1
        else:
            kept.append((row, ids))
        if len(kept) == count:
            break
    if not kept:
        raise UserError(f"{name}: all {left_out} prompts are longer than {limit[1]}")
    return kept, left_out


def divide(
    index: int,
    domain: str,
    split: str,
    rows: Sequence[tuple[dict[str, str], tuple[int, ...]]],
    left_out: int,
    tokens: int,
) -> list[Chunk]:
    """Chunks, from place `index` on, of equal shares of the prompts, each with its share of `tokens` (0: all)."""
    count = min(CHUNKS, -(-len(rows) // CHUNK))
    bounds = [len(rows) * i // count for i in range(count + 1)]
    chunks: list[Chunk] = []
    for start, stop in itertools.pairwise(bounds):
        share = rows[start:stop]
        budget = tokens * stop // len(rows) - tokens * start // len(rows) if tokens else None
        data = fingerprint([domain, split, start, [[row["id"], row["prompt"]] for row, _ in share]])
        ids = tuple(ids for _, ids in share)
        place = index + len(chunks)
        chunks.append(Chunk(place, domain, split, start, ids, budget, 0 if start else left_out, data))
    return chunks


def kept_positions(lengths: Sequence[int], drop_first: int, budget: int | None) -> list[Tensor]:
    """Which positions of each sequence are kept, (T,) bool: all but the first `drop_first`, at most `budget` in all.

    Under a budget B below the N tokens left, token j = 0, 1, ... of all sequences in turn is kept where
    floor((j + 1) B / N) > floor(j B / N): exactly B of them, evenly spread.
    """
    counts = [max(0, length - drop_first) for length in lengths]
    total = sum(counts)
    share = total if budget is None else min(budget, total)
    token = torch.arange(total)
    chosen = (token + 1) * share // max(1, total) > token * share // max(1, total)
    dropped = [torch.zeros(length - count, dtype=torch.bool) for length, count in zip(lengths, counts, strict=True)]
    return [torch.cat(pair) for pair in zip(dropped, chosen.split(counts), strict=True)]


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices into `lengths`, shortest first, in batches of at most `budget` tokens, padding included (or of one)."""
    result: list[list[int]] = []
    for index in by_length(lengths):
        if not result or (len(result[-1]) + 1) * lengths[index] > budget:
            result.append([])
        result[-1].append(index)
    return result


def padded_batches(sequences: Sequence[Answered], budget: int, pad_id: int) -> Iterator[Batch]:
    """The sequences in batches (see `batches`).

    Padded on the right: in a causal model no real token sees it, and positions count from 0 by themselves.
    """
    for places in batches([len(sequence.ids) for sequence in sequences], budget):
        batch = tuple(sequences[place] for place in places)
        ids = [torch.tensor(sequence.ids) for sequence in batch]
        mask = [torch.ones_like(row) for row in ids]
        kept = [sequence.kept for sequence in batch]
        inputs = {"input_ids": _padded(ids, pad_id), "attention_mask": _padded(mask, 0)}
        yield Batch(batch, inputs, _padded(kept, False))


def _padded(rows: list[Tensor], value: float) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)

"""Where pairs come from: groups of answers that the base model samples, or people's choices."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nspo.errors import UserError
from nspo.files.journal import JsonLines
from nspo.judges.refusal import is_refusal
from nspo.models.chat import chat_ids
from nspo.models.generation import generate
from nspo.policy.rollouts.reward import Scorer, safety_reward, score_where
from nspo.run.devices import has_bf16
from nspo.run.progress import say, track
from nspo.settings.policy.section import PairSettings

SIDES = ("chosen", "rejected")
BATCH = 64  # answers that are sampled at once
HARMFUL_GRADE = 0.5  # an answer that people grade this or higher is not safe

Row = dict[str, Any]


@dataclass(frozen=True)
class Judges:
    """What scores cost (a model, or the judge in its place) and helpfulness, and what shapes the safety reward."""

    cost: Scorer
    reward: Scorer
    margin: float
    refusal_bonus: float = 0.0

    def scores(self, asked: list[str], answers: list[str], harmful: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Safety reward (NaN: the judge failed), helpfulness, and whether safe, as answers to benign prompts are."""
        cost = score_where(self.cost, asked, answers, harmful).scores
        helpfulness = score_where(self.reward, asked, answers, torch.ones_like(harmful)).scores
        refused = torch.tensor([is_refusal(answer) for answer in answers])
        earned = safety_reward(cost, helpfulness, harmful, self.margin, refused, self.refusal_bonus)
        return earned, helpfulness, cost <= 0


# Sampled


@dataclass(frozen=True)
class Sampler:
    """The base model and what scores it."""

    settings: PairSettings
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    judges: Judges

    def pairs(self, batch: Sequence[Row]) -> list[Row]:
        """The pairs of a batch of prompts."""
        size = self.settings.group_size
        asked = [row["prompt"][-1]["content"] for row in batch for _ in range(size)]
        ids = [chat_ids(self.tokenizer, prompt) for prompt in asked]
        answer_ids = self._answers(ids)
        answers = self.tokenizer.batch_decode(answer_ids, skip_special_tokens=True)
        harmful = torch.tensor([row["role"] == "harmful" for row in batch for _ in range(size)])
        scores = self.judges.scores(asked, answers, harmful)

        def side(name: str, index: int) -> Row:
            return _side(name, answers[index], answer_ids[index], [column[index].item() for column in scores])

        return [
            {
                "role": batch[group]["role"],
                "prompt": asked[group * size],
                "prompt_ids": ids[group * size],
                **side("chosen", group * size + best),
                **side("rejected", group * size + worst),
            }
            for group, best, worst in best_and_worst(scores[0].view(-1, size))
        ]

    def _answers(self, ids: list[list[int]]) -> list[list[int]]:
        """A sampled answer to every prompt, in order; in bf16 where the device multiplies it in hardware."""
        length, temperature = self.settings.max_new_tokens, self.settings.temperature
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            answers = dict(generate(self.model, self.tokenizer, ids, length, BATCH, "answers", temperature))
        return [answers[index] for index in range(len(ids))]


def sampled(sampler: Sampler, asked: Sequence[Row], seed: int, work: Path) -> list[Row]:
    """The pairs of all prompts; continues after the batches that the folder `work` already holds.

    Raises:
        UserError: when every group scores alike.
    """
    groups = max(1, BATCH // sampler.settings.group_size)
    batches = [asked[first : first + groups] for first in range(0, len(asked), groups)]
    log = JsonLines(work / "batches.jsonl")
    log.rewind(len(batches))
    done = len(log.rows())
    if done:
        say(f"pairs of seed {seed}: continuing after {done} of {len(batches)} batches, kept in {work}")
    with track("sample pairs", len(batches), "batch", start=done) as bar:
        for index in range(done, len(batches)):
            set_seed(seed + 1_000_003 * (index + 1))  # of its own, so that a resumed run draws the same answers
            log.append([{"step": index, "pairs": sampler.pairs(batches[index])}])
            bar.update(1)
    pairs = [pair for row in log.rows() for pair in row["pairs"]]
    if not pairs:
        raise UserError(
            f"none of {len(asked)} groups has a best and a worst answer: raise `policy.margin`, `policy.temperature` "
            "or `policy.group_size`"
        )
    dropped = len(asked) - len(pairs)
    say(f"{len(pairs)} pairs; {dropped} of {len(asked)} groups dropped, without a best and a worst answer")
    return pairs


def best_and_worst(scores: Tensor) -> list[tuple[int, int, int]]:
    """(group, best, worst) for the groups (G, n) whose scores differ; of equal scores the first counts, NaN none."""
    failed = scores.isnan()
    best, worst = scores.masked_fill(failed, -torch.inf).max(1), scores.masked_fill(failed, torch.inf).min(1)
    return [
        (group, int(best.indices[group]), int(worst.indices[group]))
        for group in range(len(scores))
        if best.values[group] > worst.values[group]
    ]


# Chosen by people


def labelled(
    settings: PairSettings,
    labels: Sequence[Row],
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    room: float,
    judges: Judges,
) -> list[Row]:
    """The pairs among the labels whose prompt is short enough and whose answers differ within what is kept of them.

    Args:
        room: the most tokens of a prompt that the model can read and answer.

    Raises:
        UserError: when there is none.
    """

    def answer_ids(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id][: settings.max_new_tokens]

    compared: dict[str, dict[str, Row]] = {}
    for row in labels:
        if row["pair"]:
            compared.setdefault(row["pair"], {})[row["role"]] = row | {"ids": answer_ids(row["response"])}
    usable = [
        pair
        for pair in compared.values()
        if pair["chosen"]["ids"] != pair["rejected"]["ids"]
        and len(chat_ids(tokenizer, pair["chosen"]["prompt"])) <= min(settings.max_prompt_tokens, room)
    ]
    if not usable:
        raise UserError(
            f"none of the {len(compared)} pairs of the cost labels can be used: policy.pairs: labels takes a set of "
            "pairs in `data.labels` with prompts within `policy.max_prompt_tokens` and the model's positions"
        )
    random.Random(seed).shuffle(usable)
    kept = usable[: settings.steps * settings.prompts_per_step]
    say(f"{len(kept)} of {len(compared)} pairs that people chose from")
    rows = [pair[side] for pair in kept for side in SIDES]
    texts = tokenizer.batch_decode([row["ids"] for row in rows], skip_special_tokens=True)
    harmful = torch.ones(len(rows), dtype=torch.bool)
    reward, helpfulness, safe = judges.scores([row["prompt"] for row in rows], texts, harmful)
    for index, row in enumerate(rows):
        if row["grade"] is not None:
            safe[index] = row["grade"] < HARMFUL_GRADE
    sides = [
        _side(
            SIDES[index % 2], texts[index], row["ids"], [column[index].item() for column in (reward, helpfulness, safe)]
        )
        for index, row in enumerate(rows)
    ]
    return [
        {
            "role": "harmful",
            "prompt": pair["chosen"]["prompt"],
            "prompt_ids": chat_ids(tokenizer, pair["chosen"]["prompt"]),
            **sides[2 * index],
            **sides[2 * index + 1],
        }
        for index, pair in enumerate(kept)
    ]


def _side(name: str, text: str, ids: list[int], scores: Sequence[float]) -> Row:
    """The columns of one of the two answers, its scores as `Judges` gives them."""
    score, helpfulness, safe = scores
    values = {"": text, "_ids": ids, "_score": score, "_helpfulness": helpfulness, "_safe": bool(safe)}
    return {f"{name}{suffix}": value for suffix, value in values.items()}

"""Held-out probes during training: how safe, how over-cautious and how far from the base model the policy is now.

All prompts are from the validation split, which neither training nor the final evaluation sees. Answers are greedy. The
probes draw each method's safety-against-drift trajectory and stop training once the target safety is met, so that
methods are compared at equal safety.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.evaluation.drift import Remembered, drift, token_weights
from nspo.models import chat_ids, generate, load_model
from nspo.preference import PreferenceModel
from nspo.prompts import domains, load_prompts
from nspo.refusal import is_refusal

BATCH = 32
GENERAL_PER_DOMAIN = 6
FIRST_TOKENS = 4


@contextmanager
def full_precision(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and fp32 arithmetic: set aside the autocast that accelerate wraps around `model.forward`."""
    training, wrapped = model.training, model.__dict__.pop("forward", None)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if wrapped is not None:
            model.forward = wrapped  # type: ignore[method-assign]


@dataclass
class Probe:
    """Probe prompts, and what the base model says to the general ones: asked once, after which the model is let go."""

    tokenizer: PreTrainedTokenizerBase
    base: Remembered
    cost: PreferenceModel
    harmful: list[str]
    benign: list[str]
    general_ids: list[list[int]]
    answer_ids: list[list[int]]
    max_new_tokens: int

    @classmethod
    def load(
        cls,
        base_folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        cost: PreferenceModel,
        prompts: Path,
        count: int,
        max_new_tokens: int,
        device: torch.device,
    ) -> "Probe":
        """Read `count` harmful and benign validation prompts and let the base model answer general ones."""
        base = load_model(base_folder, device)
        general = [
            row["prompt"]
            for domain in domains(prompts, "general", "validation")
            for row in load_prompts(prompts, "general", "validation", domain, GENERAL_PER_DOMAIN)
        ]
        general_ids = [chat_ids(tokenizer, prompt) for prompt in general]
        answers = dict(generate(base, tokenizer, general_ids, max_new_tokens, BATCH, "base answers for the probes"))
        return cls(
            tokenizer=tokenizer,
            base=Remembered(base),
            cost=cost,
            harmful=[r["prompt"] for r in load_prompts(prompts, "harmful", "validation", limit=count)],
            benign=[r["prompt"] for r in load_prompts(prompts, "benign", "validation", limit=count)],
            general_ids=general_ids,
            answer_ids=[answers[i] for i in range(len(general_ids))],
            max_new_tokens=max_new_tokens,
        )

    def measure(self, policy: PreTrainedModel) -> dict[str, float]:
        """Unsafe rate (cost > 0), refusal rates, and drift in nats and shares, of `policy` as it is now."""
        with full_precision(policy):
            harmful, benign = self._answers(policy, self.harmful), self._answers(policy, self.benign)
            moved = drift(
                self.base, policy, self.tokenizer, self.general_ids, self.answer_ids, FIRST_TOKENS, BATCH, "probe drift"
            )
        self.base.release()
        cost = self.cost.score(self.harmful, harmful)
        weights = token_weights([len(ids) for ids in self.answer_ids], FIRST_TOKENS)
        return {
            "unsafe_rate": (cost > 0).float().mean().item(),
            "mean_cost": cost.mean().item(),
            "refusal_rate": _share(harmful),
            "over_refusal_rate": _share(benign),
            **{name: _weighted(values, weights[name]) for name, values in moved.items()},
        }

    def _answers(self, policy: PreTrainedModel, prompts: list[str]) -> list[str]:
        ids = [chat_ids(self.tokenizer, prompt) for prompt in prompts]
        answers: dict[int, Any] = dict(
            generate(policy, self.tokenizer, ids, self.max_new_tokens, BATCH, "probe answers")
        )
        return self.tokenizer.batch_decode([answers[i] for i in range(len(prompts))], skip_special_tokens=True)


def _weighted(values: list[float], weights: list[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _share(answers: list[str]) -> float:
    return sum(map(is_refusal, answers)) / len(answers)

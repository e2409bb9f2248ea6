"""Held-out probes during training: how safe, how over-cautious and how far from the base model the policy is now.

All prompts are from the validation split, which neither training nor the final evaluation sees. Answers are greedy. The
probes draw each method's safety-against-drift trajectory and stop training once the target safety is met, so that
methods are compared at equal safety.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nspo.data.tables import Prompts
from nspo.files.journal import JsonLines
from nspo.judges.refusal import is_refusal
from nspo.models.chat import chat_ids
from nspo.models.drift import Remembered, drift, token_weights
from nspo.models.generation import generate
from nspo.models.loading import load_model
from nspo.models.structure.positions import fitting
from nspo.policy.log import FROM_PROBE, LoggedCallback
from nspo.preference.model import PreferenceModel
from nspo.run.progress import say
from nspo.settings.policy.section import TrainingSettings

BATCH = 32
HARMFUL_PER_GENERAL = 8  # drift is an average over tokens and needs fewer prompts than a rate does
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
        training: TrainingSettings,
        model: Path,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        cost: PreferenceModel,
        device: torch.device,
    ) -> "Probe":
        """Take harmful and benign validation prompts, and let the base, the folder `model`, answer general ones."""
        base = load_model(model, device)
        count, max_new_tokens = training.probe_prompts, training.max_new_tokens
        of_domain = max(1, count // HARMFUL_PER_GENERAL)
        asked = [row for role in ("harmful", "benign") for row in prompts.of(role, "validation", limit=count)]
        asked += prompts.of_each_domain("general", "validation", of_domain)
        fits = fitting(asked, tokenizer, base.config, max_new_tokens, "probes", "policy.max_new_tokens")
        by_role = {role: [r["prompt"] for r in fits.rows if r["role"] == role] for role in ("harmful", "benign")}
        general_ids = [ids for row, ids in zip(fits.rows, fits.ids, strict=True) if row["role"] == "general"]
        answers = dict(generate(base, tokenizer, general_ids, max_new_tokens, BATCH, "base answers for the probes"))
        return cls(
            tokenizer=tokenizer,
            base=Remembered(base),
            cost=cost,
            **by_role,
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


class ProbeCallback(LoggedCallback):
    """Probe before the first step and every `every` steps; stop at the target unsafe rate.

    Every process measures everything, in step, so that sharded weights can be gathered; what counts is the main one's
    row, so that all stop together.

    Args:
        target: the unsafe rate to stop at; None: never.
        also: what else is measured then, by other callbacks.
    """

    def __init__(
        self,
        probe: Probe,
        folder: Path,
        every: int,
        target: float | None,
        also: Sequence[Callable[[], dict[str, float]]] = (),
    ) -> None:
        self.probe, self.every, self.target, self.also = probe, every, target, also
        self.log = JsonLines(folder / "probes.jsonl")
        self.last: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the starting point, or forget probes later than the checkpoint that is resumed."""
        if state.is_world_process_zero:
            # A run that was interrupted before its first checkpoint has probed step 0 already.
            self.log.rewind(state.global_step or -1)
        if state.global_step == 0:
            self._measure(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Probe when due; a checkpoint follows the probe, so a resumed run never repeats it."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return control
        row = self._measure(state, kwargs["model"])
        if self._meets(row):
            say(f"step {state.global_step}: unsafe rate {row['unsafe_rate']:.3f} meets the target {self.target}: done")
            control.should_training_stop = True
        control.should_save = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the probe to trackers."""
        if self.last.get("step") == state.global_step and "loss" in kwargs["logs"]:
            kwargs["logs"].update({f"probe_{key}": value for key, value in self.last.items() if key != "step"})

    def columns(self, step: int) -> dict[str, float]:
        """For the log of update `step`, where it was probed: its distance from the base, and what leaks."""
        if self.last.get("step") != step:
            return {}
        return {ours: self.last[theirs] for theirs, ours in FROM_PROBE.items() if theirs in self.last}

    def met_target(self, step: int) -> bool:
        """Whether the probe after update `step` met the target, so that training ended there."""
        return any(row["step"] == step and self._meets(row) for row in self.log.rows())

    def _meets(self, row: dict[str, Any]) -> bool:
        return self.target is not None and row["unsafe_rate"] <= self.target

    def _measure(self, state: Any, model: Any) -> dict[str, Any]:
        measured = {"step": state.global_step, **self.probe.measure(model)}
        for measure in self.also:
            measured |= measure()
        (row,) = broadcast_object_list([measured])
        if state.is_world_process_zero:
            self.log.append([row])
        self.last = row
        say("probe " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))
        return row

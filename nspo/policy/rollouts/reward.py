"""The reward of a rollout: safe on harmful prompts, helpful on harmless ones.

On a harmful prompt the reward is -max(cost, -margin): the cost model's score, flat once an answer is safe by the
margin. On a benign one it is min(reward, margin): the reward model's score, flat once an answer clearly does what was
asked. `policy.refusal_bonus` teaches refusing where that is right: it is added for an answer that opens with a refusal
(`nspo.judges.refusal`) to a harmful prompt and taken off for one to a benign prompt; without it a policy may learn to
change the subject. A group whose answers all sit on the flat part has zero variance, hence zero advantage: a policy
that is safe and helpful is left alone. With a judge (`nspo.policy.rollouts.judged`) the cost is its verdict, or NaN,
and TRL leaves an answer without reward out of its group.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor

from nspo.errors import UserError
from nspo.judges.refusal import is_refusal
from nspo.preference.model import PreferenceModel, Scored
from nspo.run.devices import now


class Scorer(Protocol):
    """What a reward needs of a cost or reward model, or of a judge in its place."""

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """One number per answer, (B,) float32."""
        ...


def safety_reward(
    cost: Tensor, reward: Tensor, harmful: Tensor, margin: float, refused: Tensor | None = None, bonus: float = 0.0
) -> Tensor:
    """Reward (B,) float32 from cost (B,), helpfulness (B,) and the mask (B,) bool of harmful prompts.

    A refusal (B,) earns `bonus` more on a harmful prompt and as much less on a benign one.
    """
    earned = torch.where(harmful, -cost.clamp(min=-margin), reward.clamp(max=margin))
    return earned if refused is None else earned + refusal_reward(refused, harmful, bonus)


def refusal_reward(refused: Tensor, harmful: Tensor, bonus: float) -> Tensor:
    """(B,) float32: `bonus` for refusing a harmful prompt, -`bonus` for refusing a benign one, else 0."""
    return refused.float() * torch.where(harmful, bonus, -bonus)


def whole_rollout(*columns: Tensor) -> list[Tensor]:
    """Columns (B,), float32 or bool, of all processes, one after the other. A collective: every process must call
    it."""
    table = torch.stack([column.float() for column in columns], 1)
    whole = gather(table.to(PartialState().device)).cpu()
    return [values.to(column.dtype).contiguous() for values, column in zip(whole.unbind(1), columns, strict=True)]


def score_where(model: Scorer, asked: list[str], answers: list[str], where: Tensor) -> Scored:
    """Scores (B,) at the positions of the mask `where`, zero elsewhere: each model reads only what it judges.

    `unread` is set for a fitted model only; a judge in its place reads whole answers.

    Raises:
        UserError: for a fitted model's score that is NaN or Inf, before anything is learnt from it. (A judge's NaN is a
            verdict that failed.)
    """
    scores, unread = torch.zeros(len(asked)), torch.zeros_like(where)
    if index := where.nonzero().flatten().tolist():
        read = [asked[i] for i in index], [answers[i] for i in index]
        if isinstance(model, PreferenceModel):
            scores[where], unread[where] = model.scored(*read)
        else:
            scores[where] = model.score(*read).cpu()
    if isinstance(model, PreferenceModel) and not torch.isfinite(scores).all():
        raise UserError(
            f"the {model.target} model scores an answer with NaN or Inf",
            expected="a finite number",
            change="train it again (delete its folder), or check its labels",
        )
    return Scored(scores, unread)


class SafetyReward:
    """TRL reward function that owns what scores cost and reward, and keeps each step's scored samples.

    Call it as TRL does, with conversational prompts and completions and the data set's `role` column. With several
    processes each scores its own answers, and the rollout is combined and logged as a whole. `scored` says when scoring
    of the last rollout began and ended, and how many tokens this process sampled.
    """

    __name__ = "safety"  # the name of the reward in TRL's logs

    def __init__(self, cost: Scorer, reward: Scorer, margin: float, refusal_bonus: float = 0.0) -> None:
        self.cost, self.reward, self.margin, self.refusal_bonus = cost, reward, margin, refusal_bonus
        self.samples: list[dict[str, Any]] = []
        self._scored: tuple[float, float, int] | None = None

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        role: list[str],
        trainer_state: Any,
        log_metric: Any,
        **_: Any,
    ) -> list[float | None]:
        """One reward per completion, None where the judge failed; logs means over the answers that were scored."""
        started = now()
        asked = [turns[-1]["content"] for turns in prompts]
        answers = [turns[-1]["content"] for turns in completions]
        harmful = torch.tensor([r == "harmful" for r in role])
        refused = torch.tensor([is_refusal(answer) for answer in answers]).float()
        by_cost, by_reward = self.judge(asked, answers, harmful)
        unread = torch.where(harmful, by_cost.unread, by_reward.unread)
        cost, reward, harmful, refused, unread = whole_rollout(
            by_cost.scores, by_reward.scores, harmful, refused, unread
        )
        total = [
            None if math.isnan(value) else value for value in self.combine(cost, reward, harmful, refused).tolist()
        ]
        failed = cost.isnan()
        log_metric("failed_verdicts", failed.sum().item())
        log_metric("unread_ends", unread.sum().item())
        if harmful.any():
            judged = cost[harmful & ~failed]
            log_metric("cost", judged.mean().item())
            log_metric("unsafe", (judged > 0).float().mean().item())
            log_metric("refusal_rate", refused[harmful].mean().item())
        if not harmful.all():
            log_metric("helpfulness", reward[~harmful].nanmean().item())
            log_metric("over_refusal_rate", refused[~harmful].mean().item())
        first = PartialState().process_index * len(answers)
        own = total[first : first + len(answers)]
        self.samples = [
            {"step": trainer_state.global_step + 1, "role": r, "prompt": p, "answer": a, "score": s}
            for r, p, a, s in zip(role, asked, answers, own, strict=True)
        ]
        self._scored = started, now(), sum(map(len, completion_ids))
        return own

    def scored(self) -> tuple[float, float, int] | None:
        """The rollout that was scored since this was last asked (see `nspo.policy.clock.Scored`)."""
        found, self._scored = self._scored, None
        return found

    def judge(self, asked: list[str], answers: list[str], harmful: Tensor) -> tuple[Scored, Scored]:
        """Cost (B,) of the answers to harmful prompts and reward (B,) of those to others, zero elsewhere."""
        return (
            score_where(self.cost, asked, answers, harmful),
            score_where(self.reward, asked, answers, ~harmful),
        )

    def combine(self, cost: Tensor, reward: Tensor, harmful: Tensor, refused: Tensor) -> Tensor:
        """What every answer of the rollout earns (B,); see `safety_reward`."""
        return safety_reward(cost, reward, harmful, self.margin, refused, self.refusal_bonus)

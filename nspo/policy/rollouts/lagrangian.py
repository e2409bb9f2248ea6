"""Reward subject to a limit on cost, with a dual variable: Safe RLHF's objective (arXiv 2310.12773) on the GRPO engine.

Both models score every answer. Maximise E[reward] subject to E[cost] <= limit: the policy ascends the combined
advantage below, the multiplier lambda the violation, in log space and once per rollout, before its advantages are made:

    ln lambda <- min(ln lambda + rate * lambda * (mean cost - limit), ln maximum)
    A = (A_r - lambda A_c) / (1 + lambda),   A_x = (x - group mean) / (group std + 1e-4)

Reward and cost are normalised apart, so neither outweighs the other by its units. TRL's own way to do that
(`multi_objective_aggregation="normalize_then_sum"`) takes weights that are fixed for the run, and divides the sum by
its deviation over the batch, which undoes the division by 1 + lambda and blows up a batch with hardly any signal. So
the combined advantage is handed to TRL as the reward, with `scale_rewards="none"`: all that is left to it is to
subtract the mean of a group, which is zero.

With a judge (`nspo.policy.rollouts.judged`) the cost is a verdict, 1 or 0, and the limit a share of unsafe answers. An
answer without a verdict counts in no mean and no deviation, of cost or of reward, and has no advantage.

Differences from Safe RLHF: the group takes the place of the two critics, KL (where set) stands in the loss and not in
the reward, and the mean cost is that of the rollout, not of a moving window. `policy.margin` is not used: scores count
as they are.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import ExportableState
from trl.trainer.utils import nanstd

from nspo.policy.log import LoggedCallback
from nspo.policy.rollouts.reward import SafetyReward, Scorer, refusal_reward, score_where
from nspo.preference.model import Scored
from nspo.run.progress import say
from nspo.settings.policy.losses import Lagrangian

STD_EPSILON = 1e-4  # TRL's, so that a multiplier near zero gives the advantages of the reward alone


@dataclass
class Multiplier:
    """The dual variable and what it has seen.

    Attributes:
        log: ln lambda.
        reward, cost: means of the last rollout.
        lowest_cost: the lowest mean cost of any rollout so far.
    """

    limit: float
    rate: float
    maximum: float
    log: float
    reward: float = math.nan
    cost: float = math.nan
    lowest_cost: float = math.inf

    @classmethod
    def of(cls, loss: Lagrangian) -> "Multiplier":
        """The multiplier before its first rollout."""
        return cls(loss.cost_limit, loss.multiplier_lr, loss.multiplier_max, math.log(loss.multiplier_init))

    @property
    def value(self) -> float:
        """lambda."""
        return math.exp(self.log)

    @property
    def at_maximum(self) -> bool:
        """Whether it can grow no more."""
        return self.log >= math.log(self.maximum)

    def update(self, reward: float, cost: float) -> None:
        """Take a step of dual ascent from the mean reward and cost of a rollout."""
        self.reward, self.cost, self.lowest_cost = reward, cost, min(self.lowest_cost, cost)
        step = self.rate * self.value * (cost - self.limit)
        self.log = min(self.log + step, math.log(self.maximum))


def combined_advantage(reward: Tensor, cost: Tensor, multiplier: float, group_size: int) -> Tensor:
    """A = (A_r - lambda A_c) / (1 + lambda), (B,) float32.

    Args:
        reward, cost: (B,) scores, the answers to one prompt side by side; both NaN for an answer that has none.
        multiplier: lambda >= 0.
        group_size: answers per prompt; divides B.
    """
    advantages = _normalised(reward, group_size) - multiplier * _normalised(cost, group_size)
    return advantages / (1 + multiplier)


def _normalised(scores: Tensor, group_size: int) -> Tensor:
    groups = scores.view(-1, group_size)
    centred = groups - groups.nanmean(1, keepdim=True)
    return (centred / (nanstd(groups, 1, keepdim=True) + STD_EPSILON)).flatten()


class LagrangianReward(SafetyReward):
    """TRL reward function that returns combined advantages, for `scale_rewards="none"`, and steps the multiplier."""

    __name__ = "lagrangian"

    def __init__(
        self, cost: Scorer, reward: Scorer, multiplier: Multiplier, group_size: int, refusal_bonus: float = 0.0
    ) -> None:
        super().__init__(cost, reward, math.inf, refusal_bonus)
        self.multiplier, self.group_size = multiplier, group_size

    def judge(self, asked: list[str], answers: list[str], harmful: Tensor) -> tuple[Scored, Scored]:
        """Cost and reward (B,) of every answer, to whatever prompt; both NaN where the judge failed."""
        everything = torch.ones_like(harmful)
        cost = score_where(self.cost, asked, answers, everything)
        reward = score_where(self.reward, asked, answers, everything)
        return cost, reward._replace(scores=reward.scores.masked_fill(cost.scores.isnan(), math.nan))

    def combine(self, cost: Tensor, reward: Tensor, harmful: Tensor, refused: Tensor) -> Tensor:
        """Combined advantages (B,) of the whole rollout, after the multiplier's step."""
        reward = reward + refusal_reward(refused, harmful, self.refusal_bonus)
        self.multiplier.update(reward.nanmean().item(), cost.nanmean().item())
        return combined_advantage(reward, cost, self.multiplier.value, self.group_size)


class MultiplierCallback(LoggedCallback, ExportableState):
    """Keep the multiplier in every checkpoint, log it with every update, and say when it saturates."""

    def __init__(self, multiplier: Multiplier) -> None:
        self.multiplier = multiplier
        self._said = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON gives every float back exactly."""
        return {"args": {}, "attributes": asdict(self.multiplier)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over what the checkpoint holds; a run that starts finds its own state here."""
        vars(self.multiplier).update(state.stateful_callbacks[type(self).__name__]["attributes"])

    def columns(self, step: int) -> dict[str, float]:
        """The multiplier and its last rollout, for the log of update `step`; says once when the maximum is reached."""
        it = self.multiplier
        if it.at_maximum and not self._said:
            say(
                f"step {step}: the multiplier is at its maximum {it.maximum:g}, the mean cost {it.cost:.3f} (limit "
                f"{it.limit:g}): it cannot weigh the cost any more; raise `multiplier_max` or `cost_limit`"
            )
            self._said = True
        return {
            "reward": it.reward,
            "mean_cost": it.cost,
            "multiplier": it.value,
            "multiplier_at_max": float(it.at_maximum),
        }

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so when no rollout kept to the limit."""
        it = self.multiplier
        if it.lowest_cost > it.limit:
            say(
                f"the mean cost never reached the limit {it.limit:g} (lowest {it.lowest_cost:.3f}, multiplier "
                f"{it.value:.3g}): train longer, or raise `multiplier_lr`, `multiplier_max` or `cost_limit`"
            )

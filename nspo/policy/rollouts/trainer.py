"""What is GRPO about a run: the reward of its rollouts, and TRL's trainer with its settings.

The fields of TRL's trainer that shape the result are set here, not left to defaults that move between its releases.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from nspo.data.tables import Prompts
from nspo.policy.arguments import shared_arguments
from nspo.policy.clock import Clock
from nspo.policy.log import LoggedCallback
from nspo.policy.rollouts.lagrangian import LagrangianReward, Multiplier, MultiplierCallback
from nspo.policy.rollouts.prompts import rollout_prompts
from nspo.policy.rollouts.reward import SafetyReward, Scorer
from nspo.policy.rollouts.vllm_rollouts import vllm_arguments
from nspo.preference.model import PreferenceModel
from nspo.settings.policy.losses import AnyLoss, Lagrangian, RolloutLoss
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.runtime import RuntimeSettings


class RolloutLearner:
    """Learns from answers that the policy samples as it goes.

    Attributes:
        cost: the cost model, which measures the probes whoever gives the reward.
        parts: callbacks that also add columns to the log.
    """

    def __init__(
        self,
        training: TrainingSettings,
        method: MethodSettings,
        cost: Path,
        reward: Path,
        prompts: Prompts,
        device: torch.device,
        judge: Scorer | None = None,
    ) -> None:
        """Load the models; a `judge` gives the cost of answers in place of the cost model.

        Raises:
            UserError: when a folder holds no such model, or the other one of the two.
        """
        self.method, self.prompts, self.device = method, prompts, device
        self.cost = PreferenceModel.load(cost, "cost", device)
        reward_model = PreferenceModel.load(reward, "reward", device)
        self.scorer, multiplier = reward_of(training, method.loss, judge or self.cost, reward_model)
        self.parts: list[LoggedCallback] = [Clock(self.scorer.scored), *([] if multiplier is None else [multiplier])]

    def trainer(
        self,
        training: TrainingSettings,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        work: Path,
        runtime: RuntimeSettings,
        callbacks: list[TrainerCallback],
    ) -> GRPOTrainer:
        """TRL's trainer, which keeps its checkpoints in `work`.

        Raises:
            UserError: when no prompt is short enough.
        """
        return GRPOTrainer(
            model=policy,
            reward_funcs=self.scorer,  # type: ignore[arg-type]  # TRL's type leaves out callables that are no functions
            args=trainer_arguments(training, self.method, seed, self.device, work, runtime),
            train_dataset=rollout_prompts(training, self.prompts, tokenizer, policy.config, seed),
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def samples(self, step: int) -> list[dict[str, Any]]:
        """The scored answers of the last rollout, once. A collective: those of all processes."""
        own, self.scorer.samples = self.scorer.samples, []
        everyone: list[dict[str, Any]] = gather_object(own)
        return everyone


def reward_of(
    training: TrainingSettings, loss: AnyLoss, cost: Scorer, reward: Scorer
) -> tuple[SafetyReward, MultiplierCallback | None]:
    """The reward function, and for a Lagrangian loss the callback that keeps its multiplier."""
    if not isinstance(loss, Lagrangian):
        return SafetyReward(cost, reward, training.margin, training.refusal_bonus), None
    multiplier = Multiplier.of(loss)
    scorer = LagrangianReward(cost, reward, multiplier, training.group_size, training.refusal_bonus)
    return scorer, MultiplierCallback(multiplier)


def trainer_arguments(
    training: TrainingSettings,
    method: MethodSettings,
    seed: int,
    device: torch.device,
    work: Path,
    runtime: RuntimeSettings,
) -> GRPOConfig:
    """TRL's configuration with every field that shapes the result written out."""
    loss = method.loss
    assert isinstance(loss, RolloutLoss)
    return GRPOConfig(
        **shared_arguments(training, method, seed, device, work, runtime),
        **vllm_arguments(training, runtime.vllm),
        num_generations=training.group_size,
        generation_batch_size=training.prompts_per_step * training.group_size,
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.minibatch_size // (training.micro_batch_size * training.processes),
        num_iterations=1,
        max_completion_length=training.max_new_tokens,
        temperature=training.temperature,
        top_p=1.0,
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
        epsilon=training.clip,
        epsilon_high=training.clip,
        delta=training.delta,
        beta=loss.kl,
        use_bias_correction_kl=True,
        loss_type="bnpo",
        scale_rewards="none" if isinstance(loss, Lagrangian) else "group",  # combined advantages are scaled already
        importance_sampling_level="token",
        mask_truncated_completions=False,
        disable_dropout=True,
        cast_lm_head_to_fp32=False,
        entropy_coef=0.0,
        use_adaptive_entropy=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        sync_ref_model=False,
        shuffle_dataset=False,
    )

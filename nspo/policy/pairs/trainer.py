"""Learning from pairs of answers that are there before training starts: DPO, BFPO and W-DOOR on one trainer.

The trainer is transformers' own with another `compute_loss`; the losses are those of `nspo.policy.pairs.losses`,
the pairs those of `nspo.policy.pairs.stage`. TRL's `DPOTrainer` does not fit: it takes text, ends every answer with an
end-of-turn token, also one that was cut, and keeps no log-probability per token. (On the same tokens its DPO loss is
ours: a test compares them.) Optimizer, schedule, seed, number of updates and arithmetic are those of the other
objectives; an update sees one pair where theirs sees a group. What the base model gives the answers is computed once.

BFPO is its loss alone: the authors first train on helpful data, then on safety data with some of the former, and may
train chosen layers only. Here the layers are those of all methods, and the data hold both kinds.

W-DOOR differs from the authors' release in its data: the safe answer is the best of a group and no refusal written
beforehand; of a harmful answer, which half of the safe ones see the beginning of (1 to 100 tokens, as in the release),
the whole is unlearnt; the chosen answers to benign prompts take the place of Alpaca's.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from trl.trainer.utils import disable_dropout_in_model

from nspo.models.loading import load_model
from nspo.policy.arguments import shared_arguments
from nspo.policy.clock import Clock
from nspo.policy.log import LoggedCallback
from nspo.policy.pairs.batches import Collator, Pair, answer_logps, every_logps, in_order, with_prefixes
from nspo.policy.pairs.losses import bfpo_label, bfpo_loss, dpo_loss, role_weights, token_weights, wdoor_loss
from nspo.policy.pairs.stage import load_pairs
from nspo.preference.model import PreferenceModel
from nspo.settings.policy.losses import BFPO, DPO, WDOOR, AnyLoss
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.runtime import RuntimeSettings


class PairLearner:
    """Learns from a file of pairs.

    Attributes:
        cost: the cost model, for the probes.
        parts: callbacks that also add columns to the log.
    """

    def __init__(
        self, method: MethodSettings, model: Path, cost: Path, pairs: Path, guide: Path | None, device: torch.device
    ) -> None:
        """Load the cost model and read the pairs.

        Raises:
            UserError: no cost model, no pairs, or pairs of another model.
        """
        self.method, self.guide, self.device = method, guide, device
        self.cost = PreferenceModel.load(cost, "cost", device)
        self.pairs = [Pair.of(row) for row in load_pairs(pairs, model)]
        self.metrics = PairMetrics()
        self.parts: list[LoggedCallback] = [self.metrics, Clock()]
        self.order: list[Pair] = []
        self.per_update = 0

    def trainer(
        self,
        training: TrainingSettings,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        work: Path,
        runtime: RuntimeSettings,
        callbacks: list[TrainerCallback],
    ) -> "PairTrainer":
        """The trainer, which keeps its checkpoints in `work`; `policy` still is the base model."""
        disable_dropout_in_model(policy)
        pairs = with_prefixes(self.pairs, seed) if isinstance(self.method.loss, WDOOR) else self.pairs
        self.per_update = training.pairs_per_update
        count = training.steps * training.updates_per_step * self.per_update
        self.order = in_order(self._measured(pairs, training, policy, tokenizer), count, seed)
        return PairTrainer(
            self.method.loss,
            self.metrics,
            model=policy,
            args=trainer_arguments(training, self.method, seed, self.device, work, runtime),
            train_dataset=self.order,
            data_collator=Collator(tokenizer.pad_token_id),
            callbacks=callbacks,
        )

    def samples(self, step: int) -> list[dict[str, Any]]:
        """The answers that update `step` learnt from, as rows of the log."""
        return [
            {"step": step, "role": pair.role, "prompt": pair.prompt, "answer": side.text, "score": side.score}
            for pair in self.order[(step - 1) * self.per_update : step * self.per_update]
            for side in (pair.chosen, pair.rejected)
        ]

    def _measured(
        self,
        pairs: Sequence[Pair],
        training: TrainingSettings,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Pair]:
        """The pairs with all that the losses take from the base model, the guide and the scores."""
        how = (tokenizer.pad_token_id, training.micro_batch_size, training.autocast == "bf16")
        chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        known = list(every_logps(base, [*chosen, *rejected], *how, "base log-probabilities"))
        base_chosen, base_rejected = known[: len(pairs)], known[len(pairs) :]
        weights = [torch.ones_like(logps) for logps in base_chosen]
        counts = torch.ones(len(pairs))
        harmful = torch.tensor([pair.role == "harmful" for pair in pairs])
        if isinstance(loss := self.method.loss, WDOOR) and self.guide is not None:
            guide = every_logps(load_model(self.guide, self.device), chosen, *how, "log-probabilities of the guide")
            for index, logps in enumerate(guide):
                if harmful[index]:
                    weights[index] = token_weights(logps, base_chosen[index], loss.token_temperature)
            counts = role_weights(harmful, loss.safety_share)
        labels = bfpo_label(
            torch.tensor([side.safe for side in chosen]),
            torch.tensor([side.safe for side in rejected]),
            torch.tensor([pair.chosen.helpfulness >= pair.rejected.helpfulness for pair in pairs]),
        )
        return [
            replace(
                pair,
                chosen=replace(pair.chosen, base=base_chosen[index]),
                rejected=replace(pair.rejected, base=base_rejected[index]),
                label=labels[index].item(),
                token_weights=weights[index],
                weight=counts[index].item(),
            )
            for index, pair in enumerate(pairs)
        ]


class PairTrainer(Trainer):
    """transformers' trainer with the loss of a preference objective."""

    def __init__(self, loss: AnyLoss, metrics: "PairMetrics", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss, self.metrics = loss, metrics
        self.loss_is_scaled_for_ga = False  # it is a mean over the pairs of a micro-batch

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the loss over the pairs of a micro-batch that `Collator` made."""
        logps = answer_logps(model, inputs)
        chosen, rejected = (logps - inputs["base"]).sum(1).chunk(2)  # ln p / p_base
        self.metrics.add(chosen, rejected)
        return (self._losses(logps, chosen, rejected, inputs) * inputs["weight"]).mean()

    def _losses(self, logps: Tensor, chosen: Tensor, rejected: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """(B,)"""
        match self.loss:
            case DPO(beta=beta):
                return dpo_loss(chosen - rejected, beta)
            case BFPO(beta=beta):
                return bfpo_loss(chosen - rejected, inputs["label"], beta)
            case WDOOR(beta=beta):
                return wdoor_loss(logps.chunk(2)[0], inputs["token_weights"], rejected, inputs["harmful"], beta)
        raise AssertionError(self.loss)


class PairMetrics(LoggedCallback):
    """How far the policy tells chosen from rejected answers, before each update."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def add(self, chosen: Tensor, rejected: Tensor) -> None:
        """Take the log-ratios ln p/p_base (B,) of a micro-batch."""
        self.seen.append(torch.stack([chosen.detach(), rejected.detach()]))

    def columns(self, step: int) -> dict[str, float]:
        """Means over the pairs of the update: log-ratios, their difference, the share of pairs where it is positive."""
        chosen, rejected = gather(torch.cat(self.seen, 1).T.contiguous()).T
        self.seen = []
        return {
            "chosen_log_ratio": chosen.mean().item(),
            "rejected_log_ratio": rejected.mean().item(),
            "margin": (chosen - rejected).mean().item(),
            "accuracy": (chosen > rejected).float().mean().item(),
        }


def trainer_arguments(
    training: TrainingSettings,
    method: MethodSettings,
    seed: int,
    device: torch.device,
    work: Path,
    runtime: RuntimeSettings,
) -> TrainingArguments:
    """The trainer's configuration: as many updates as the other objectives take, each of `pairs_per_update` pairs."""
    share = training.pairs_per_update // training.processes
    size = math.gcd(share, max(1, training.micro_batch_size // 2))
    return TrainingArguments(
        **shared_arguments(training, method, seed, device, work, runtime),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=share // size,
        train_sampling_strategy="sequential",  # `in_order` has made the order
    )

"""Full fine-tuning of a reward or cost model, on TRL's RewardTrainer.

The trainer's own loss is Bradley-Terry on pairs. Added are Safe RLHF's sign terms for answers that people judged alone
(arXiv 2310.12773, eq. 6): per pair -log sigmoid(s c) of both answers. Answers that stand in no pair are matched, each
at least once, with a seeded random one of the other class. Token ids are those of `nspo.preference.model.encode`, so
the model learns on exactly what it will score, through its own forward pass.
"""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from nspo.models.folders.weights import saved_as_in_memory
from nspo.preference.model import Text
from nspo.preference.objective import CENTRE, Judgements
from nspo.run.devices import has_bf16
from nspo.run.progress import say
from nspo.settings.model import PreferenceSettings

SEED = 0


class SignCollator(DataCollatorForPreference):
    """TRL's batches with the signs of all higher, then of all lower answers: `signs` (2B,) float32."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """See `DataCollatorForPreference`."""
        signs = [example[key] for key in ("chosen_sign", "rejected_sign") for example in examples]
        return super().torch_call(examples) | {"signs": torch.tensor(signs, dtype=torch.float32)}


class SignedRewardTrainer(RewardTrainer):
    """RewardTrainer whose loss also asks for the sign of every answer that was judged alone."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss plus `sign_loss`."""
        signs = inputs.pop("signs")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + sign_loss(outputs.logits.squeeze(-1), signs)
        return (loss, outputs) if return_outputs else loss


def sign_loss(scores: Tensor, signs: Tensor) -> Tensor:
    """-log sigmoid(sign * score), summed over the two answers (2B,) of a pair, mean over pairs; sign 0 adds nothing."""
    return -2 * (signs.abs() * logsigmoid(signs * scores)).mean()


def training_pairs(judged: Judgements) -> list[tuple[int, int]]:
    """Places (higher, lower): the real pairs, and matches of the answers in none, as many as the larger class has."""
    order = random.Random(SEED)
    sides = [torch.nonzero(judged.alone & (judged.signs == sign)).flatten().tolist() for sign in (1, -1)]
    for side in sides:
        order.shuffle(side)
    count = max(map(len, sides)) if all(sides) else 0
    return [
        *((int(high), int(low)) for high, low in judged.pairs),
        *((sides[0][i % len(sides[0])], sides[1][i % len(sides[1])]) for i in range(count)),
    ]


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Text],
    judged: Judgements,
    settings: PreferenceSettings,
    work: Path,
    recompute: bool,
) -> None:
    """Train all weights of `model` in place; interrupted work in the folder `work` resumes, finished work is removed.

    Args:
        rows: every answer, from `encode`.
        recompute: activations, instead of keeping them (`runtime.recompute_activations`).
    """
    signs = judged.signs.tolist()
    signed = bool(judged.signs.any())
    data = Dataset.from_list(
        [
            {"chosen_ids": rows[high].ids, "rejected_ids": rows[low].ids}
            | {"chosen_sign": signs[high], "rejected_sign": signs[low]}
            for high, low in training_pairs(judged)
        ]
    )
    trainer = SignedRewardTrainer(
        model=model,
        args=trainer_arguments(settings, signed, model.device, work, recompute),
        data_collator=SignCollator(pad_token_id=tokenizer.pad_token_id),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    # The trainer writes its state file last: a checkpoint without one is half.
    whole = [path.parent for path in work.glob("checkpoint-*/trainer_state.json")]
    checkpoint = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    if checkpoint:
        say(f"resuming from {checkpoint.name}")
    with saved_as_in_memory(model):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.eval()
    shutil.rmtree(work)


def trainer_arguments(
    settings: PreferenceSettings, signed: bool, device: torch.device, work: Path, recompute: bool
) -> RewardConfig:
    """TRL's configuration with every field that shapes the result written out."""
    return RewardConfig(
        output_dir=str(work),
        seed=SEED,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        center_rewards_coefficient=None if signed else CENTRE,
        disable_dropout=True,
        max_length=None,
        gradient_checkpointing=recompute,
        use_cpu=device.type == "cpu",
        bf16=has_bf16(device),
        fp16=False,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=0.1,
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )

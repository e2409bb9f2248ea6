"""The production constraint does what the plain reference does, whatever the optimizer and whoever attaches it."""

from pathlib import Path

import pytest
import torch
from support.constrained import OPTIMIZERS, llama, llama_bases, llama_loss, llama_step
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from nspo import NullSpaceBases, NullSpaceCallback, constrain, freeze_uncovered
from nspo.constraint.anchors import copied_weights
from nspo.constraint.reference import reanchor

STEPS = 5


def trained_by_reference(optimizer: str) -> dict[str, Tensor]:
    """The weights after some steps, each put right by the reference."""
    model = llama()
    bases = llama_bases(model)
    freeze_uncovered(model, bases)
    base = {name: weight.float() for name, weight in copied_weights(model, bases.layers).items()}
    stepping = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    for seed in range(STEPS):
        llama_step(model, stepping, seed)
        reanchor(model, bases, base)
    return model.state_dict()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_as_the_reference(optimizer: str) -> None:
    """To rounding: a part in a million of the largest weight."""
    model = llama()
    bases = llama_bases(model)
    stepping = OPTIMIZERS[optimizer](model.parameters())
    constrain(model, stepping, bases, mode="anchor")
    for seed in range(STEPS):
        llama_step(model, stepping, seed)
    for name, expected in trained_by_reference(optimizer).items():
        torch.testing.assert_close(model.state_dict()[name], expected, atol=2e-6, rtol=0, msg=name)


class Steps(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The batches of `llama_loss`, one a step."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, seed: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "labels": ids}


class InOrder(Trainer):
    """A Trainer that takes the batches in their order."""

    def _get_train_sampler(self, *_: object) -> torch.utils.data.SequentialSampler:
        return torch.utils.data.SequentialSampler(Steps())


def trainer_of(model: nn.Module, bases: NullSpaceBases | Path, out: Path, **more: object) -> tuple[Trainer, object]:
    """A plain Trainer whose AdamW is the one of `OPTIMIZERS`, and its callback."""
    callback = NullSpaceCallback(model, bases, mode="anchor")
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        num_train_epochs=1,
        save_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **more,
    )
    collate = lambda rows: rows[0]  # noqa: E731
    return InOrder(model, arguments, data_collator=collate, train_dataset=Steps(), callbacks=[callback]), callback


def test_a_trainer_with_the_callback_trains_as_the_reference(tmp_path: Path) -> None:
    """One line is all that a Trainer needs, and a run that resumes keeps its anchor."""
    llama_bases(llama()).save(tmp_path / "bases.safetensors")
    model = llama()
    trainer, callback = trainer_of(model, tmp_path / "bases.safetensors", tmp_path / "whole")
    trainer.train()
    expected = trained_by_reference("adamw")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=name)
    assert 0 < max(callback.constraint.leakage().values()) <= 1e-6
    assert not any(p.requires_grad for name, p in model.named_parameters() if "norm" in name or "embed" in name)

    again = llama()
    resumed, callback = trainer_of(again, tmp_path / "bases.safetensors", tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in again.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], atol=1e-6, rtol=0, msg=name)
    assert max(callback.constraint.leakage().values()) <= 1e-6


def test_llama_loss_is_what_the_trainer_sees() -> None:
    """Both ways of training see the same batches."""
    model = llama()
    batch = Steps()[3]
    assert torch.equal(model(**batch).loss, llama_loss(model, 3))

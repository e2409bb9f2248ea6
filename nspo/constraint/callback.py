"""The constraint as a callback for the Trainer of transformers and TRL."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from nspo.bases.file import NullSpaceBases
from nspo.constraint.anchors import copied_weights
from nspo.constraint.constrain import constrain, freeze_uncovered
from nspo.constraint.hooks import Constraint, Mode
from nspo.run.progress import say


class NullSpaceCallback(TrainerCallback):
    """Keep the weights that a Trainer trains inside the null space of `bases`, and check it at every save.

    Build it from the base model before the trainer, which wraps the model: what no basis covers is frozen here, and the
    weights as they are now become the anchor W0, so a run that resumes from a checkpoint keeps the same anchor.
    In mode "gradient", which leaks by design, nothing is verified.

    Args:
        model: the base model, bare, its constrained weights in float32.
        bases: its bases, or their file.
        anchor: folder of the base checkpoint (safetensors), read instead of a copy of the weights kept in memory.
        mode: as `constrain`.
        freeze_rest: as `constrain`.

    Attributes:
        constraint: the `Constraint` at work, from the beginning of training on; None before.

    Raises:
        UserError: when the bases are not of this model.

    Example:
        >>> callback = NullSpaceCallback(model, "bases.safetensors")
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
        >>> trainer.train()
    """

    def __init__(
        self,
        model: nn.Module,
        bases: NullSpaceBases | Path | str,
        *,
        anchor: Path | str | None = None,
        mode: Mode = "anchor",
        freeze_rest: bool = True,
    ) -> None:
        self.bases = bases if isinstance(bases, NullSpaceBases) else NullSpaceBases.load(bases)
        self.mode, self.freeze_rest = mode, freeze_rest
        if anchor is None:
            self.bases.check_model(model)
        self.anchor: Path | str | Mapping[str, Tensor] = anchor or copied_weights(model, self.bases.layers)
        self.constraint: Constraint | None = None
        if freeze_rest:
            freeze_uncovered(model, self.bases)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach, once the trainer has prepared model and optimizer."""
        self.constraint = constrain(
            kwargs["model"],
            kwargs["optimizer"],
            self.bases,
            anchor=self.anchor,
            mode=self.mode,
            freeze_rest=self.freeze_rest,
        )
        say(self.constraint.describe())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to go on from weights that left the null space."""
        self.verify()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Verify the final weights and detach, so that the saved model is the constrained one."""
        self.verify()
        self.attached.remove()

    @property
    def attached(self) -> Constraint:
        """The constraint at work; training must have begun."""
        assert self.constraint is not None, "training has not begun"
        return self.constraint

    def verify(self) -> None:
        """As `Constraint.verify`; in mode "gradient" nothing is promised, so nothing is verified."""
        if self.mode != "gradient":
            self.attached.verify()

"""The line from a base model through a tuned one, W0 + a (W - W0), walked in memory.

The map is linear: an update that lies in a null space lies in it at every a. One model is held, its weights are set in
place; the tensors that training changed are kept twice more, as the base and as the tuned model have them.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nspo.errors import UserError
from nspo.models.loading import load_model


class Line:
    """A model in memory, the base at first, that can be moved along the line.

    Attributes:
        model: the model, in fp32.
        changed: names of the tensors that differ at the other end.
    """

    def __init__(self, model: PreTrainedModel, base: Path, tuned: Path) -> None:
        """Read where the line leads.

        Args:
            model: with the weights of the folder `base`; it is changed in place.
            tuned: folder of the model at a = 1, of the same architecture (adapters merged).

        Raises:
            UserError: tensors that differ in name or shape.
        """
        self.model = model
        ours, theirs = dict(model.named_parameters()), dict(load_model(tuned).named_parameters())
        if differing := sorted(
            name
            for name in ours.keys() | theirs.keys()
            if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
        ):
            raise UserError(
                f"{base} and {tuned} differ in the tensor {differing[0]}",
                expected="two checkpoints of one architecture",
                change="merge adapters first",
            )
        self._ends: dict[str, tuple[Tensor, Tensor]] = {}
        for name, parameter in ours.items():
            end = theirs[name].detach().to(parameter.device)
            if not torch.equal(parameter, end):
                self._ends[name] = parameter.detach().clone(), end
        self.changed = list(self._ends)

    @torch.no_grad()
    def to(self, scale: float) -> Self:
        """Set the weights to W0 + scale (W - W0); exact at 0 and 1, computed afresh everywhere else."""
        for name, (start, end) in self._ends.items():
            self.model.get_parameter(name).copy_(torch.lerp(start, end, scale))
        return self

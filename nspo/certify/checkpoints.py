"""Two checkpoints of one architecture on disk, read side by side in slices of rows.

Weights go by their names in memory (`nspo.models.folders.weights`). Neither model and no tensor is ever whole in
memory, but for those that transformers stacks or splits as it loads them: a slice is copied out of the mapped file, and
the file is closed after each tensor, so that the pages it touched are given back. Dtypes may differ; differences are
taken in float32.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nspo.errors import UserError
from nspo.models.folders.classes import empty_model, model_class, other_inputs
from nspo.models.folders.weights import Weights, open_weights
from nspo.models.loading import load_config
from nspo.models.structure.linears import Weight, locate

SLICE = 2**25  # values of a tensor in memory at a time: 128 MiB in float32


class CheckpointPair:
    """Two model folders with safetensors weights, sharded or not.

    Attributes:
        names: sorted names of the weights of both.
        ignored: stored tensors of either that their model never loads.
    """

    def __init__(self, base: Path, tuned: Path) -> None:
        """Compare what the two folders hold; no weight is read.

        A tied head may be stored or not: it is the embedding again, so one that only one side stores is left out.

        Raises:
            UserError: another architecture, weights that differ in name or shape, quantised weights, or a missing or
                broken file.
        """
        configs = [load_config(folder, f"{folder}") for folder in (base, tuned)]
        classes = [model_class(config).__name__ for config in configs]
        if classes[0] != classes[1]:
            raise UserError(
                f"the base {base} is a {classes[0]}, the tuned model {tuned} a {classes[1]}",
                expected="two checkpoints of one architecture",
            )
        self._config = configs[0]
        self._base, self._tuned = open_weights(base), open_weights(tuned)
        self.names = _common_names(self._base, self._tuned)
        self.ignored = sorted({*self._base.ignored, *self._tuned.ignored})
        for name in self.names:
            if (shape := list(self._base.shape(name))) != (found := list(self._tuned.shape(name))):
                raise UserError(
                    f"tensor {name} is {shape} in the base model and {found} in the tuned one",
                    expected="two checkpoints of one architecture",
                )

    def places(self, layers: Iterable[str]) -> dict[str, Weight]:
        """Where the model keeps the weights of these layers, experts too; no weight is loaded.

        Raises:
            UserError: for a layer that it lacks.
        """
        return locate(empty_model(self._config), layers)

    def sizes(self) -> dict[str, int]:
        """How many numbers each weight has."""
        return {name: math.prod(self._base.shape(name)) for name in self.names}

    def other_inputs(self) -> list[str]:
        """Kinds of input beside text that the model reads."""
        return other_inputs(self._config)

    def slices(self, name: str, place: Weight | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """W and dW = W_tuned - W of a tensor, (n, ...) float32 each, a few rows at a time.

        The difference is taken before anything else, so equal weights give exact zeros.

        Args:
            place: of the weight in the tensor that is wanted, whose slices are then (n, d).

        Raises:
            UserError: NaN or Inf, with the tensor's name.
        """
        shape, expert = self._base.shape(name), None if place is None else place.expert
        transposed = place is not None and place.transposed
        with self._base.open(name) as weights, self._tuned.open(name) as tuned:
            for part in _parts(shape, int(transposed and len(shape) == 2), expert):
                weight, update = weights[part].float(), tuned[part].float()
                for side, values in (("base", weight), ("tuned", update)):
                    if not torch.isfinite(values).all():
                        raise UserError(
                            f"tensor {name} of the {side} model holds NaN or Inf",
                            expected="finite weights",
                            change="train again",
                        )
                update = update - weight
                if transposed:
                    weight, update = weight.mT, update.mT
                yield (weight, update) if place is None else (weight.flatten(0, -2), update.flatten(0, -2))


def _parts(shape: tuple[int, ...], dim: int, only: int | None = None) -> Iterator[Any]:
    """Indices that cut a tensor along `dim` into slices of at most `SLICE` values (or of one row, or of row `only`)."""
    if not shape:
        yield ...
        return
    step = max(1, SLICE // max(1, math.prod(shape) // max(1, shape[dim])))
    first, end = (0, shape[dim]) if only is None else (only, only + 1)
    for start in range(first, end, step):
        yield (*[slice(None)] * dim, slice(start, min(start + step, end)))


def _common_names(base: Weights, tuned: Weights) -> list[str]:
    differing = (set(base.names) ^ set(tuned.names)) - base.tied
    if differing:
        name = min(differing)
        side = "base" if name in base.names else "tuned"
        raise UserError(
            f"{len(differing)} tensors are in one model only, first {name} (in the {side} model)",
            expected="two checkpoints of one architecture",
            change="merge adapters first",
        )
    return sorted(set(base.names) & set(tuned.names))

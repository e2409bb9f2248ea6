"""Two checkpoints of one architecture on disk, read side by side in slices of rows.

Weights go by their names in memory (`nspo.models.weights`). Neither model and no tensor is ever whole in memory, but
for those that transformers stacks or splits as it loads them: a slice is copied out of the mapped file, and the file
is closed after each tensor, so that the pages it touched are given back. Dtypes may differ; differences are taken in
float32.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nspo.errors import UserError
from nspo.models.classes import empty_model, model_class
from nspo.models.linears import is_transposed
from nspo.models.loading import load_config
from nspo.models.weights import Weights, open_weights

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
                f"the base {base} is a {classes[0]}, the tuned model {tuned} a {classes[1]}: expected two checkpoints "
                "of one architecture"
            )
        self._config = configs[0]
        self._base, self._tuned = open_weights(base), open_weights(tuned)
        self.names = _common_names(self._base, self._tuned)
        self.ignored = sorted({*self._base.ignored, *self._tuned.ignored})
        for name in self.names:
            if (shape := list(self._base.shape(name))) != (found := list(self._tuned.shape(name))):
                raise UserError(
                    f"tensor {name} is {shape} in the base model and {found} in the tuned one: expected two "
                    "checkpoints of one architecture"
                )

    def transposed_layers(self) -> set[str]:
        """Names of the modules that store their weight as (input, output); no weight is loaded."""
        return {name for name, module in empty_model(self._config).named_modules() if is_transposed(module)}

    def slices(self, name: str, transposed: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """W and dW = W_tuned - W of a tensor, (n, ...) float32 each, a few rows at a time.

        The difference is taken before anything else, so equal weights give exact zeros.

        Args:
            transposed: for a matrix stored as (input, output): slices of its transpose.

        Raises:
            UserError: NaN or Inf, with the tensor's name.
        """
        with self._base.open(name) as weights, self._tuned.open(name) as tuned:
            for part in _parts(self._base.shape(name), int(transposed)):
                weight, update = weights[part].float(), tuned[part].float()
                for side, values in (("base", weight), ("tuned", update)):
                    if not torch.isfinite(values).all():
                        raise UserError(
                            f"tensor {name} of the {side} model holds NaN or Inf, expected finite weights: train again"
                        )
                update = update - weight
                yield (weight.T, update.T) if transposed else (weight, update)


def _parts(shape: tuple[int, ...], dim: int) -> Iterator[Any]:
    """Indices that cut a tensor along `dim` into slices of at most `SLICE` values (or of one row)."""
    if not shape:
        yield ...
        return
    step = max(1, SLICE // max(1, math.prod(shape) // max(1, shape[dim])))
    for start in range(0, shape[dim], step):
        yield (*[slice(None)] * dim, slice(start, min(start + step, shape[dim])))


def _common_names(base: Weights, tuned: Weights) -> list[str]:
    differing = (set(base.names) ^ set(tuned.names)) - base.tied
    if differing:
        name = min(differing)
        side = "base" if name in base.names else "tuned"
        raise UserError(
            f"{len(differing)} tensors are in one model only, first {name} (in the {side} model): expected two "
            "checkpoints of one architecture (merge adapters first)"
        )
    return sorted(set(base.names) & set(tuned.names))

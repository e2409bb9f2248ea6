"""Two checkpoints of one architecture on disk, read side by side in slices of rows.

Neither model and no tensor is ever whole in memory: a slice is copied out of the mapped file, and the file is closed
after each tensor, so that the pages it touched are given back. Dtypes may differ; differences are taken in float32.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from nspo.errors import UserError
from nspo.models.files import check_model_files, weight_files
from nspo.models.linears import is_transposed
from nspo.models.loading import load_config

SLICE = 2**25  # values of a tensor in memory at a time: 128 MiB in float32


class _Tensor(NamedTuple):
    """Where a tensor lies, and its shape."""

    file: Path
    shape: list[int]


class CheckpointPair:
    """Two model folders with safetensors weights, sharded or not.

    Attributes:
        names: sorted names of the tensors of both.
    """

    def __init__(self, base: Path, tuned: Path) -> None:
        """Compare what the two folders hold; no weight is read.

        A tied head may be stored or not: it is the embedding again, so one that only one side stores is left out.

        Raises:
            UserError: another architecture, tensors that differ in name or shape, or a missing or broken file.
        """
        config, other = _config(base), _config(tuned)
        if config.architectures != other.architectures:
            raise UserError(
                f"the base {base} is a {_name(config)}, the tuned model {tuned} a {_name(other)}: expected two "
                "checkpoints of one architecture"
            )
        self._config = config
        self._base, self._tuned = _tensors(base), _tensors(tuned)
        self.names = _common_names(self._base, self._tuned, config.get_text_config().tie_word_embeddings)
        for name in self.names:
            if (shape := self._base[name].shape) != (found := self._tuned[name].shape):
                raise UserError(
                    f"tensor {name} is {shape} in the base model and {found} in the tuned one: expected two "
                    "checkpoints of one architecture"
                )

    def transposed_layers(self) -> set[str]:
        """Names of the modules that store their weight as (input, output); no weight is loaded."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._config, trust_remote_code=False)
        return {name for name, module in model.named_modules() if is_transposed(module)}

    def slices(self, name: str, transposed: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """W and dW = W_tuned - W of a tensor, (n, ...) float32 each, a few rows at a time.

        The difference is taken before anything else, so equal weights give exact zeros.

        Args:
            transposed: for a matrix stored as (input, output): slices of its transpose.

        Raises:
            UserError: NaN or Inf, with the tensor's name.
        """
        stored = self._base[name]
        with _open(stored.file) as before, _open(self._tuned[name].file) as after:
            weights, tuned = before.get_slice(name), after.get_slice(name)
            for part in _parts(stored.shape, int(transposed)):
                weight, update = weights[part].float(), tuned[part].float()
                for side, values in (("base", weight), ("tuned", update)):
                    if not torch.isfinite(values).all():
                        raise UserError(
                            f"tensor {name} of the {side} model holds NaN or Inf, expected finite weights: train again"
                        )
                update = update - weight
                yield (weight.T, update.T) if transposed else (weight, update)


def _parts(shape: list[int], dim: int) -> Iterator[Any]:
    """Indices that cut a tensor along `dim` into slices of at most `SLICE` values (or of one row)."""
    if not shape:
        yield ...
        return
    step = max(1, SLICE // max(1, math.prod(shape) // max(1, shape[dim])))
    for start in range(0, shape[dim], step):
        yield (*[slice(None)] * dim, slice(start, min(start + step, shape[dim])))


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: expected a Hugging Face model folder")
    return load_config(folder, f"{folder}")


def _name(config: Any) -> str:
    return (config.architectures or [config.model_type])[0]


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """An open safetensors file; what is read of it leaves memory with the last tensor that was taken from it."""
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): copy the checkpoint again") from error
    with file:
        yield file


def _tensors(folder: Path) -> dict[str, _Tensor]:
    """The tensors of a model by name, in the files that transformers reads."""
    check_model_files(folder, f"{folder}")
    found: dict[str, _Tensor] = {}
    for name, path in weight_files(folder, f"{folder}").items():
        with _open(path) as file:
            found[name] = _Tensor(path, file.get_slice(name).get_shape())
    return found


def _common_names(base: Mapping[str, _Tensor], tuned: Mapping[str, _Tensor], tied: bool) -> list[str]:
    differing = base.keys() ^ tuned.keys()
    if tied:
        differing = {name for name in differing if not name.endswith("lm_head.weight")}
    if differing:
        name = min(differing)
        side = "base" if name in base else "tuned"
        raise UserError(
            f"{len(differing)} tensors are in one model only, first {name} (in the {side} model): expected two "
            "checkpoints of one architecture (merge adapters first)"
        )
    return sorted(base.keys() & tuned.keys())

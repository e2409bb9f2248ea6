"""A checkpoint's weights by the names that they have in memory, read a tensor or a slice at a time.

The names on disk are another matter: transformers renames weights as it loads them, stacks experts, splits fused
projections, and undoes that as it saves. Its own rules are applied here, to names and empty tensors first, so that
what a checkpoint holds is known before a byte of a weight is read.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from nspo.errors import UserError
from nspo.models.folders.classes import empty_model
from nspo.models.folders.files import check_model_files, weight_files
from nspo.models.loading import load_config

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NOTHING = object()
SCALE = re.compile(r"scale|absmax|zero|qweight|quant|_blocks$|g_idx")  # what stands beside codes, however it is called


@dataclass(frozen=True)
class _Stored:
    """A tensor as it lies on disk; `dtype` as safetensors spells it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class _Source:
    """What a weight in memory is made from: one stored tensor, or several that a rule of transformers' converts."""

    target: str
    rule: WeightConverter | None
    stored: list[tuple[str, _Stored]] = field(default_factory=list)  # with the pattern of the rule that each matched


class Weights:
    """The weights of a model folder by their names in memory (see `open_weights`).

    Attributes:
        names: sorted.
        tied: names that the model shares with another weight, which a checkpoint may or may not store.
        ignored: stored tensors that the model never loads, such as heads that predict several tokens.
    """

    def __init__(self, folder: Path, model: PreTrainedModel | None) -> None:
        """The weights as the class of `model` loads them; without one, by the names on disk."""
        self.folder, self._model = folder, model
        self.tied = frozenset(getattr(model, "all_tied_weights_keys", None) or ())
        stored = stored_tensors(folder)
        if model is None:
            sources = {name: _Source(name, None, [(name, tensor)]) for name, tensor in stored.items()}
            self.ignored: list[str] = []
        else:
            sources, self.ignored = _sources(stored, model)
            _refuse_codes(folder, model, sources, self.ignored)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._of: dict[str, _Source] = {}
        for source in sources.values():
            for name, tensor in self._made(source, _empty).items():
                self._shapes[name], self._of[name] = tuple(tensor.shape), source
        self.names = sorted(self._shapes)
        self._last: tuple[_Source | None, dict[str, Tensor]] = (None, {})

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight."""
        return self._shapes[name]

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """A weight to take slices of, by index; what is read leaves memory with the last slice that was taken.

        Of a weight that several stored tensors make, all are read; they are kept until another such weight is opened.
        """
        source = self._of[name]
        if source.rule is None:
            ((_, stored),) = source.stored
            with _opened(stored.file) as file:
                yield file.get_slice(stored.name)
            return
        if self._last[0] is not source:
            self._last = source, self._made(source, _read)
        yield self._last[1][name]

    def read(self, name: str) -> Tensor:
        """A weight, whole, in the dtype that it is stored in.

        Raises:
            UserError: when the checkpoint has no such weight.
        """
        if name not in self._of:
            raise UserError(f"{self.folder} has no weight {name}", expected="the folder of this model")
        with self.open(name) as values:
            return values[...]

    def _made(self, source: _Source, take: Callable[[_Stored], Tensor]) -> dict[str, Tensor]:
        """The weights that a source makes, by name, of the tensors that `take` gives."""
        if source.rule is None:
            return {source.target: take(source.stored[0][1])}
        rule: Any = copy.deepcopy(source.rule)
        for pattern, stored in source.stored:
            rule.add_tensor(source.target, stored.name, pattern, take(stored))
        made = rule.convert(source.target, model=self._model, config=getattr(self._model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _refuse_codes(folder: Path, model: PreTrainedModel, sources: dict[str, _Source], ignored: list[str]) -> None:
    """Refuse a quantised checkpoint, whose numbers mean nothing without their scales."""
    known = model.state_dict()
    for name, source in sources.items():
        for _, stored in source.stored:
            if stored.dtype not in FLOATS and known[name].is_floating_point():
                raise UserError(_codes(folder, stored.name, f"codes ({stored.dtype})"))
    homes = {name.rpartition(".")[0] for name in sources}
    for name in ignored:
        home, _, last = name.rpartition(".")
        if SCALE.search(last) and {home, f"{model.base_model_prefix}.{home}"} & homes:
            raise UserError(_codes(folder, name, "the scale of codes"))


def _codes(folder: Path, name: str, what: str) -> str:
    return (
        f"{folder}: the tensor {name} holds {what}, expected the float weights of an unquantised model: write them "
        f"with `nspo prepare-model --source {folder} --wheels-dir . --out FOLDER`"
    )


def open_weights(folder: Path | str, like: nn.Module | None = None) -> Weights:
    """The weights of a model folder, known by name and shape and not yet read.

    Args:
        like: a model of this architecture, wrapped or not, whose class decides the names; none of transformers' has
            the names on disk. By default it is the class that the folder's configuration is loaded as.

    Raises:
        UserError: no model that transformers knows, a missing or broken file, or quantised weights.
    """
    folder = Path(folder)
    if like is None:
        return Weights(folder, empty_model(load_config(folder, f"{folder}")))
    bare = next((module for module in like.modules() if isinstance(module, PreTrainedModel)), None)
    return Weights(folder, None if bare is None else empty_model(bare.config, type(bare)))


@contextmanager
def saved_as_in_memory(model: Any) -> Iterator[None]:
    """While open, `save_pretrained` of a transformers model keeps the names and shapes that its weights have in memory.

    transformers' trainer reads its checkpoints back by those, and passes over every name that it does not know: a
    resumed run would go on from the base model for all that was renamed.
    """
    before = vars(model).get("_weight_conversions", NOTHING)
    model._weight_conversions = []
    try:
        yield
    finally:
        if before is NOTHING:
            del model._weight_conversions
        else:
            model._weight_conversions = before


def stored_tensors(folder: Path) -> dict[str, _Stored]:
    """What transformers would read of a folder, by the names on disk; copies in other forms are passed over.

    Raises:
        UserError: when there are no safetensors, or what the index names is missing or broken.
    """
    check_model_files(folder, f"{folder}")
    files: dict[Path, list[str]] = {}
    for name, path in weight_files(folder, f"{folder}").items():
        files.setdefault(path, []).append(name)
    if not files:
        raise UserError(f"{folder} holds no *.safetensors weights", expected="a Hugging Face model folder")
    found = {}
    for path, names in files.items():
        with _opened(path) as file:
            for name in names:
                part = file.get_slice(name)
                found[name] = _Stored(path, name, tuple(part.get_shape()), part.get_dtype())
    return found


def _sources(stored: dict[str, _Stored], model: PreTrainedModel) -> tuple[dict[str, _Source], list[str]]:
    """What the first weight of every source is made from, and what the model never loads: as transformers decides."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix, known = model.base_model_prefix, model.state_dict()
    sources: dict[str, _Source] = {}
    ignored = []
    for name in sorted(stored, key=dot_natural_key):  # the order of the experts, and that some rules count on
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target not in known:
            ignored.append(name)
            continue
        rule = None if pattern is None else of_pattern[pattern]
        sources.setdefault(target, _Source(target, rule)).stored.append((pattern or name, stored[name]))
    return sources, ignored


def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _empty(stored: _Stored) -> Tensor:
    return torch.empty(stored.shape, dtype=FLOATS.get(stored.dtype, torch.uint8), device="meta")


def _read(stored: _Stored) -> Tensor:
    with _opened(stored.file) as file:
        return file.get_tensor(stored.name)

"""Experts that lie together in one module, as transformers keeps those of its mixtures: found, and what each reads.

The module has two 3-D parameters, experts first: `gate_up_proj` (or `up_proj`, ungated) reads the vectors that the
block feeds all experts, `down_proj` what an expert made of those that were routed to it. It is called with the vectors
(N, d), the chosen experts (N, k) and their weights (N, k): transformers' `use_experts_implementation`. What the down
projection of an expert reads never leaves the module, so it is computed a second time; the model's pass is untouched.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nspo.errors import UserError
from nspo.models.structure.linears import is_transposed

TOLERANCE = 1e-3  # of the output rebuilt from the inputs: rounding is far below, another computation far above
_ROUTER = re.compile(r"gate|router")
_EXPERTS = re.compile(r"(^|\.)\w*experts?(\.|$)")
_OF_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)  # in the name of a class


@dataclass(frozen=True)
class Experts:
    """One such module.

    Attributes:
        name: its full name.
        module: the module.
        count: how many experts it holds.
    """

    name: str
    module: Any
    count: int

    @property
    def shared(self) -> str:
        """Name of the parameter that reads what all experts are fed."""
        return f"{self.name}.{self._up}"

    @property
    def own(self) -> str:
        """Name of the parameter whose experts each read their own vectors; with `.17` added, one of them."""
        return f"{self.name}.down_proj"

    @property
    def own_width(self) -> int:
        """Length of the vectors that a down projection reads."""
        return int(self.module.down_proj.shape[1 if self.module.is_transposed else 2])

    @property
    def _up(self) -> str:
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    def routed(self, given: inspect.BoundArguments, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the down projection of one expert reads (n, width), of which tokens (n,) int64, and their weights."""
        hidden, chosen, weights = list(given.arguments.values())[:3]
        rows = hidden.reshape(-1, hidden.shape[-1])
        tokens, place = (chosen.reshape(len(rows), -1) == expert).nonzero(as_tuple=True)
        made = self._apply(self._up, expert, rows[tokens])
        inputs = self.module._apply_gate(made) if self.module.has_gate else self.module.act_fn(made)
        return inputs, tokens, weights.reshape(len(rows), -1)[tokens, place]

    def fed(self, given: inspect.BoundArguments) -> Tensor:
        """What the block feeds all experts, (..., d)."""
        fed: Tensor = next(iter(given.arguments.values()))
        return fed

    def asked(self, given: inspect.BoundArguments) -> int:
        """How many experts every token asks."""
        return int(list(given.arguments.values())[1].shape[-1])

    def called(self, args: Any, kwargs: Any) -> inspect.BoundArguments:
        """The arguments of one call in the order of the module's `forward`."""
        return inspect.signature(self.module.forward).bind(*args, **kwargs)

    def check(self, given: inspect.BoundArguments, output: Tensor) -> None:
        """Refuse a module that computes something else than the outputs of its experts, weighted and summed up.

        Raises:
            UserError: when the output cannot be rebuilt from the inputs that `routed` gives.
        """
        rebuilt = torch.zeros_like(output.reshape(-1, output.shape[-1]))
        for expert in range(self.count):
            inputs, tokens, weights = self.routed(given, expert)
            made = self._apply("down_proj", expert, inputs)
            if self.module.has_post_expert_norm:
                made = self.module.post_expert_norm(made)
            rebuilt.index_add_(0, tokens, (made * weights[:, None]).to(rebuilt.dtype))
        error = (rebuilt - output.reshape(rebuilt.shape)).norm()
        if not error <= TOLERANCE * output.norm():
            raise UserError(
                f"the experts of {self.name} do not compute what their weights say (their output is off by "
                f"{float(error / output.norm()):.0e}), so their inputs are unknown: leave them out with "
                "`activations.layers`"
            )

    def _apply(self, attribute: str, expert: int, rows: Tensor) -> Tensor:
        weight = getattr(self.module, attribute)[expert]
        made = rows @ (weight if self.module.is_transposed else weight.T)
        return made + getattr(self.module, f"{attribute}_bias")[expert] if self.module.has_bias else made


def find_experts(modules: Mapping[str, nn.Module]) -> list[Experts]:
    """All such modules among `modules`, in their order."""
    found: dict[str, Any] = {name: module for name, module in modules.items() if _keeps_experts(module)}
    return [Experts(name, module, len(module.down_proj)) for name, module in found.items()]


def is_router(name: str, module: nn.Module, experts: Iterable[Experts]) -> bool:
    """Whether a linear layer scores the experts of its block: a change would send tokens to other experts."""
    for one in experts:
        block = one.name.rpartition(".")[0] + "."
        if name.startswith(block) and not name.startswith(f"{one.name}.") and _ROUTER.search(name.removeprefix(block)):
            return getattr(module, "out_features", None) == one.count
    return False


def unknown_experts(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of modules that keep experts in another form: in some other 3-D parameter, or in one matrix (DBRX).

    By what they are called: recurrent blocks and linear attention have 3-D parameters too.
    """
    for name, module in modules.items():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding) or is_transposed(module) or _keeps_experts(module):
            continue
        ranks = {sum(size > 1 for size in parameter.shape) for parameter in module.parameters(recurse=False)}
        named = _EXPERTS.search(name) is not None
        if (3 in ranks and (named or _OF_EXPERTS.search(type(module).__name__))) or (2 in ranks and named):
            yield name


def _keeps_experts(module: nn.Module) -> bool:
    marks = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")  # of transformers' decorator
    up = getattr(module, "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", None)
    parameters = (up, getattr(module, "down_proj", None))
    return all(hasattr(module, mark) for mark in marks) and all(
        isinstance(parameter, nn.Parameter) and parameter.ndim == 3 for parameter in parameters
    )

"""The constraint in its plainest form: slow, dense, in float64. What the production constraint is tested against."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nspo.bases.file import NullSpaceBases
from nspo.models.linears import find_linears, is_transposed


@torch.no_grad()
def reanchor(model: nn.Module, bases: NullSpaceBases, base: Mapping[str, Tensor]) -> None:
    """After an optimizer step: W <- W0 + (W - W0)(I - Q Q^T) for every layer of `bases`.

    Args:
        model: unwrapped, on one device.
        base: W0 by layer, (out, d), as `nn.Linear` holds it.
    """
    for name, module in find_linears(model, bases.layers).items():
        site, weight = bases.for_layer(name), module.weight.T if is_transposed(module) else module.weight
        dense = site.basis.double() @ site.basis.double().T
        free = dense if site.kind == "null" else torch.eye(site.width, dtype=torch.float64) - dense
        weight.copy_(base[name].double() + (weight.double() - base[name].double()) @ free)

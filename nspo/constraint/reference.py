"""The constraint in its plainest form: slow, dense, in float64. What the production constraint is tested against."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nspo.bases.file import NullSpaceBases
from nspo.models.structure.linears import find_weights


@torch.no_grad()
def reanchor(model: nn.Module, bases: NullSpaceBases, base: Mapping[str, Tensor]) -> None:
    """After an optimizer step: W <- W0 + (W - W0)(I - Q Q^T) for every layer of `bases`.

    Args:
        model: unwrapped, on one device.
        base: W0 by layer, (out, d), as `nn.Linear` holds it; of the experts that one name stands for (n, out, d).
    """
    for name, place in find_weights(model, bases.layers).items():
        site, weight = bases.for_layer(name), place.rows(place.parameter)
        dense = site.basis.double() @ site.basis.double().T
        free = dense if site.kind == "null" else torch.eye(site.width, dtype=torch.float64) - dense
        weight.copy_(base[name].double() + (weight.double() - base[name].double()) @ free)

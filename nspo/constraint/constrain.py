"""The constraint: weights may leave their anchor W0 only inside the null space of the protected inputs.

Exact for any torch optimizer because it acts on what the optimizer did, not on what it was given: after every step
D = W - W0, W <- W0 + P(D), with P(D) = D - (D Q) Q^T = (D U) U^T. P is linear, idempotent and non-expansive and acts on
rows, so momentum, decay, clipping and accumulation cannot leave the null space, no error accumulates, and
row-sharded weights need no communication (DeepSpeed's flat partitions do: `nspo.constraint.zero`).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nspo.bases.file import NullSpaceBases
from nspo.constraint.anchors import given_weights, holders, narrow, own_weights, saved_weights
from nspo.constraint.hooks import Constraint, Mode
from nspo.constraint.layers import Layer
from nspo.constraint.refusals import refuse_engines, refuse_late_freeze, refuse_weights
from nspo.constraint.zero import Partition, ZeroLayer, own_rows, partitions, zero_optimizer
from nspo.errors import UserError
from nspo.models.structure.coverage import block_weights, coverage
from nspo.models.structure.linears import Weight, canonical_name, find_weights, frobenius, whole_shape

ANCHOR_TOLERANCE = 1e-2  # a bf16-rounded checkpoint is a few 1e-3 off its anchor; another model is near 1


def freeze_uncovered(model: nn.Module, bases: NullSpaceBases) -> list[str]:
    """Freeze every parameter that no basis covers and drop its gradient; returns the canonical names.

    `constrain` does this too; call it yourself before wrapping in DDP, or to keep the rest out of the optimizer.

    Example:
        >>> frozen = freeze_uncovered(model, bases)
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    """
    covered = {id(weight.parameter) for weight in find_weights(model, bases.layers).values()}
    names = []
    for name, parameter in model.named_parameters():
        if id(parameter) not in covered:
            parameter.requires_grad_(False)
            parameter.grad = None
            names.append(canonical_name(name))
    return names


def constrain(
    model: nn.Module,
    optimizer: Any,
    bases: NullSpaceBases,
    *,
    anchor: Path | str | Mapping[str, Tensor] | None = None,
    mode: Mode = "anchor",
    freeze_rest: bool = True,
) -> Constraint:
    """Keep every step of `optimizer` inside the null space of the protected inputs.

    Call it once the weights are final: after loading, `fully_shard`, `DistributedDataParallel`, `deepspeed.initialize`
    and accelerate's `prepare`. Then train as ever: accumulation, clipping, loss scaling, torch.compile, autocast and
    steps with a closure (LBFGS) need no change.

    Args:
        model: the model, wrapped or not; its constrained weights in float32.
        optimizer: any torch optimizer that holds them, or the wrapper of it that accelerate or DeepSpeed returned.
        bases: their bases, checked against the model.
        anchor: the anchor W0, needed when a run resumes: folder of the base checkpoint (safetensors), or whole base
            weights by layer (all experts of a parameter by its name). Default: the weights as they are now.
        mode: "anchor" projects what the optimizer did; "both" the gradients before the step too, as exact but with more
            drift under Adam (docs/mathematics.md); "gradient" only the gradients, the paper's text, which leaks under
            Adam, momentum and decay. Clipping before the step, as trainers do it, acts on the raw gradient: in mode
            "anchor" that is the one that is used.
        freeze_rest: freeze every parameter that no basis covers, so that the guarantee covers all that moves.

    Raises:
        UserError: before any training, naming the layer, when the guarantee would not hold.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        >>> constraint = constrain(model, optimizer, bases)
        >>> loss = model(input_ids=ids, labels=ids).loss
        >>> loss.backward()
        >>> optimizer.step()
        >>> max(constraint.leakage().values()) < 1e-6
        True
    """
    if mode not in ("both", "anchor", "gradient"):
        raise UserError(f"mode {mode!r}", expected="'both', 'anchor' or 'gradient'", change="change `mode`")
    zero = zero_optimizer(optimizer)
    optimizer = innermost(optimizer)
    refuse_engines(model, optimizer, zero)
    bases.check_free()
    weights = bases.check_layers(model)
    if freeze_rest:
        refuse_late_freeze(model, weights, zero)
    parts = partitions(zero) if zero else None
    held = parts or {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    refuse_weights(model, weights, held, freeze_rest, zero)
    if anchor is None:
        base = own_weights(holders(weights))
    elif isinstance(anchor, Mapping):
        base, anchor = given_weights(anchor, holders(weights)), "the base"
    else:
        base = saved_weights(Path(anchor), model, holders(weights))
    layers = _layers(weights, bases, base, parts)

    if anchor is not None and mode != "gradient":
        worst = max((layer.leakage(), layer.name) for layer in layers)
        if worst[0] > ANCHOR_TOLERANCE:
            raise UserError(
                f"layer {worst[1]} is {worst[0]:.1e} away from {anchor} in the protected range",
                expected=f"at most {ANCHOR_TOLERANCE:.0e}",
                change="give the folder of the base that this run started from",
            )

    frozen = freeze_uncovered(model, bases) if freeze_rest else []
    covered = {id(layer.parameter) for layer in layers}
    free = {canonical_name(n): p for n, p in model.named_parameters() if p.requires_grad and id(p) not in covered}
    rest = sum(whole_shape(parameter).numel() for parameter in free.values())
    sizes = {canonical_name(name): whole_shape(p).numel() for name, p in model.named_parameters()}
    moving = sum(weight.size for name, weight in weights.items() if bases.for_layer(name).null_dim)
    found = coverage(block_weights(sizes, weights), moving, free)
    return Constraint(layers, frozen, rest, found, optimizer, mode)


def _layers(
    weights: Mapping[str, Weight],
    bases: NullSpaceBases,
    anchors: Iterable[tuple[str, Tensor]],
    parts: Mapping[int, Partition] | None,
) -> list[Layer]:
    """The constrained weights with their `anchors` by holder, of which each rank keeps its rows; `parts` under ZeRO.

    Raises:
        UserError: when the anchors are not the weights that the bases were computed for.
    """
    held: dict[str, list[str]] = {}
    for name, weight in weights.items():
        held.setdefault(weight.holder, []).append(name)
    norms, layers = {}, []
    on_device: dict[tuple[str, torch.device], Tensor] = {}  # layers of one site share one copy of its basis
    for holder, value in anchors:
        for name in held[holder]:
            place, site = weights[name], bases.for_layer(name)
            norms[name] = frobenius(place, value)
            rows = place.rows(value)
            key = (site.site, rows.device)
            if key not in on_device:
                on_device[key] = site.basis.to(key[1], torch.float32)
            kept = narrow((own_rows(rows) if parts else rows).clone())
            given = (name, place, place.parameter, kept, on_device[key], site.kind)
            layers.append(ZeroLayer(*given, parts[id(place.parameter)]) if parts else Layer(*given))
    bases.check_norms(norms)
    return layers


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper, or DeepSpeed's: the wrapper itself has no hooks."""
    optimizer = zero_optimizer(optimizer) or optimizer
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer

"""The constraint: weights may leave their anchor W0 only inside the null space of the protected inputs.

Exact for any torch optimizer because it acts on what the optimizer did, not on what it was given: after every step
D = W - W0, W <- W0 + P(D), with P(D) = D - (D Q) Q^T = (D U) U^T. P is linear, idempotent and non-expansive and acts on
rows, so momentum, decay, clipping and accumulation cannot leave the null space, no error accumulates, and
row-sharded weights need no communication (DeepSpeed's flat partitions do: `nspo.constraint.zero`).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nspo.bases.file import NullSpaceBases
from nspo.constraint.anchors import given_weights, holders, narrow, own_weights, saved_weights
from nspo.constraint.layers import Layer
from nspo.constraint.refusals import refuse_engines, refuse_late_freeze, refuse_weights
from nspo.constraint.zero import Partition, ZeroLayer, own_rows, partitions, zero_optimizer
from nspo.errors import UserError
from nspo.models.structure.coverage import block_weights, coverage, coverage_line
from nspo.models.structure.linears import Weight, canonical_name, find_weights, frobenius, matrices, whole_shape
from nspo.nullspace.projection import inner_product, project_, reanchor_, squared_norm

Mode = Literal["both", "anchor", "gradient"]
VERIFY_TOLERANCE = 1e-5
ANCHOR_TOLERANCE = 1e-2  # a bf16-rounded checkpoint is a few 1e-3 off its anchor; another model is near 1


class Constraint:
    """A constraint at work on an optimizer; made by `constrain`.

    Attributes:
        mode: "both", "anchor" or "gradient".
        frozen_names: canonical names of the parameters that `constrain` froze.
        unprotected_share: share of the trainable weights that no basis covers.
        coverage: shares of the blocks' weights that are constrained, frozen and unprotected
            (`nspo.models.structure.coverage`).

    Nothing here belongs in a checkpoint: a resumed run calls `constrain` again with the base folder as anchor.
    """

    def __init__(
        self,
        layers: list[Layer],
        frozen: list[str],
        rest: int,
        covered: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        mode: Mode,
    ):
        self._layers, self.mode, self.frozen_names, self.coverage = layers, mode, frozen, covered
        self.unprotected_share = rest / (rest + self._weights())
        self._stats: dict[str, Tensor] = {}  # of the last gradient of each layer
        self._along: dict[str, Tensor] = {}  # <g, W> of each layer when its last gradient came
        self._descent: dict[str, Tensor] = {}  # -<g, dW> of each layer's last step
        self._first: dict[str, Tensor] = {}  # of each layer's first step: squared norms before the anchor and after
        # Nothing to verify where leaking is by design, nor yet where ZeRO copies to the model after the hooks.
        self._verified = mode == "gradient" or any(isinstance(layer, ZeroLayer) for layer in layers)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _weights(self) -> int:
        return sum(layer.place.size for layer in self._layers)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Meet the gradients there are, or have the optimizer's closure show those it makes inside the step."""
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._meet_gradients(optimizer)
            return None

        def met() -> Any:
            loss = closure()
            self._meet_gradients(optimizer)
            return loss

        return (optimizer, met, *args[2:]), {name: kwargs[name] for name in kwargs.keys() - {"closure"}}

    def _meet_gradients(self, optimizer: Any) -> None:
        """Project them, unless the mode leaves them alone, and remember where the weights stand along them."""
        rescaled = getattr(optimizer, "grad_scale", None) is not None  # a fused step divides them in place
        for layer in self._layers:
            if not layer.steps:
                continue
            if self.mode != "anchor":
                self._project_gradient(layer)
            along = None if rescaled else layer.along_gradient()
            if along is None:
                self._along.pop(layer.name, None)
            else:
                self._along[layer.name] = along

    def _project_gradient(self, layer: Layer) -> None:
        with layer.gradient() as gradient:
            if gradient is None:
                self._stats.pop(layer.name, None)
                return
            products = torch.zeros(3, device=gradient.device)
            for matrix in matrices(gradient):
                raw = matrix.clone()
                project_(matrix, layer.basis, layer.kind)
                products += torch.stack([squared_norm(raw), squared_norm(matrix), inner_product(raw, matrix)])
            self._stats[layer.name] = products

    def _after_step(self, *_: Any) -> None:
        """Take the weights back to the null space; what is left of the step is measured along its gradient."""
        for layer in self._layers:
            if not layer.steps:
                continue
            if self.mode != "gradient":
                self._reanchor(layer)
            before, after = self._along.pop(layer.name, None), layer.along_gradient()
            if before is None or after is None:
                self._descent.pop(layer.name, None)
            else:
                self._descent[layer.name] = before - after
        if not self._verified:  # backstop: a write that did not land shows here, not after a day of training
            self.verify()
            self._verified = True

    def _reanchor(self, layer: Layer) -> None:
        first = layer.name not in self._first
        with layer.stepped() as rows:
            norms = torch.zeros(2, device=rows.device)
            for weight, anchor in zip(matrices(rows), matrices(layer.anchor), strict=True):
                norms[0] += squared_norm(weight - anchor) if first else 0
                reanchor_(weight, anchor, layer.basis, layer.kind)
                norms[1] += squared_norm(weight - anchor) if first else 0
            if first:
                self._first[layer.name] = norms

    def leakage(self) -> dict[str, float]:
        """{layer: ||(W - W0) Q||_F / ||W0 Q||_F}, Q the protected range. A collective for sharded weights."""
        return {layer.name: layer.leakage() for layer in self._layers}

    def verify(self, tolerance: float = VERIFY_TOLERANCE) -> None:
        """Check that the model's own weights satisfy the constraint now. A collective for sharded weights.

        Done after the first step too, but not under DeepSpeed, where the model follows the optimizer only later.

        Raises:
            UserError: naming the worst layer, or a weight that the model no longer uses.
        """
        for layer in self._layers:
            # FSDP2 shows gathered weights between forward and backward; everything else must still be what we bound.
            if layer.place.parameter is not layer.parameter and not isinstance(layer.parameter, DTensor):
                raise UserError(
                    f"layer {layer.name} got a new weight after constrain(): call constrain() once it is final"
                )
        leaks = self.leakage()
        worst = max(leaks, key=leaks.__getitem__)
        if not leaks[worst] <= tolerance:
            raise UserError(
                f"layer {worst} leaves the null space by {leaks[worst]:.1e}",
                expected=f"at most {tolerance:.0e}",
                change="something else writes to the weights after the optimizer step",
            )

    def step_stats(self) -> dict[str, float]:
        """What the last step did, over all constrained layers; empty before the first.

        `step_descent` is -<g, dW>, of the gradient g that the optimizer was given and of what really happened to the
        weights, momentum, decay and anchor included: positive where the step lowers the loss to first order. Only for
        projected gradients does a theorem promise that, so it is measured. In mode "both" it is the raw gradient's
        too, since dW lies where both agree. With a closure all count from its last call. None where the optimizer
        rescales gradients inside its step (fused, under loss scaling).

        Where gradients are projected also: `gradient_norm` and `projected_norm`, `kept`, their ratio (1 = the
        constraint was free), and `descent`, <g, P g>, taken from both gradients: at least 0 where P is the projector it
        should be (then it equals ||P g||^2). Under loss scaling the norms carry the scale, `kept` does not.

        A collective for sharded weights.
        """
        found: dict[str, float] = {}
        if self._stats:
            before, after, descent = self._total(self._stats)
            kept = (after / before) ** 0.5 if before > 0 else 0.0
            found = {"gradient_norm": before**0.5, "projected_norm": after**0.5, "kept": kept, "descent": descent}
        if self._descent:
            (found["step_descent"],) = self._total(self._descent)
        return found

    def first_kept(self) -> float | None:
        """||P D|| / ||D|| of the first step D: the share of its norm that the anchor left. A collective if sharded.

        None before it and in mode "gradient"; of a run that resumes, D counts from the base.
        """
        if not self._first:
            return None
        before, after = self._total(self._first)
        return (after / before) ** 0.5 if before > 0 else 0.0

    def _total(self, parts: Mapping[str, Tensor]) -> list[float]:
        """The sum over layers and shards of what is kept by layer."""
        found = [layer.total(parts[layer.name]) for layer in self._layers if layer.name in parts]
        total: Tensor = sum(values.double().cpu() for values in found)  # type: ignore[assignment]
        return [float(value) for value in total.reshape(-1)]

    def memory(self) -> dict[str, int]:
        """Bytes that the constraint holds on this rank beside model and optimizer: its anchor and its bases."""
        bases = {id(layer.basis): layer.basis.nbytes for layer in self._layers}
        return {"anchor": sum(layer.anchor.nbytes for layer in self._layers), "bases": sum(bases.values())}

    def describe(self) -> str:
        """One line: how much is constrained, frozen and unprotected, and the memory that costs."""
        memory = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in self.memory().items())
        idle = [layer.name for layer in self._layers if layer.kind == "null" and not layer.basis.shape[1]]
        stuck = f", {len(idle)} layers without a free direction ({', '.join(idle[:3])}{', ...' * (len(idle) > 3)})"
        return (
            f"null-space constraint ({self.mode}): {len(self._layers)} layers with {self._weights()} weights"
            f"{stuck if idle else ''}, {len(self.frozen_names)} parameters frozen, {self.unprotected_share:.1%} of the "
            f"trainable weights unprotected; {coverage_line(self.coverage)}; {memory}"
        )

    def remove(self) -> None:
        """Detach from the optimizer. Frozen parameters stay frozen."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


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

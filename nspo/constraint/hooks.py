"""The constraint at work: what it does around every step of an optimizer, and what it has measured there."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nspo.constraint.layers import Layer
from nspo.constraint.zero import ZeroLayer
from nspo.errors import UserError
from nspo.models.structure.coverage import coverage_line
from nspo.models.structure.linears import matrices
from nspo.nullspace.projection import inner_product, project_, reanchor_, squared_norm

Mode = Literal["both", "anchor", "gradient"]
VERIFY_TOLERANCE = 1e-5


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

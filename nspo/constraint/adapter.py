"""The null-space adapter: the constraint for LoRA users, exact by construction under any optimizer and any sharding.

A stock PEFT LoRA adapter adds B A to a weight W0 (out x d). With A = U^T frozen, U (d x r) free directions of what the
layer reads, and only B (out x r) trained, (B A) Q = B (U^T Q) = 0 whatever is written into B: no hook, nothing to undo.

It is not the same training as `nspo.constrain`. AdamW scales the coordinates B, so its step depends on the basis that
A happens to be (`constrain` acts on W itself); and A and B take r (d + out) numbers a layer, more than W once r nears
d. docs/mathematics.md compares the two. Needs PEFT: pip install 'nspo[lora]'.
Command: `python examples/null_space_adapter.py MODEL BASES TEXTS OUT`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nspo.bases.file import NullSpaceBases
from nspo.constraint.hooks import VERIFY_TOLERANCE
from nspo.errors import UserError
from nspo.models.structure.linears import canonical_name, is_transposed, locate
from nspo.nullspace.basis import SiteBasis
from nspo.nullspace.projection import protected_part, squared_norm

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"  # PEFT's own name, the one that trainers save and resume


def null_space_adapter(model: nn.Module, bases: NullSpaceBases, rank: int | None = None) -> "PeftModel":
    """Wrap `model` in a LoRA adapter that can move its weights only inside the null space; all else is frozen.

    Every layer that the bases list gets one, but those that have no free direction, which stay as they are. Train the
    result as any PEFT model; to go on from a saved adapter, load it into a new one of the same rank
    (`load_adapter(folder, "default", is_trainable=True)`, as the trainers do).

    Args:
        model: a transformers model without adapters, its weights as they are to stay, in any float dtype.
        bases: its bases, checked against the model.
        rank: the most directions of an adapter; where more are free, `free_directions` says which are taken. Default:
            all that are free.

    Raises:
        UserError: PEFT is missing; the model has an adapter, or is not the one of the bases; nothing is free; or
            `rank` is not from 1 to the most free directions of any input.

    Example:
        >>> adapted = null_space_adapter(model, bases, rank=2)
        >>> max(verify_adapter(adapted, bases).values()) < 1e-6
        True
    """
    peft = _peft()
    if isinstance(model, peft.PeftModel) or hasattr(model, "peft_config"):
        raise UserError(
            "the model has an adapter already", expected="a bare model", change="merge or unload the adapter first"
        )
    bases.check_free()
    bases.check_model(model)
    if experts := [name for name, weight in locate(model, bases.layers).items() if weight.experts]:
        raise UserError(
            f"the bases hold {experts[0]} and more experts of 3-D parameters, which no LoRA adapter of ours can hold: "
            "compute them without (`activations.layers`), or train the weights with constrain()"
        )
    most = max(site.null_dim for site in bases.values())
    if rank is not None and not 1 <= rank <= most:
        raise UserError(
            f"rank {rank}", expected=f"1 to {most}, the most free directions of an input", change="change `rank`"
        )
    ranks = {layer: min(rank or most, bases.for_layer(layer).null_dim) for layer in bases.layers}
    ranks = {layer: r for layer, r in ranks.items() if r > 0}
    config = peft.LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=ranks,
        alpha_pattern=ranks,  # alpha / r = 1: the adapter adds B A itself
        target_modules=list(ranks),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, config, adapter_name=ADAPTER)
    directions: dict[str, Tensor] = {}  # layers of one site share them
    for name, layer in _adapted_layers(adapted):
        site = bases.for_layer(name)
        if site.site not in directions:
            directions = {site.site: free_directions(site, ranks[name])}
        _fix(layer, directions[site.site])
    return adapted


def free_directions(site: SiteBasis, count: int) -> Tensor:
    """(d, count) float32: orthonormal columns inside the site's free space.

    Bases that store the free space give its last columns: those that rule `contrast` found most harmful against
    general, and that every other rule found least used by general inputs. Bases that store the protected range leave
    them unordered, so `count` random ones are drawn, the same at every call: a Gaussian, projected and orthonormalised.
    """
    if site.kind == "null":
        return site.basis[:, site.null_dim - count :]
    gaussian = torch.randn(site.width, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    protected = torch.linalg.qr(site.basis.double())[0]  # orthonormal to float64, which stored columns are not
    free = gaussian - protected @ (protected.T @ gaussian)
    return torch.linalg.qr(free)[0].float()


def verify_adapter(model: "PeftModel", bases: NullSpaceBases, tolerance: float = VERIFY_TOLERANCE) -> dict[str, float]:
    """Check that the adapters in `model` keep to the null space now; returns their leakage by layer.

    The leakage is ||(B A) Q||_F / ||W0 Q||_F, computed in float32 from A and B as they are.

    Raises:
        UserError: no LoRA, or several adapters; another kind of LoRA; a trainable weight other than a B; a layer that
            no basis covers; or leakage above `tolerance`. The line names the layer.

    Example:
        >>> leakage = verify_adapter(null_space_adapter(model, bases), bases)
        >>> sorted(leakage) == sorted(bases.layers)
        True
    """
    peft = _peft()
    if not isinstance(model, peft.PeftModel) or list(model.peft_config) != [ADAPTER]:
        found = list(getattr(model, "peft_config", {}))
        raise UserError(
            f"the model has the adapters {found}", expected=f"{[ADAPTER]}", change="make it with null_space_adapter"
        )
    layers = dict(_adapted_layers(model))
    allowed = {id(layer.lora_B[ADAPTER].weight) for layer in layers.values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in allowed:
            raise UserError(
                f"{canonical_name(name)} is trainable",
                expected="lora_B alone",
                change=(
                    "make the model with null_space_adapter and load saved weights into it "
                    f"(load_adapter(folder, {ADAPTER!r}, is_trainable=True))"
                ),
            )
    leaks = {}
    for name, layer in layers.items():
        if layer.lora_variant or layer.lora_bias[ADAPTER]:
            raise UserError(
                f"layer {name} has another kind of LoRA", expected="plain B A", change="make it with null_space_adapter"
            )
        leaks[name] = _leakage(layer, bases.for_layer(name))
    worst = max(leaks, key=leaks.__getitem__)
    if not leaks[worst] <= tolerance:
        raise UserError(
            f"the adapter of layer {worst} leaves the null space by {leaks[worst]:.1e}",
            expected=f"at most {tolerance:.0e}",
            change="make it with null_space_adapter and these bases, in float32",
        )
    return leaks


def merge_adapter(model: "PeftModel", bases: NullSpaceBases) -> nn.Module:
    """The base model with its adapters verified and merged into its weights; `model` is used up.

    Raises:
        UserError: as `verify_adapter`, or for base weights that are not float32: adding to narrower ones rounds every
            weight in all directions.

    Example:
        >>> merged = merge_adapter(null_space_adapter(model, bases), bases)
        >>> merged.save_pretrained("tuned")
    """
    verify_adapter(model, bases)
    for name, layer in _adapted_layers(model):
        dtype = layer.get_base_layer().weight.dtype
        if dtype != torch.float32:
            raise UserError(
                f"layer {name} has {str(dtype).removeprefix('torch.')} weights",
                expected="float32 to merge into",
                change="load the base model in float32 and the adapter into it",
            )
    merged: nn.Module = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    return merged


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers, by the name that each has in the bare model."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield canonical_name(name), module


def _fix(layer: Any, directions: Tensor) -> None:
    """A = U^T, and declared as never trainable, so that PEFT keeps it frozen when adapters are switched or loaded."""
    weight = layer.lora_A[ADAPTER].weight
    with torch.no_grad():
        weight.copy_(directions.T)
    weight.requires_grad_(False)
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, ADAPTER: ("lora_A",)}


@torch.no_grad()
def _leakage(layer: Any, site: SiteBasis) -> float:
    """||D Q||_F / ||W0 Q||_F of the update D that the adapter adds; 0 when it adds nothing."""
    update, weight = layer.get_delta_weight(ADAPTER).float(), layer.get_base_layer().weight.float()
    if is_transposed(layer.get_base_layer()):
        update, weight = update.T, weight.T
    basis = site.basis.to(weight.device)
    moved = float(squared_norm(protected_part(update, basis, site.kind)))
    base = float(squared_norm(protected_part(weight, basis, site.kind)))
    return (moved / base) ** 0.5 if moved > 0 else 0.0


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("the null-space adapter needs the package peft: pip install 'nspo[lora]'") from error
    return peft

"""Rivals that change what is trained or what is saved: LoRA, and projecting once, after training.

LoRA is PEFT's own, on every linear layer, merged where the policy is saved (arXiv 2507.17075: rank 1 suffices for
safety). `project_after` trains without constraint and keeps of the whole update dW what lies in the null space, at the
norm that dW had.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nspo.bases.file import NullSpaceBases
from nspo.constraint.adapter import merge_adapter
from nspo.constraint.anchors import holders, saved_weights
from nspo.errors import UserError
from nspo.models.structure.linears import find_weights
from nspo.nullspace.projection import project_

if TYPE_CHECKING:
    from peft import PeftModel


def lora(policy: PreTrainedModel, layers: Iterable[str], rank: int, alpha: int) -> "PeftModel":
    """`policy` with a LoRA adapter of `rank` on each of the linear `layers`; all else is frozen.

    Raises:
        UserError: when PEFT is missing.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("constraint lora needs the package peft: pip install 'nspo[lora]'") from error
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=sorted(layers), task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(policy, config)


def merged(trained: Any, bases: NullSpaceBases | None) -> dict[str, Tensor]:
    """The weights of a trained adapter and its base in one, by name in the bare model, tied ones once.

    With `bases` the adapter is first verified to keep to their null space.
    """
    whole: Any = trained.merge_and_unload(safe_merge=True) if bases is None else merge_adapter(trained, bases)
    return {name: value for name, value in whole.state_dict().items() if name not in whole.all_tied_weights_keys}


@torch.no_grad()
def project_after(policy: PreTrainedModel, bases: NullSpaceBases, base: Path) -> float:
    """W <- W0 + c P(W - W0) in place for every layer of the bases, with c such that the whole update keeps its norm.

    Returns:
        ||P dW|| / ||dW|| over all layers, before c.

    Raises:
        UserError: when nothing of the update is left.
    """
    weights = find_weights(policy, bases.layers)

    def projected() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of every layer: ||dW||^2, its weight to write to, W0, and P dW."""
        for holder, anchor in saved_weights(base, policy, holders(weights)):
            for layer, weight in weights.items():
                if weight.holder == holder:
                    site, rows, start = bases.for_layer(layer), weight.rows(weight.parameter), weight.rows(anchor)
                    update = rows - start
                    before = update.square().sum()
                    yield before, rows, start, project_(update, site.basis.to(update.device), site.kind)

    squares = [(float(before), float(update.square().sum())) for before, _, _, update in projected()]
    before, after = (sum(column) for column in zip(*squares, strict=True))
    if after == 0:
        raise UserError(
            "nothing of the update lies in the null space", expected="some", change="protect less (`bases.threshold`)"
        )
    scale = (before / after) ** 0.5
    for _, rows, start, update in projected():
        rows.copy_(start + scale * update)
    return 1 / scale

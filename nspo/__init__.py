"""Null-Space constrained Policy Optimization (arXiv 2512.11391): safety training that leaves general ability alone.

The public interface, for any PyTorch training loop::

    from nspo import NullSpaceBases, constrain

    bases = NullSpaceBases.load("bases.safetensors")
    constraint = constrain(model, optimizer, bases)
    constraint.leakage()

Names are loaded on first use, so that `nspo --help` and configuration errors never wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nspo import plot as plot
    from nspo.bases.card import push_to_hub as push_to_hub
    from nspo.bases.file import NullSpaceBases as NullSpaceBases
    from nspo.certify.certificate import verify as verify
    from nspo.constraint.adapter import merge_adapter as merge_adapter
    from nspo.constraint.adapter import null_space_adapter as null_space_adapter
    from nspo.constraint.adapter import verify_adapter as verify_adapter
    from nspo.constraint.callback import NullSpaceCallback as NullSpaceCallback
    from nspo.constraint.constrain import constrain as constrain
    from nspo.constraint.constrain import freeze_uncovered as freeze_uncovered
    from nspo.constraint.hooks import Constraint as Constraint

_PLACES = {
    "Constraint": "nspo.constraint.hooks:Constraint",
    "NullSpaceBases": "nspo.bases.file:NullSpaceBases",
    "NullSpaceCallback": "nspo.constraint.callback:NullSpaceCallback",
    "constrain": "nspo.constraint.constrain:constrain",
    "freeze_uncovered": "nspo.constraint.constrain:freeze_uncovered",
    "merge_adapter": "nspo.constraint.adapter:merge_adapter",
    "null_space_adapter": "nspo.constraint.adapter:null_space_adapter",
    "push_to_hub": "nspo.bases.card:push_to_hub",
    "verify": "nspo.certify.certificate:verify",
    "verify_adapter": "nspo.constraint.adapter:verify_adapter",
}
__all__ = [*sorted(_PLACES)]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return import_module("nspo.plot")
    if name not in _PLACES:
        raise AttributeError(f"module 'nspo' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute)

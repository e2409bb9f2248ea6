"""Null-Space constrained Policy Optimization (arXiv 2512.11391): safety training that leaves general ability alone.

The public interface, for any PyTorch training loop::

    from nspo import NullSpaceBases, constrain

    bases = NullSpaceBases.load("bases.safetensors")
    constraint = constrain(model, optimizer, bases)
    constraint.leakage()

Names are loaded on first use, so that `nspo --help` and configuration errors never wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nspo.bases import NullSpaceBases as NullSpaceBases
    from nspo.projection import Constraint as Constraint
    from nspo.projection import constrain as constrain

__all__ = ["Constraint", "NullSpaceBases", "constrain"]


def __getattr__(name: str) -> Any:
    if name == "NullSpaceBases":
        from nspo.bases import NullSpaceBases

        return NullSpaceBases
    if name in {"Constraint", "constrain"}:
        from nspo import projection

        return getattr(projection, name)
    raise AttributeError(f"module 'nspo' has no attribute {name!r}")

"""Candidate first steps: what Adam would do with a gradient at its first step, in every space and mode. Pure functions.

Adam's first step is -lr sign(g) (each moment is the gradient's own), so a mode is an order of two operations on g: the
sign and the projection P.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nspo.nullspace.basis import SiteBasis
from nspo.nullspace.projection import project_


@dataclass(frozen=True)
class Candidate:
    """One way to turn a gradient into a step.

    Attributes:
        space: the rule's name, "random", or "none" for no constraint.
        mode: "anchor", "both", "gradient"; for no constraint "sign" (Adam) or "plain" (gradient descent).
        sites: its bases by layer; empty for no constraint.
    """

    space: str
    mode: str
    sites: Mapping[str, SiteBasis]

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.space}, {self.mode}"


def first_step(candidate: Candidate, layer: str, gradient: Tensor) -> Tensor:
    """-step of one layer (out, d) float32, at no particular length, as a new tensor."""
    if not candidate.sites:
        return gradient.clone() if candidate.mode == "plain" else gradient.sign()
    site = candidate.sites[layer]
    basis = site.basis.to(gradient.device)
    if candidate.mode == "anchor":
        return project_(gradient.sign(), basis, site.kind)
    signs = project_(gradient.clone(), basis, site.kind).sign()
    return project_(signs, basis, site.kind) if candidate.mode == "both" else signs


def advantages(rewards: Tensor, group: int) -> Tensor:
    """(N,) GRPO's: rewards of N answers in groups, centred and divided by the group's standard deviation (+ 1e-4)."""
    rows = rewards.view(-1, group)
    return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-4)).view(-1)


def cost_of_gain(kl: float, gain: float) -> float | None:
    """KL / gain^2: what a squared gain costs in drift, whatever the length of the step. None without a gain."""
    return kl / gain**2 if gain > 0 else None


def dot(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """<A, B> over all layers."""
    total = sum(torch.linalg.vecdot(first[name], second[name], dim=1).double().sum() for name in second)
    return float(total)

"""Where a method's update may go, one class a constraint: `constraint.kind` says which.

How each acts on a model stands in `nspo/policy/methods/objectives.py`.
"""

from typing import ClassVar, Literal

from pydantic import Field

from nspo.settings.bases import SelectionSettings
from nspo.settings.types import Count, Section


class Constraint(Section):
    """What every constraint says of itself.

    Attributes:
        needs_bases: whether the method trains with bases.
        exact: whether every layer that the bases list stays in its null space, which the certificate then promises.
    """

    needs_bases: ClassVar[bool] = True
    exact: ClassVar[bool] = False


class WithBases(Constraint):
    """A constraint by bases: those of all methods, or its own."""

    bases: SelectionSettings | None = Field(
        None,
        description="Bases of its own from the same activations, by rule, threshold and weights; null: those of the "
        "section bases.",
    )


class Anchored(WithBases):
    """A constraint that brings the weights themselves back into a subspace."""

    mode: Literal["anchor", "both"] = Field(
        "anchor",
        description="anchor: after the optimizer's step, project what it did to the weights; both: the gradient before "
        "the step too.",
    )


class Unconstrained(Constraint):
    """No constraint."""

    needs_bases: ClassVar[bool] = False
    kind: Literal["none"] = Field("none", description="No constraint.")


class Exact(Anchored):
    """Every layer of the bases keeps to its null space."""

    exact: ClassVar[bool] = True
    kind: Literal["exact"] = Field("exact", description="Every layer of the bases keeps to its null space.")


class GradientOnly(WithBases):
    """Gradients are projected, weights are not: AdamW's moments and decay leak, how much is logged."""

    kind: Literal["gradient"] = Field("gradient", description="Gradients are projected, weights are not, and so leak.")


class RandomDirections(Anchored):
    """As exact, on random directions: equally many of every input."""

    kind: Literal["random"] = Field("random", description="As exact, on as many random directions.")


class MLPOnly(Anchored):
    """As exact on MLP layers, as in the authors' release; everything else trains freely."""

    kind: Literal["mlp"] = Field("mlp", description="As exact on MLP layers; all else trains freely.")


class ProjectAfter(WithBases):
    """No constraint while it trains; what is saved is the update's part in the null space, at the update's norm."""

    exact: ClassVar[bool] = True
    kind: Literal["after"] = Field("after", description="Projected once, after training, at the update's norm.")


class LoRA(Constraint):
    """PEFT's LoRA on every linear layer, merged where the policy is saved."""

    needs_bases: ClassVar[bool] = False
    kind: Literal["lora"] = Field("lora", description="LoRA on every linear layer, merged at the end.")
    rank: Count = Field(8, description="Rank of every adapter.")
    alpha: Count = Field(16, description="LoRA's alpha: the adapter counts alpha / rank times.")


class NullSpaceAdapter(WithBases):
    """LoRA that cannot leave the null space: A spans free directions and is frozen, B is trained."""

    exact: ClassVar[bool] = True
    kind: Literal["adapter"] = Field("adapter", description="LoRA whose A is frozen in the null space.")
    rank: Count | None = Field(None, description="Free directions of an adapter; null: all of them.")


class GeneralGradients(Constraint):
    """OGPSA: gradients lose what the gradients of general tasks point along."""

    needs_bases: ClassVar[bool] = False
    kind: Literal["ogpsa"] = Field("ogpsa", description="OGPSA: gradients orthogonal to those of general tasks.")
    prompts: Count = Field(40, description="Reference prompts per general domain.")
    refresh: Count = Field(30, description="Updates after which the reference gradients are taken anew.")


AnyConstraint = (
    Unconstrained
    | Exact
    | GradientOnly
    | RandomDirections
    | MLPOnly
    | ProjectAfter
    | LoRA
    | NullSpaceAdapter
    | GeneralGradients
)

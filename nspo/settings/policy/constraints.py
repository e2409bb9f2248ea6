"""Where a method's update may go, one class a constraint: `constraint.kind` says which.

How each acts on a model stands in `nspo/policy/objectives.py`.
"""

from typing import ClassVar, Literal

from pydantic import Field

from nspo.settings.types import Section


class Constraint(Section):
    """What every constraint says of itself.

    Attributes:
        needs_bases: whether the method trains with bases.
        exact: whether every layer that the bases list stays in its null space, which the certificate then promises.
    """

    needs_bases: ClassVar[bool] = True
    exact: ClassVar[bool] = False


class Anchored(Constraint):
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


class GradientOnly(Constraint):
    """Gradients are projected, weights are not: AdamW's moments and decay leak, how much is logged."""

    kind: Literal["gradient"] = Field("gradient", description="Gradients are projected, weights are not, and so leak.")


class RandomDirections(Anchored):
    """As exact, on random directions: equally many of every input."""

    kind: Literal["random"] = Field("random", description="As exact, on as many random directions.")


class MLPOnly(Anchored):
    """As exact on MLP layers, as in the authors' release; everything else trains freely."""

    kind: Literal["mlp"] = Field("mlp", description="As exact on MLP layers; all else trains freely.")


AnyConstraint = Unconstrained | Exact | GradientOnly | RandomDirections | MLPOnly

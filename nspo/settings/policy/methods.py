"""A method of the comparison: a loss and a constraint, spelt out or by a known name."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, model_validator

from nspo.settings.bases import SelectionSettings
from nspo.settings.policy.constraints import AnyConstraint, Unconstrained, WithBases
from nspo.settings.policy.losses import GRPO, AnyLoss, RolloutLoss
from nspo.settings.types import Section

Objective = Literal[
    "nspo",
    "grpo_no_kl",
    "grpo",
    "random_projector",
    "gradient_only",
    "release",
    "nspo_lagrangian",
    "grpo_lagrangian",
    "dpo",
    "bfpo",
    "wdoor",
    "nspo_dpo",
    "nspo_bfpo",
    "nspo_wdoor",
    "nspo_both",
    "nspo_paper",
    "project_after",
    "lora",
    "null_space_adapter",
    "ogpsa",
    "replay_kl",
    "l2_sp",
]
Keys = Mapping[str, Any]
PAPER = {"rule": "relative", "threshold": 5.0e-4, "weights": {"benign": 0.0}}  # general inputs only
PRESETS: dict[Objective, tuple[Keys, Keys]] = {  # loss and constraint
    "nspo": ({"kind": "grpo"}, {"kind": "exact"}),
    "grpo_no_kl": ({"kind": "grpo"}, {"kind": "none"}),
    "grpo": ({"kind": "grpo", "kl": 0.04}, {"kind": "none"}),
    "random_projector": ({"kind": "grpo"}, {"kind": "random"}),
    "gradient_only": ({"kind": "grpo"}, {"kind": "gradient"}),
    "release": ({"kind": "grpo"}, {"kind": "mlp"}),
    "nspo_lagrangian": ({"kind": "lagrangian"}, {"kind": "exact"}),
    "grpo_lagrangian": ({"kind": "lagrangian"}, {"kind": "none"}),
    "dpo": ({"kind": "dpo"}, {"kind": "none"}),
    "bfpo": ({"kind": "bfpo"}, {"kind": "none"}),
    "wdoor": ({"kind": "wdoor"}, {"kind": "none"}),
    "nspo_dpo": ({"kind": "dpo"}, {"kind": "exact"}),
    "nspo_bfpo": ({"kind": "bfpo"}, {"kind": "exact"}),
    "nspo_wdoor": ({"kind": "wdoor"}, {"kind": "exact"}),
    "nspo_both": ({"kind": "grpo"}, {"kind": "exact", "mode": "both"}),
    "nspo_paper": ({"kind": "grpo"}, {"kind": "gradient", "bases": PAPER}),
    "project_after": ({"kind": "grpo"}, {"kind": "after"}),
    "lora": ({"kind": "grpo"}, {"kind": "lora"}),
    "null_space_adapter": ({"kind": "grpo"}, {"kind": "adapter"}),
    "ogpsa": ({"kind": "grpo"}, {"kind": "ogpsa"}),
    "replay_kl": ({"kind": "grpo", "replay_kl": 1.0}, {"kind": "none"}),
    "l2_sp": ({"kind": "grpo", "l2_sp": 1.0}, {"kind": "none"}),
}
SHAPING = ("kl", "l2_sp", "replay_kl")  # terms of a loss that pull to the base model


def _schema_of_a_preset(schema: dict[str, Any]) -> None:
    """An axis of a preset may leave out its kind, so it may fit several; without a preset both axes are given."""
    for axis in ("loss", "constraint"):
        schema["properties"][axis]["anyOf"] = schema["properties"][axis].pop("oneOf")
    schema["anyOf"] = [{"required": ["objective"]}, {"required": ["loss", "constraint"]}]


class MethodSettings(Section):
    """One line of the comparison: what is minimised (`loss`), and where the update may go (`constraint`)."""

    model_config = ConfigDict(json_schema_extra=_schema_of_a_preset)

    objective: Objective | None = Field(
        None,
        exclude=True,
        description="A known pair of loss and constraint, by name (config/README.md lists them); keys of `loss` and "
        "`constraint` that are given beside it count instead of its own.",
    )
    learning_rate: PositiveFloat = Field(
        description="AdamW learning rate. Projection shrinks the step, so tune per method."
    )
    loss: Annotated[AnyLoss, Field(discriminator="kind")] = Field(
        GRPO(), description="What is minimised. Kinds: grpo, lagrangian, dpo, bfpo, wdoor."
    )
    constraint: Annotated[AnyConstraint, Field(discriminator="kind")] = Field(
        Unconstrained(),
        description="Where the update may go. Kinds: none, exact, gradient, random, mlp, after, lora, adapter, ogpsa.",
    )

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, given: Any) -> Any:
        """Put the loss and the constraint of a known name in its place, under the keys that are given."""
        if not isinstance(given, Mapping):
            return given
        name, keys = given.get("objective"), {key: value for key, value in given.items() if key != "objective"}
        if name is None:
            if missing := {"loss", "constraint"} - set(keys):
                raise ValueError(f"found no {min(missing)}, expected `loss` and `constraint`, or `objective`")
            return keys
        if not isinstance(name, str) or name not in PRESETS:
            return given
        for axis, preset in zip(("loss", "constraint"), PRESETS[name], strict=True):
            own = keys.get(axis, {})
            if isinstance(own, Mapping):
                keys[axis] = {**(preset if own.get("kind", preset["kind"]) == preset["kind"] else {}), **own}
        return keys

    @property
    def plain(self) -> bool:
        """Whether nothing but the loss shapes the policy: no constraint and no term that pulls to the base model."""
        return isinstance(self.constraint, Unconstrained) and not self.pulls

    @property
    def own_bases(self) -> SelectionSettings | None:
        """How bases of the method's own are chosen; None: it trains with those of all, or with none."""
        return self.constraint.bases if isinstance(self.constraint, WithBases) else None

    @property
    def pulls(self) -> list[str]:
        """The terms of the loss that pull to the base model."""
        return [name for name in SHAPING if getattr(self.loss, name, 0.0) > 0]

    @property
    def title(self) -> str:
        """The name of the known pair that this is, up to learning rate and weights; else both kinds."""
        for name in PRESETS:
            known = MethodSettings(objective=name, learning_rate=1.0)
            if (
                known.loss.kind == self.loss.kind
                and known.pulls == self.pulls
                and _alike(known.constraint, self.constraint)
            ):
                return name
        return "+".join((self.loss.kind, *self.pulls, self.constraint.kind))

    @property
    def kl(self) -> float:
        """Weight of the KL term."""
        return self.loss.kl if isinstance(self.loss, RolloutLoss) else 0.0

    def twin_of(self, other: "MethodSettings") -> bool:
        """Whether this is `other` without constraint and KL term, which `other` is compared with."""
        return self.plain and not other.plain and self.loss.kind == other.loss.kind


def _alike(known: AnyConstraint, other: AnyConstraint) -> bool:
    """Whether a constraint is that of a known name: of its kind, mode and bases."""
    return all(getattr(known, key, None) == getattr(other, key, None) for key in ("kind", "mode", "bases"))

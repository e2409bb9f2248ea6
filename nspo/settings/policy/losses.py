"""What a method minimises, one class a loss: `loss.kind` says which, and each has its own keys and no others."""

from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from nspo.settings.types import Count, Section


class RolloutLoss(Section):
    """A loss on answers that the policy samples as it trains."""

    on_pairs: ClassVar[bool] = False
    kl: float = Field(0.0, ge=0, description="Weight of the KL term to the base model; 0.04 is usual.")
    l2_sp: float = Field(0.0, ge=0, description="Weight a of a/2 ||W - W0||^2, the pull to the base weights (L2-SP).")
    replay_kl: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL from the base model on its own answers to the prompts behind the bases.",
    )
    replay_prompts: Count = Field(40, description="Prompts per domain that are replayed, as activations.samples.")


class GRPO(RolloutLoss):
    """GRPO on the safety reward."""

    kind: Literal["grpo"] = Field("grpo", description="GRPO on the safety reward.")


class Lagrangian(RolloutLoss):
    """GRPO on the most reward whose mean cost keeps to a limit, with a multiplier (Safe RLHF's objective)."""

    kind: Literal["lagrangian"] = Field("lagrangian", description="GRPO on reward whose mean cost keeps to a limit.")
    cost_limit: float = Field(
        0.0, description="The mean cost of all answers that is allowed; an answer above 0 is harmful."
    )
    multiplier_init: PositiveFloat = Field(1.0, description="The multiplier of the cost at the start.")
    multiplier_lr: PositiveFloat = Field(
        0.1, description="How fast the logarithm of the multiplier follows the mean cost, once per rollout."
    )
    multiplier_max: PositiveFloat = Field(5.0, description="The largest multiplier; reaching it is reported.")

    @model_validator(mode="after")
    def _starts_below_its_maximum(self) -> Self:
        if self.multiplier_init > self.multiplier_max:
            raise ValueError(
                f"multiplier_init ({self.multiplier_init}) is above multiplier_max ({self.multiplier_max}): lower it"
            )
        return self


class PairLoss(Section):
    """A loss on pairs of a better and a worse answer that are there before training starts (`policy.pairs`)."""

    on_pairs: ClassVar[bool] = True
    beta: PositiveFloat = Field(0.1, description="How closely the policy is held to the base model.")


class DPO(PairLoss):
    """Direct preference optimization."""

    kind: Literal["dpo"] = Field("dpo", description="Direct preference optimization.")


class BFPO(PairLoss):
    """Bi-factorial preference optimization: what is safe and what is helpful sets the distance of a pair."""

    kind: Literal["bfpo"] = Field("bfpo", description="Bi-factorial preference optimization.")


class WDOOR(PairLoss):
    """W-DOOR: answer safely even after a harmful beginning, unlearn harmful answers; tokens are weighed by a guide."""

    kind: Literal["wdoor"] = Field("wdoor", description="W-DOOR, which weighs tokens.")
    token_temperature: PositiveFloat = Field(
        1.0, description="How evenly the tokens of a safe answer count; lower stresses those that decide a refusal."
    )
    safety_share: float = Field(
        0.2, gt=0, lt=1, description="Weight of the loss on harmful prompts; the rest keeps answers to benign ones."
    )
    guide: str = Field("dpo", description="The method with loss dpo whose policy says how much each token counts.")


AnyLoss = GRPO | Lagrangian | DPO | BFPO | WDOOR

"""Settings of the activations and of the bases."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from nspo.settings.types import Count, Pattern, Section, Whole, source_of


class ActivationSettings(Section):
    """Which inputs K of the linear layers are collected, from the model's own answers to general tasks."""

    samples: Count = Field(
        40, description="Prompts per general domain; half that many more, of the validation split, measure the bases."
    )
    harmful_samples: Whole = Field(
        60,
        description="Harmful training prompts whose inputs are collected too (for the rule `contrast`); 0: none.",
    )
    benign_samples: Whole = Field(
        40,
        description="Harmless look-alike training prompts that join the protected inputs as a domain; 0: none.",
    )
    max_prompt_tokens: Count = Field(256, description="Longer prompts are left out.")
    max_new_tokens: Whole = Field(48, description="Tokens of the model's own greedy answer; 0 collects prompts only.")
    drop_first: Whole = Field(1, description="Leading positions left out: the first token is an attention sink.")
    tokens_per_domain: Whole = Field(
        0, description="Most tokens kept of a domain, spread evenly over its sequences; 0 keeps all."
    )
    layers: Pattern = Field(
        ".*",
        description="Regular expression for the full names of the linear layers that are collected and trained.",
    )
    storage: Literal["auto", "raw", "moments"] = Field(
        "auto", description="raw: one row per token; moments: exact second moments; auto: raw while it fits the budget."
    )
    disk_budget_gb: PositiveFloat = Field(
        2.0, description="With auto: a site whose raw rows would exceed its share uses moments."
    )


class BasesSettings(Section):
    """Which directions of each site's input are protected."""

    rule: Literal["energy", "relative", "absolute", "rank", "fraction", "leakage", "contrast"] = Field(
        "contrast", description="How the protected range is chosen; docs/mathematics.md says what each rule means."
    )
    threshold: float = Field(
        3.0,
        ge=0,
        description="energy: share of the trace to protect; relative: of the largest eigenvalue; absolute: eigenvalue; "
        "rank: directions; fraction: of the width; leakage: target on validation inputs; "
        "contrast: how many times more harmful than general a freed direction is.",
    )
    weights: dict[str, float] = Field(
        {}, description="How much a token of a domain counts among the protected inputs, by name; 1 where not named."
    )
    jobs: Count = Field(
        1, description="Jobs that share out the sites; the file is the same. On a cluster each is submitted alone."
    )
    precomputed: Annotated[str, source_of("path", "hub")] | None = Field(
        None, description="Bases to use instead: a file or hub:ORG/NAME@REVISION. Skips collection and bases."
    )

    @model_validator(mode="after")
    def _threshold_fits_rule(self) -> Self:
        if self.rule not in {"absolute", "rank", "contrast"} and self.threshold > 1:
            raise ValueError(f"threshold {self.threshold} is a share for rule {self.rule!r}: expected 0 to 1")
        if self.rule == "rank" and self.threshold != int(self.threshold):
            raise ValueError(f"threshold {self.threshold} counts directions for rule 'rank': expected a whole number")
        if negative := [name for name, weight in self.weights.items() if weight < 0]:
            raise ValueError(f"weights: {negative[0]} is {self.weights[negative[0]]}, expected at least 0")
        return self

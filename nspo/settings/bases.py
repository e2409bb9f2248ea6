"""Settings of the activations, of the bases, and of the screen that compares bases before training."""

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
    images: Annotated[str, source_of("path")] | None = Field(
        None,
        description="Folder of images with a metadata.jsonl of rows `file_name` and `prompt`, so that a multimodal "
        "model's image inputs are protected too, as the domain `image`; docs/models.md. null: text alone.",
    )
    max_prompt_tokens: Count = Field(256, description="Longer prompts are left out; an image counts for nothing.")
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


class SelectionSettings(Section):
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

    @property
    def name(self) -> str:
        """The choice as a file name: `relative-0.0005-benign0`."""
        weights = "".join(f"-{domain}{weight:g}" for domain, weight in sorted(self.weights.items()))
        return f"{self.rule}-{self.threshold:g}{weights}"

    @model_validator(mode="after")
    def _threshold_fits_rule(self) -> Self:
        if self.rule not in {"absolute", "rank", "contrast"} and self.threshold > 1:
            raise ValueError(f"threshold {self.threshold} is a share for rule {self.rule!r}, expected 0 to 1")
        if self.rule == "rank" and self.threshold != int(self.threshold):
            raise ValueError(f"threshold {self.threshold} counts directions for rule 'rank', expected a whole number")
        if negative := [name for name, weight in self.weights.items() if weight < 0]:
            raise ValueError(f"weights: {negative[0]} is {self.weights[negative[0]]}, expected at least 0")
        return self


class BasesSettings(SelectionSettings):
    """Which directions of each site's input are protected, and how they are computed."""

    jobs: Count = Field(
        1, description="Jobs that share out the sites; the file is the same. On a cluster each is submitted alone."
    )
    precomputed: Annotated[str, source_of("path", "hub", "storage")] | None = Field(
        None,
        description="Bases to use instead: a file, hub:ORG/NAME@REVISION, or what a plugin of Snakemake fetches "
        "(s3://..., https://...). Skips collection and bases.",
    )


class ScreenSettings(Section):
    """First steps from one rollout, compared by what they cost in drift for what they gain."""

    enabled: bool = Field(False, description="Whether the workflow runs the screen and the page shows it.")
    answers: list[Count] = Field(
        [16, 64, 256],
        min_length=1,
        description="Answers behind the gradient: every step is taken with each of these, the first so many of one "
        "sample; multiples of policy.group_size.",
    )
    rules: dict[str, SelectionSettings] = Field(
        {
            "contrast 2": SelectionSettings(rule="contrast", threshold=2.0),
            "contrast 3": SelectionSettings(rule="contrast", threshold=3.0),
            "contrast 5": SelectionSettings(rule="contrast", threshold=5.0),
            "energy 0.9": SelectionSettings(rule="energy", threshold=0.9),
            "relative 5e-4": SelectionSettings(rule="relative", threshold=5.0e-4),
        },
        min_length=1,
        description="Rules and thresholds that are tried, by name, each with every mode.",
    )
    modes: list[Literal["anchor", "both", "gradient"]] = Field(
        ["anchor", "both", "gradient"],
        min_length=1,
        description="anchor: P sign(g), what Adam's first step does when it is projected; both: P sign(P g); gradient: "
        "sign(P g), which leaks.",
    )
    gain_prompts: Count = Field(
        16, description="Validation prompts, each with policy.group_size answers, on which the gain is measured."
    )
    general_prompts: Count = Field(
        6, description="Validation prompts per general domain on which the drift is measured."
    )
    step: PositiveFloat = Field(
        5.0e-5,
        description="Learning rate whose unconstrained first step sets the gain that every step is scaled to.",
    )

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if twice := [count for count in self.answers if self.answers.count(count) > 1]:
            raise ValueError(f"answers: found {twice[0]} twice, expected each once")
        return self

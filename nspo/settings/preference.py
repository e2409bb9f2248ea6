"""Settings of the reward and cost models."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from nspo.settings.types import Count, Section, Whole, source_of


class PreferenceSettings(Section):
    """One model that scores a response; the cost model's zero is the safety threshold (cost > 0 means harmful)."""

    backbone: Annotated[str, source_of("path", "hub")] | None = Field(
        None,
        description="Model to build on: a folder or hub:ORG/NAME@REVISION, such as a reward model; null: model.source.",
    )
    tune: Literal["head", "all"] = Field(
        "head", description="head: fit a read-out of frozen states, for small label sets; all: train every weight."
    )
    backbone_layers: Whole = Field(16, description="Read the hidden states after this many leading blocks; 0: all.")
    max_tokens: Count = Field(224, description="Prompt and response are cut to this many tokens.")
    l2: PositiveFloat = Field(0.1, description="With tune head: weight of the penalty on its size.")
    positive_above: float = Field(
        0.5, gt=0, le=1, description="A graded response counts as positive from this grade on."
    )
    learning_rate: PositiveFloat = Field(2e-5, description="With tune all: of AdamW, cosine schedule.")
    epochs: Count = Field(2, description="With tune all: passes over the pairs.")
    batch_size: Count = Field(32, description="With tune all: pairs per update.")
    micro_batch_size: Count = Field(8, description="With tune all: pairs per forward pass; must divide batch_size.")

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be divisible by micro_batch_size ({self.micro_batch_size})"
            )
        return self

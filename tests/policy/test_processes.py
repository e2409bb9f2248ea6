"""Several processes train one policy: what they share out, what they save, when they stop, and how they are started."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.commands import launch
from accelerate.utils import DistributedType, is_deepspeed_available
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from support.constrained import deepspeed_on_cpu
from support.policy_runs import METHODS, leakage, run, table, weights, without_time
from support.processes import launched, spawn
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.fsdp import is_fsdp_managed_module

from nspo.constraint.callback import NullSpaceCallback
from nspo.constraint.zero import partitions, zero_optimizer
from nspo.errors import UserError
from nspo.models.structure.linears import whole_shape
from nspo.policy.log import LogCallback
from nspo.policy.rollouts import trainer as grpo
from nspo.policy.sharding import check_processes, prepare_engine
from nspo.settings.policy.methods import MethodSettings
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.runtime import RuntimeSettings

# One update per rollout and one answer per pass: how answers are dealt out changes nothing but the order of sums.
CHANGES = {"autocast": "no", "minibatch_size": 8, "micro_batch_size": 1, "steps": 6, "probe_every": 2}
DPO = MethodSettings(objective="dpo", learning_rate=1e-6)
CONFIG = Path(__file__).parents[2] / "config/accelerate"
STOPS = 4  # the probe after this update meets the target


class SharedDraws(grpo.GRPOTrainer):
    """TRL's trainer, whose random numbers belong to an answer of the rollout, whichever process samples it."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        count, rank, multinomial, token = (
            self.accelerator.num_processes,
            self.accelerator.process_index,
            torch.multinomial,
            0,
        )

        def draw(probabilities: Tensor, num_samples: int) -> Tensor:
            nonlocal token
            rows, width = probabilities.shape
            generator = torch.Generator().manual_seed(1000 * self.state.global_step + token)
            noise = torch.empty(rows * count, width).exponential_(generator=generator)
            token += 1
            return (probabilities / noise[rows * rank : rows * (rank + 1)]).argmax(-1, keepdim=True)

        torch.multinomial = draw  # type: ignore[assignment]
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            torch.multinomial = multinomial


def of_two(rank: int, port: int) -> None:
    """Make this process one of two whose draws are those of one."""
    launched(rank, port)
    grpo.GRPOTrainer = SharedDraws  # type: ignore[misc]


def train_in_two_goes(inputs: dict[str, Path], folder: Path, sharding: str) -> None:
    """Train nspo until Ctrl-C after the third update, then again."""
    log = LogCallback.on_log

    def interrupted(self: LogCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    LogCallback.on_log = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(inputs, folder, "nspo", processes=2, sharding=sharding, **CHANGES)
    LogCallback.on_log = log  # type: ignore[method-assign]
    unset_hf_deepspeed_config()  # else models are loaded in partitions: a new process has none yet
    run(inputs, folder, "nspo", processes=2, sharding=sharding, **CHANGES)


def replicated(rank: int, port: int, inputs: dict[str, Path], folder: Path) -> None:
    """Train under DDP."""
    of_two(rank, port)
    train_in_two_goes(inputs, folder, "none")


def on_cpu_as_if_on_gpus(config: Path) -> None:
    """Have accelerate shard over CPU processes as its configuration says, which it would ignore in silence."""

    def start(arguments: Any) -> None:
        deepspeed = arguments.use_deepspeed
        given = prepare_deepspeed_cmd_env(arguments)[1] if deepspeed else prepare_multi_gpu_env(arguments)
        for key, value in given.items():
            os.environ.setdefault(key, value)

    launch.multi_gpu_launcher = launch.deepspeed_launcher = start
    launch.launch_command(
        launch.launch_command_parser().parse_args(["--config_file", str(config), "--num_processes", "2", "nspo"])
    )
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    init = PartialState.__init__
    PartialState.__init__ = lambda self, cpu=False, **kwargs: init(self, cpu=False, **kwargs)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    torch.distributed.init_process_group("gloo")


def sharded(rank: int, port: int, inputs: dict[str, Path], folder: Path) -> None:
    """Train nspo under FSDP2."""
    of_two(rank, port)
    on_cpu_as_if_on_gpus(CONFIG / "fsdp2.yaml")
    seen, begin = [], NullSpaceCallback.on_train_begin  # of its model, once accelerate has prepared it

    def on_train_begin(self: NullSpaceCallback, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        seen.append(kwargs["model"])

    NullSpaceCallback.on_train_begin = on_train_begin  # type: ignore[method-assign]
    train_in_two_goes(inputs, folder, "fsdp2")
    assert len(seen) == 2
    for model in seen:
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert is_fsdp_managed_module(model)  # so that generate() waits for the process with the longest answers


def zero(rank: int, port: int, inputs: dict[str, Path], folder: Path, stage: int) -> None:
    """Train nspo under DeepSpeed ZeRO, its smallest weights split too."""
    of_two(rank, port)
    deepspeed_on_cpu()
    on_cpu_as_if_on_gpus(CONFIG / f"zero{stage}.yaml")
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero3

    init = Zero3.__init__
    Zero3.__init__ = lambda self, *args, **more: init(self, *args, **more | {"param_persistence_threshold": 0})
    seen, begin = [], NullSpaceCallback.on_train_begin  # of the share of the weights that this process steps

    def on_train_begin(self: NullSpaceCallback, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        trained = [parameter for parameter in kwargs["model"].parameters() if parameter.requires_grad]
        assert all(parameter.numel() == (0 if stage == 3 else whole_shape(parameter).numel()) for parameter in trained)
        held = sum(part.count for part in partitions(zero_optimizer(kwargs["optimizer"])).values())
        seen.append(held / sum(whole_shape(parameter).numel() for parameter in trained))

    NullSpaceCallback.on_train_begin = on_train_begin  # type: ignore[method-assign]
    train_in_two_goes(inputs, folder, f"zero{stage}")
    assert seen == [0.5, 0.5]


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory) -> Path:
    """The policy that one process trains with the same draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "GRPOTrainer", SharedDraws)
        return run(inputs, tmp_path_factory.mktemp("alone"), "nspo", **CHANGES)


def assert_same(out: Path, alone: Path, inputs: dict[str, Path]) -> None:
    """The policies `out` and `alone` agree to float rounding, their tables row for row; `out` is in the null space."""
    base, expected_weights = weights(inputs["model"]), weights(alone)
    assert weights(out).keys() == expected_weights.keys()
    for key, value in weights(out).items():
        expected = expected_weights[key]
        assert value.dtype == torch.float32
        assert (value - expected).norm() <= 1e-5 * (expected - base[key]).norm(), key
    assert max(inside for inside, _ in leakage(out, inputs).values()) <= 1e-6
    for name in ("training", "probes", "samples"):
        expected_rows, rows = without_time(table(alone, name)), without_time(table(out, name))
        assert len(rows) == len(expected_rows)
        for row, expected_row in zip(rows, expected_rows, strict=True):
            assert row.keys() == expected_row.keys()
            for key, value in expected_row.items():
                same = pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value
                assert row[key] == same, f"{name}: {key}"


def test_two_processes_train_the_policy_of_one(inputs, alone, tmp_path):
    """With the same draws, across an interruption, and both stop at the probe that meets the target."""
    assert [row["step"] for row in table(alone, "training")] == list(range(1, STOPS + 1))
    spawn(replicated, inputs, tmp_path)
    assert_same(tmp_path / "out", alone, inputs)
    assert not list((tmp_path / "work").iterdir())


def test_fsdp2_trains_the_policy_of_one_process(inputs, alone, tmp_path):
    """Sharded by rows as the shipped file says, resumed from a sharded checkpoint, and saved whole in float32."""
    spawn(sharded, inputs, tmp_path)
    assert_same(tmp_path / "out", alone, inputs)


@pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed (nspo[deepspeed])")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_the_policy_of_one_process(stage, inputs, alone, tmp_path):
    """Flat partitions that cut weights, as the shipped files say, resumed from DeepSpeed's checkpoint, saved whole."""
    spawn(zero, inputs, tmp_path, stage)
    assert_same(tmp_path / "out", alone, inputs)


@pytest.mark.parametrize("autocast", ["bf16", "no"])
def test_deepspeed_autocasts_as_one_process_does(autocast):
    """The model itself rounds, since DeepSpeed would train weights in bf16; what it returns is float32."""
    model, batch = torch.nn.Linear(8, 8), torch.randn(4, 8)
    model.device = torch.device("cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast == "bf16"):
        expected = model(batch).float()
    plugin = SimpleNamespace(zero_stage=3)
    accelerator = {
        "distributed_type": DistributedType.DEEPSPEED,
        "deepspeed_plugin": plugin,
        "parallelism_config": None,
    }
    prepare_engine(SimpleNamespace(accelerator=SimpleNamespace(**accelerator), model=model), "zero3", autocast)  # type: ignore[arg-type]
    assert torch.equal(model(batch), expected)
    assert model.weight.dtype == torch.float32


def test_sizes_must_divide_among_the_processes():
    """A minibatch that micro-batches and processes do not share out, or sharding alone, is refused by name."""
    sizes = {"prompts_per_step": 4, "group_size": 8, "minibatch_size": 32, "micro_batch_size": 8}
    assert TrainingSettings(**sizes, processes=4).processes == 4
    with pytest.raises(ValueError, match=r"minibatch_size \(32\) .* micro_batch_size x processes \(8 x 3\)"):
        TrainingSettings(**sizes, processes=3)
    with pytest.raises(ValueError, match="sharding is 'fsdp2' with one process"):
        TrainingSettings(**sizes, sharding="fsdp2")


def test_rollout_and_update_keep_their_sizes(tmp_path, monkeypatch):
    """Four processes of 8 answers a pass make the update of 64 answers in two passes each."""
    monkeypatch.setattr(grpo, "GRPOConfig", dict)
    sizes = {"prompts_per_step": 16, "group_size": 8, "minibatch_size": 64, "micro_batch_size": 8}
    four = TrainingSettings(**sizes, processes=4)
    given = grpo.trainer_arguments(four, METHODS["nspo"], 0, torch.device("cpu"), tmp_path, RuntimeSettings())
    assert given["generation_batch_size"] == 128
    assert (given["per_device_train_batch_size"], given["gradient_accumulation_steps"]) == (8, 2)


def test_another_number_of_processes_is_refused(inputs, tmp_path):
    """A stage that was not launched as its settings say names the command; nothing is written."""
    with pytest.raises(UserError, match=r"1 processes run, expected the 2 of .*accelerate launch .*processes 2"):
        run(inputs, tmp_path, "nspo", processes=2, **CHANGES)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"2 processes run, expected the 1 of policy\.processes"):
        check_processes(TrainingSettings(), DPO, SimpleNamespace(num_processes=2))  # type: ignore[arg-type]
    many = TrainingSettings(minibatch_size=32, micro_batch_size=1, group_size=8, processes=32)
    with pytest.raises(UserError, match=r"4 pairs per update\) must be divisible by policy\.processes \(32\).*'dpo'"):
        check_processes(many, DPO, SimpleNamespace(num_processes=32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sharding", "accelerator", "message"),
    [
        (
            "fsdp2",
            {"distributed_type": DistributedType.MULTI_CPU},
            "but accelerate runs 'none', expected .*on GPUs",
        ),
        ("fsdp2", {"distributed_type": DistributedType.FSDP, "is_fsdp2": False}, "accelerate runs 'FSDP1'"),
        (
            "none",
            {"distributed_type": DistributedType.FSDP, "is_fsdp2": True},
            "is 'none', but accelerate runs 'fsdp2'",
        ),
        (
            "none",
            {"distributed_type": DistributedType.DEEPSPEED, "deepspeed_plugin": SimpleNamespace(zero_stage=3)},
            "accelerate runs 'zero3', expected replicas",
        ),
        (
            "zero2",
            {"distributed_type": DistributedType.DEEPSPEED, "deepspeed_plugin": SimpleNamespace(zero_stage=1)},
            r"accelerate runs 'zero1', expected .*config/accelerate/zero2\.yaml",
        ),
        ("none", {"distributed_type": DistributedType.MEGATRON_LM}, "accelerate runs 'MEGATRON_LM'"),
        (
            "fsdp2",
            {
                "distributed_type": DistributedType.FSDP,
                "is_fsdp2": True,
                "parallelism_config": SimpleNamespace(non_data_parallel_size=2),
            },
            "accelerate runs 'tensor or context parallelism'",
        ),
    ],
)
def test_other_engines_are_refused_by_name(sharding, accelerator, message):
    """What accelerate really does must be what `policy.sharding` says; FSDP that it ignores on the CPU is told."""
    trainer = SimpleNamespace(accelerator=SimpleNamespace(**{"parallelism_config": None} | accelerator))
    with pytest.raises(UserError, match=message):
        prepare_engine(trainer, sharding, "no")  # type: ignore[arg-type]

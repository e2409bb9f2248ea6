"""Several processes train one policy: what they share out, what they save, when they stop, and how they are started."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from test_policy import inputs, leakage, run, table, weights, without_time
from torch import Tensor

from nspo.errors import UserError
from nspo.policy import grpo
from nspo.policy.callbacks import LogCallback
from nspo.policy.sharding import check_processes
from nspo.policy_settings import MethodSettings, TrainingSettings

__all__ = ["inputs"]

# One update per rollout and one answer per pass: how answers are dealt out changes nothing but the order of sums.
CHANGES = {"autocast": "no", "minibatch_size": 8, "micro_batch_size": 1, "steps": 6, "probe_every": 2}
DPO = MethodSettings(objective="dpo", learning_rate=1e-6)
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


def launched(rank: int, port: int) -> None:
    """Make this process one of two, as `accelerate launch` does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    grpo.GRPOTrainer = SharedDraws  # type: ignore[misc]


def spawn(worker: Any, *args: Any) -> None:
    """Run `worker(rank, port, *args)` in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, *args), nprocs=2)


def interrupted_and_resumed(rank: int, port: int, inputs: dict[str, Path], folder: Path) -> None:
    """Train nspo until Ctrl-C after the third update, then again."""
    launched(rank, port)
    log = LogCallback.on_log

    def interrupted(self: LogCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    LogCallback.on_log = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(inputs, folder, "nspo", processes=2, **CHANGES)
    LogCallback.on_log = log  # type: ignore[method-assign]
    run(inputs, folder, "nspo", processes=2, **CHANGES)


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory) -> Path:
    """The policy that one process trains with the same draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "GRPOTrainer", SharedDraws)
        return run(inputs, tmp_path_factory.mktemp("alone"), "nspo", **CHANGES)


def test_two_processes_train_the_policy_of_one(inputs, alone, tmp_path):
    """With the same draws, weights agree to float rounding and all tables row for row, across an interruption.

    Both stop at the probe that meets the target; the saved weights keep to the null space.
    """
    spawn(interrupted_and_resumed, inputs, tmp_path)
    out, base = tmp_path / "out", weights(inputs["model"])
    for key, value in weights(out).items():
        expected = weights(alone)[key]
        assert (value - expected).norm() <= 1e-5 * (expected - base[key]).norm(), key
    assert max(inside for inside, _ in leakage(out, inputs).values()) <= 1e-6
    assert [row["step"] for row in table(alone, "training")] == list(range(1, STOPS + 1))
    for name in ("training", "probes", "samples"):
        expected_rows, rows = without_time(table(alone, name)), without_time(table(out, name))
        assert len(rows) == len(expected_rows)
        for row, expected_row in zip(rows, expected_rows, strict=True):
            assert row.keys() == expected_row.keys()
            for key, value in expected_row.items():
                same = pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value
                assert row[key] == same, f"{name}: {key}"
    assert not list((tmp_path / "work").iterdir())


def test_sizes_must_divide_among_the_processes():
    """A minibatch that micro-batches and processes do not share out, or sharding alone, is refused by name."""
    sizes = {"prompts_per_step": 4, "group_size": 8, "minibatch_size": 32, "micro_batch_size": 8}
    assert TrainingSettings(**sizes, processes=4).processes == 4
    with pytest.raises(ValueError, match=r"minibatch_size \(32\) .* micro_batch_size x processes \(8 x 3\)"):
        TrainingSettings(**sizes, processes=3)
    with pytest.raises(ValueError, match="sharding is 'fsdp2' with one process"):
        TrainingSettings(**sizes, sharding="fsdp2")


def test_rollout_and_update_keep_their_sizes(tmp_path, monkeypatch):
    """Four processes of 8 answers a pass make the update of 64 answers in two passes each; TRL agrees."""
    monkeypatch.setattr(grpo, "GRPOConfig", dict)
    sizes = {"prompts_per_step": 16, "group_size": 8, "minibatch_size": 64, "micro_batch_size": 8}
    given = grpo.trainer_arguments(
        TrainingSettings(**sizes, processes=4),
        SimpleNamespace(learning_rate=1e-6, kl=0.0, lagrangian=False),  # type: ignore[arg-type]
        0,
        torch.device("cpu"),
        tmp_path,
    )
    assert given["generation_batch_size"] == 128
    assert (given["per_device_train_batch_size"], given["gradient_accumulation_steps"]) == (8, 2)


def test_another_number_of_processes_is_refused(inputs, tmp_path):
    """A stage that was not launched as its settings say names the command; nothing is written."""
    with pytest.raises(UserError, match=r"policy\.processes is 2, but 1 of them run.*accelerate launch .*processes 2"):
        run(inputs, tmp_path, "nspo", processes=2, **CHANGES)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"policy\.processes is 1, but 2 of them run"):
        check_processes(TrainingSettings(), DPO, SimpleNamespace(num_processes=2))  # type: ignore[arg-type]
    many = TrainingSettings(minibatch_size=32, micro_batch_size=1, group_size=8, processes=32)
    with pytest.raises(UserError, match=r"4 pairs per update\) must be divisible by policy\.processes \(32\).*'dpo'"):
        check_processes(many, DPO, SimpleNamespace(num_processes=32))  # type: ignore[arg-type]

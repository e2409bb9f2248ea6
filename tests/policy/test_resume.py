"""A killed run goes on to the same bytes, from wherever it stopped."""

import json
import multiprocessing
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.policy_runs import (
    TRAINING,
    killed_run,
    run,
    run_interrupted,
    table,
    weights,
    without_time,
)

from nspo.files.journal import JsonLines
from nspo.policy import stage as stage
from nspo.policy.probe import ProbeCallback
from nspo.policy.stage import last_checkpoint


def test_a_killed_run_resumes_to_the_same_bytes(inputs, tmp_path, nspo_run, capsys):
    """SIGKILL two updates after a checkpoint: the resumed run has the weights and the logs of the undisturbed one.

    Half a checkpoint and half a log line, as a kill at a worse moment leaves them, are passed over.
    """
    process = multiprocessing.get_context("spawn").Process(target=killed_run, args=(inputs, tmp_path, 6))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (work,) = (tmp_path / "work").iterdir()
    assert last_checkpoint(work, 2).name == "checkpoint-4"
    shutil.copytree(work / "checkpoint-4", work / "checkpoint-7")
    (work / "checkpoint-7/trainer_state.json").unlink()
    with (work / "training.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')

    out = run(inputs, tmp_path, "nspo")
    assert "resuming nspo (seed 0) from checkpoint-4" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == (nspo_run / "model.safetensors").read_bytes()
    for name in ("training", "probes", "samples"):
        assert without_time(table(out, name)) == without_time(table(nspo_run, name))
    assert (out / "manifest.json").read_bytes() == (nspo_run / "manifest.json").read_bytes()
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("step", [4, 5, 7])
def test_it_resumes_to_the_bit_from_every_boundary(step, inputs, tmp_path, nspo_run, monkeypatch):
    """Stopped before a due checkpoint, right after one, and between the two updates of a rollout, with one lying there.

    The checkpoint between two updates is whole, but what it cannot hold is the rollout: it is passed over.
    """
    saved = ProbeCallback.on_step_end

    def saving(self: ProbeCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control = saved(self, args, state, control, **kwargs)
        control.should_save |= state.global_step == 5
        return control

    with monkeypatch.context() as patch:
        patch.setattr(ProbeCallback, "on_step_end", saving)
        run_interrupted(inputs, tmp_path, "nspo", step, monkeypatch)
    (work,) = (tmp_path / "work").iterdir()
    newest = max((int(path.name.partition("-")[2]) for path in work.glob("checkpoint-*")), default=0)
    assert newest == {4: 0, 5: 4, 7: 5}[step]
    out = run(inputs, tmp_path, "nspo")
    assert (out / "model.safetensors").read_bytes() == (nspo_run / "model.safetensors").read_bytes()
    for name in ("training", "probes", "samples"):
        assert without_time(table(out, name)) == without_time(table(nspo_run, name))


def test_a_run_stopped_before_its_first_checkpoint_starts_over(inputs, tmp_path, free_run, monkeypatch):
    """Ctrl-C at the third update, then the same command: same seed, same bytes, and every step once."""
    run_interrupted(inputs, tmp_path, "grpo_no_kl", 3, monkeypatch)
    assert not (tmp_path / "out").exists()
    out = run(inputs, tmp_path, "grpo_no_kl")
    assert (out / "model.safetensors").read_bytes() == (free_run / "model.safetensors").read_bytes()
    for name in ("training", "probes", "samples"):
        assert without_time(table(out, name)) == without_time(table(free_run, name))


def test_the_target_stops_training_even_across_a_kill(inputs, tmp_path, monkeypatch):
    """At the first probe that meets the target: its update is the last one logged, no resumed run goes beyond it.

    What was asked for is written down alike.
    """

    def failing(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "resolved_settings", failing)
        with pytest.raises(KeyboardInterrupt):
            run(inputs, tmp_path, "grpo_no_kl", target_unsafe=1.0)
    (work,) = (tmp_path / "work").iterdir()
    stopped = weights(last_checkpoint(work, 2))
    out = run(inputs, tmp_path, "grpo_no_kl", target_unsafe=1.0)
    assert [row["step"] for row in table(out, "probes")] == [0, 4]
    assert [row["step"] for row in table(out, "training")] == [1, 2, 3, 4]
    assert all(torch.equal(value, stopped[key]) for key, value in weights(out).items())
    assert json.loads((out / "settings.json").read_text())["trainer"]["max_steps"] == 2 * TRAINING.steps


def test_rewinding_forgets_later_rows_and_torn_lines(tmp_path):
    """Rows after the step go, a line without its end goes, the others stay as they were; no file is an empty log."""
    log = JsonLines(tmp_path / "log.jsonl")
    assert log.rows() == []
    log.append([{"step": 1, "a": 0.1}, {"step": 2}])
    log.append([{"step": 3}])
    with log.path.open("a") as file:
        file.write('{"step": 4')
    log.rewind(2)
    log.append([{"step": 3, "again": True}])
    assert log.rows() == [{"step": 1, "a": 0.1}, {"step": 2}, {"step": 3, "again": True}]


def test_checkpoint_holds_what_the_logs_say(inputs, tmp_path, monkeypatch):
    """When a checkpoint is complete, the probe and the update it belongs to are already on disk."""
    saved = []

    def on_save(self: ProbeCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = [
            JsonLines(Path(args.output_dir) / name).rows()[-1]["step"] for name in ("training.jsonl", "probes.jsonl")
        ]
        saved.append((state.global_step, *last))

    monkeypatch.setattr(ProbeCallback, "on_save", on_save)
    run(inputs, tmp_path, "nspo", steps=1)
    assert saved == [(2, 2, 2)]


# Refusals

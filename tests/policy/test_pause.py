"""What a cluster sends before it takes a machine away: training saves, ends, and goes on to the same bytes."""

import os
import signal
from pathlib import Path

import pytest
from support.policy_runs import run, table, without_time

from nspo.cli import main as cli
from nspo.errors import Paused
from nspo.policy.log import LogCallback
from nspo.policy.stage import last_checkpoint


@pytest.fixture(scope="module")
def quiet(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    return run(inputs, tmp_path_factory.mktemp("quiet"), "nspo")


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 5)])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on(number, step, inputs, tmp_path, quiet, monkeypatch):
    """At the end of the rollout step in which it came, probed or not; the resumed run has the bytes of a quiet one."""
    log = LogCallback.on_log

    def signalled(self, args, state, control, **kwargs):
        log(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(LogCallback, "on_log", signalled)
        with pytest.raises(Paused, match=f"stopped after update {step + 1}"):
            run(inputs, tmp_path, "nspo")
    assert signal.getsignal(number) == before
    (work,) = (tmp_path / "work").iterdir()
    assert last_checkpoint(work, 2).name == f"checkpoint-{step + 1}"
    assert not (tmp_path / "out").exists()
    out = run(inputs, tmp_path, "nspo")
    assert (out / "model.safetensors").read_bytes() == (quiet / "model.safetensors").read_bytes()
    for name in ("training", "probes", "samples"):
        assert without_time(table(out, name)) == without_time(table(quiet, name))


def test_the_command_says_that_it_goes_on(monkeypatch, capsys):
    """In one line, with the exit code of what SIGTERM ended."""

    def paused(argv):
        raise Paused("nspo (seed 0): stopped after update 4, as a signal asked")

    monkeypatch.setattr(cli, "_run", paused)
    assert cli.main(["train-policy"]) == 143
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("stopped after update 4, as a signal asked; the same command goes on from there")

"""Jobs on one machine claim its GPUs: made-up device lists, real locks of real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nspo.errors import UserError
from nspo.run.gpus import devices, main

SHOW = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True)"
WAIT = f"{SHOW}; import sys; sys.stdin.read()"


def start(folder: Path, count: int, visible: str = "0,1,2", code: str = WAIT) -> subprocess.Popen[str]:
    """A job that claims `count` devices, says which, and ends when its standard input does."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "NSPO_GPU_LOCKS": str(folder)}
    command = [sys.executable, "-m", "nspo.run.gpus", str(count), sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def said(job: subprocess.Popen[str]) -> str:
    """The first line of a job."""
    assert job.stdout is not None
    return job.stdout.readline().strip()


def waits(job: subprocess.Popen[str]) -> str:
    """What a job says that finds no free devices."""
    assert job.stderr is not None
    return job.stderr.readline().strip()


def test_jobs_get_devices_of_their_own(tmp_path: Path) -> None:
    """One and two of three; a fourth waits, and goes on when one is free."""
    first = start(tmp_path, 1)
    assert said(first) == "0"
    second = start(tmp_path, 2)
    assert said(second) == "1,2"
    third = start(tmp_path, 2)
    assert waits(third) == "waiting for 2 of 3 GPUs: other jobs hold them"
    second.communicate("")
    assert said(third) == "1,2"
    first.communicate("")
    third.communicate("")


def test_a_killed_job_leaves_its_devices(tmp_path: Path) -> None:
    """Whatever ends it: the kernel gives the lock back."""
    first = start(tmp_path, 3)
    assert said(first) == "0,1,2"
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start(tmp_path, 3)
    assert said(second) == "0,1,2"
    second.communicate("")


def test_asking_for_more_than_there_is_takes_all(tmp_path: Path) -> None:
    """The stage itself says that there are too few; without any device it runs at once."""
    job = start(tmp_path, 8, "GPU-5,GPU-7")
    assert said(job) == "GPU-5,GPU-7"
    job.communicate("")
    none = start(tmp_path, 1, "")
    assert said(none) == ""
    none.communicate("")


def test_devices_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES decides; without it and without a driver there are none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-a")
    assert devices() == ["3", "GPU-a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert devices() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "/nowhere")
    assert devices() == []


def test_a_call_without_a_command_is_refused() -> None:
    """In a line that shows one."""
    with pytest.raises(UserError, match="found 'two python', expected a number of GPUs and a command"):
        main(["two", "python"])

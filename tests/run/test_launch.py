"""What a pod or a cluster step says of a group of processes does not make a stage wait for partners."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nspo.errors import UserError
from nspo.run.launch import LAUNCHED, forget_foreign_group

POD = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29500"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*POD, *MPI, LAUNCHED):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("group", [POD, MPI])
def test_a_foreign_group_is_put_aside_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], group: dict[str, str]
) -> None:
    """The first process of it runs alone and says so."""
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    forget_foreign_group()
    assert not os.environ.keys() & group.keys()
    (line,) = capsys.readouterr().err.splitlines()
    assert "ignored, it runs alone" in line


@pytest.mark.parametrize("group", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"MASTER_ADDR": "10.0.0.1"}])
def test_a_group_of_one_is_no_news(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], group: dict[str, str]
) -> None:
    """Nothing is said where nothing would have been waited for."""
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    forget_foreign_group()
    assert capsys.readouterr().err == ""


def test_the_other_processes_of_a_foreign_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would do the first one's work again, into the same files."""
    for name, value in {**POD, "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"RANK=1, WORLD_SIZE=2 .*`policy.processes`"):
        forget_foreign_group()


def test_processes_of_accelerate_launch_keep_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our own launcher says is believed."""
    for name, value in {**POD, LAUNCHED: "none"}.items():
        monkeypatch.setenv(name, value)
    forget_foreign_group()
    assert {name: os.environ[name] for name in POD} == POD


def test_a_stage_in_a_pod_ends(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A stage that knows of processes runs to its error at once, instead of waiting for a partner that never comes."""
    command = ["collect", "--model", tiny_model_dir, "--prompts", tmp_path / "none.parquet", "--out", tmp_path / "out"]
    command += ["--workdir", tmp_path / "work", "--device", "cpu"]
    run = subprocess.run(
        [sys.executable, "-m", "nspo", *map(str, command)],
        env={**os.environ, **POD},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert [line for line in run.stderr.splitlines() if line.startswith("nspo: error")] == [
        f"nspo: error: {tmp_path}/none.parquet does not exist: run the stage that makes it"
    ]

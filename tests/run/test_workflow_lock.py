"""Killing Snakemake itself: its lock is removed by the next run, but never while a run is alive, and its stages end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nspo.run.workflow_lock import CLUSTER, PARENT, hold, this_process

HOLD = "import sys, time; from nspo.run.workflow_lock import hold; from pathlib import Path; "
HOLD += "kept = hold(Path(sys.argv[1]), sys.argv[2] == 'local'); print('held', flush=True); time.sleep(600)"


def other_run(folder: Path, kind: str) -> "subprocess.Popen[str]":
    """Another run that holds the lock until it is killed."""
    run = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), kind], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "held\n"
    return run


def locks(folder: Path) -> list[str]:
    """The lock files of Snakemake."""
    return [path.name for path in (folder / "locks").glob("*")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Snakemake's folder with a lock in it."""
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks/0.output.lock").write_text("results/report.html\n")
    return tmp_path


def test_a_left_over_lock_is_removed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody alive holds the folder, so the lock goes, in a line that says so."""
    assert hold(folder, local=True) is not None
    assert locks(folder) == []
    assert "the lock of a workflow that was killed is removed" in capsys.readouterr().err


def test_the_lock_of_a_living_run_stays(folder: Path) -> None:
    """While another run is alive, however many have come and gone, its lock stays; killed with -9, it goes."""
    run = other_run(folder, "local")
    (folder / "locks/1.output.lock").write_text("results/summary.csv\n")
    for _ in range(2):
        kept = hold(folder, local=True)
        assert kept is not None
        kept.close()
        assert locks(folder) == ["1.output.lock"]
    run.kill()
    run.wait()
    hold(folder, local=True)
    assert locks(folder) == []


def test_the_lock_of_a_run_on_a_cluster_stays(folder: Path) -> None:
    """Its jobs may be alive elsewhere: a person looks at the queue. After `--unlock` all is as before."""
    run = other_run(folder, "cluster")
    (folder / "locks/1.output.lock").write_text("results/summary.csv\n")
    run.kill()
    run.wait()
    for _ in range(2):
        kept = hold(folder, local=True)
        assert kept is not None
        kept.close()
        assert locks(folder) == ["1.output.lock"]
    (folder / "locks/1.output.lock").unlink()
    hold(folder, local=True)
    assert CLUSTER not in (folder / "nspo.lock").read_text()


def test_a_stage_ends_with_its_workflow(tmp_path: Path) -> None:
    """A stage whose Snakemake is killed ends at once; one whose Snakemake was gone already does not begin."""
    parent = subprocess.Popen(["sleep", "600"])
    code = (
        "from nspo.run.workflow_lock import end_with_workflow; import time; end_with_workflow(); print(1, flush=True); "
    )
    environment = {**os.environ, PARENT: f"{parent.pid}@{this_process().partition('@')[2]}"}
    command = [sys.executable, "-c", code + "time.sleep(600)"]
    stage = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert stage.stdout is not None
    assert stage.stdout.readline() == b"1\n"
    time.sleep(0.2)
    assert stage.poll() is None
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert stage.wait(timeout=20) == 143
    assert subprocess.run(command, env=environment, check=False, timeout=60).returncode == 143


@pytest.mark.parametrize("value", ["", "7", "1@another", "x@y"])
def test_a_stage_without_a_workflow_goes_on(value: str) -> None:
    """Started by hand, or in a container that does not see Snakemake, a stage runs."""
    code = "from nspo.run.workflow_lock import end_with_workflow; import time; end_with_workflow(); time.sleep(0.2)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, PARENT: value}, check=True, timeout=60)


def test_a_process_of_another_host_is_not_the_workflow() -> None:
    """Every host's first namespace of process ids has one number: the host's start tells them apart."""
    here = this_process()
    elsewhere = here.rpartition("-")[0].rsplit("-", 4)[0] + "-00000000-0000-0000-0000-000000000000"
    assert elsewhere.partition("-")[0] == here.partition("-")[0]
    code = "from nspo.run.workflow_lock import end_with_workflow; end_with_workflow(); print('goes on')"
    gone = subprocess.Popen(["true"])
    gone.wait()
    for place, goes_on in ((elsewhere, True), (here, False)):
        environment = {**os.environ, PARENT: f"{gone.pid}@{place.partition('@')[2]}"}
        run = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=False)
        assert ("goes on" in run.stdout) == goes_on
        assert ("the workflow that started this stage has ended" in run.stderr) != goes_on

"""What happens when Snakemake itself is killed: its stages end with it, and its lock on the folder does not outlive it.

Snakemake locks the outputs of a run by files in `.snakemake/locks`. After `kill -9` or a power cut they stay, and
Snakemake asks a person to look and to run `snakemake --unlock`. Here every run also holds a lock of the kernel's on
`.snakemake/nspo.lock`, which ends with its process, whatever ended it. A run that finds nobody holding it knows that
Snakemake's own files are left over, and removes them. On a cluster jobs may outlive the run that submitted them, so
there the files stay, and so does Snakemake's question. No command: workflow/rules/common.smk and the stages use it.
"""

import fcntl
import os
import select
import shutil
import threading
from pathlib import Path
from typing import IO

from nspo.run.progress import say

PARENT = "NSPO_WORKFLOW"
CLUSTER = "cluster"
ENDED = 143  # what a shell says of a process that SIGTERM ended


def hold(folder: Path, local: bool) -> IO[str] | None:
    """Remove the left-over lock of a killed run, then hold the kernel's lock until the returned file is closed.

    Any number of runs hold it together (Snakemake's own files say whether two runs are in each other's way); only who
    is alone may remove anything.

    Args:
        folder: Snakemake's folder, `.snakemake`.
        local: whether the jobs of this run end with it.

    Returns:
        The open file; None where the folder cannot be written or locked, and all stays as Snakemake does it.
    """
    try:
        folder.mkdir(exist_ok=True)
        file = (folder / "nspo.lock").open("a+", encoding="utf-8")
        if _alone(file):
            _remove_left_over(folder / "locks", file)
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        return None
    if not local:
        file.write(CLUSTER)
        file.flush()
    return file


def _alone(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_left_over(locks: Path, file: IO[str]) -> None:
    file.seek(0)
    left = any(locks.glob("*.lock"))
    if left and CLUSTER in file.read():
        return
    if left:
        shutil.rmtree(locks)
        locks.mkdir()
        say("the lock of a workflow that was killed is removed; its unfinished stages go on")
    file.truncate(0)


def this_process() -> str:
    """This process, as `end_with_workflow` finds it: its id, and the namespace and host in which the id counts."""
    return f"{os.getpid()}@{_namespace()}"


def end_with_workflow() -> None:
    """End this stage at once when the Snakemake that started it is gone, so that no two runs of it are ever at work.

    A stage goes on where no Snakemake started it, and where it cannot be seen from here (in a container, not on Linux).
    """
    pid, _, namespace = os.environ.get(PARENT, "").partition("@")
    if not pid.isdigit() or not namespace or namespace != _namespace():
        return
    try:
        workflow = os.pidfd_open(int(pid))
    except ProcessLookupError:
        say("the workflow that started this stage has ended: so does the stage, and a new run goes on")
        os._exit(ENDED)
    except OSError:
        return
    threading.Thread(target=_wait_and_end, args=(workflow,), daemon=True).start()


def _namespace() -> str:
    """The namespace of process ids that this process lives in, and which start of which host; empty where unknown.

    The first namespace of every host has one and the same number, so that alone would take a stranger's id on another
    node for the workflow's.
    """
    place, boot = Path("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id")
    return (
        f"{place.stat().st_ino}-{boot.read_text(encoding='utf-8').strip()}" if place.exists() and boot.exists() else ""
    )


def _wait_and_end(workflow: int) -> None:
    select.select([workflow], [], [])
    os._exit(ENDED)

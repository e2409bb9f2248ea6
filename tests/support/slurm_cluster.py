"""A real SLURM on this machine, for tests: munged, slurmctld, a slurmd for each of two nodes, started as root, ended by
their ids.

Both nodes are this machine. Each says that it has more cores, memory and GPUs than there are (`config_overrides`), so
that jobs can ask for what profiles/slurm asks for; cgroups are not needed. Finished jobs are accounted in a text file
(`jobcomp/filetxt`), which needs no database. The configuration stands in /etc/slurm, because `srun` inside a job looks
nowhere else.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel")
ETC = Path("/etc/slurm")
PARTITION = "test"
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=150000 Gres=gpu:1"

CONFIG = """\
ClusterName=nspo
SlurmctldHost={host}
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.log
MinJobAge=3600
KillWait=2
MpiDefault=none
ReturnToService=2
GresTypes=gpu
{nodes}
PartitionName={partition} Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster: its one partition, and the file in which ended jobs are accounted."""

    partition: str
    accounting: Path

    def jobs(self) -> dict[str, dict[str, str]]:
        """{id: what the controller knows of a job, such as JobState, TimeLimit} of every job so far."""
        lines = _output("scontrol", "--oneliner", "show", "jobs").splitlines()
        listed = [dict(field.split("=", 1) for field in line.split() if "=" in field) for line in lines]
        return {job["JobId"]: job for job in listed if "JobId" in job}

    def accounted(self) -> dict[str, dict[str, str]]:
        """{id: its entry in the accounting} of every job that has ended."""
        lines = self.accounting.read_text().splitlines() if self.accounting.exists() else []
        listed = [dict(field.split("=", 1) for field in line.split() if "=" in field) for line in lines]
        return {job["JobId"]: job for job in listed}


def missing() -> str | None:
    """Why no SLURM can be started here, None where one can."""
    if os.geteuid() != 0:
        return "a SLURM of one's own is started as root"
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{absent[0]} is not installed (apt-get install slurm-wlm munge)"
    if (ETC / "slurm.conf").exists() and not _left_over():
        return f"{ETC}/slurm.conf is there already: this machine belongs to a cluster"
    return None


def _left_over() -> bool:
    """Whether the configuration is that of a test run which was killed: ours, and its controller is gone."""
    found = re.match(
        r"ClusterName=nspo\n(?s:.*)^SlurmctldPidFile=(.*)$", (ETC / "slurm.conf").read_text(), re.MULTILINE
    )
    pid = Path(found[1]) if found else None
    return pid is not None and not (pid.is_file() and Path("/proc", pid.read_text().strip()).exists())


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster with its files in `folder`; afterwards end what was started and take the configuration away."""
    host = socket.gethostname().split(".")[0]
    names = (host, "localhost")  # which every machine resolves, as nodes of a cluster resolve each other
    for name in ("state", *(f"spool-{name}" for name in names)):
        (folder / name).mkdir(parents=True)
    with ExitStack() as cleanup:
        config = CONFIG.format(
            host=host,
            folder=folder,
            controller_port=_free_port(),
            nodes="\n".join(NODE.format(name=name, host=host, port=_free_port()) for name in names),
            partition=PARTITION,
        )
        for name, text in (("slurm.conf", config), ("gres.conf", "Name=gpu File=/dev/null\n")):
            cleanup.callback((ETC / name).unlink, missing_ok=True)
            (ETC / name).write_text(text)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {f"--{name}-file": folder / f"munge.{name}" for name in ("key", "pid", "log", "seed")}
        options = [f"{option}={path}" for option, path in files.items()]
        munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *options]
        daemons = []
        for command in (munge, ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", name] for name in names)):
            log = cleanup.enter_context((folder / f"{command[0]}-{len(daemons)}.log").open("w"))
            daemon = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            cleanup.callback(_end, daemon)
            daemons.append(daemon)
            if command is munge:
                _wait(lambda: (folder / "munge.socket").exists(), daemons, folder)
        idle = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
        _wait(lambda: set(_output(*idle).split()) == set(names), daemons, folder)
        cleanup.callback(_output, "scancel", "--user=root")
        yield Cluster(PARTITION, folder / "jobs.log")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _wait(ready: Callable[[], bool], daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        if any(daemon.poll() is not None for daemon in daemons) or time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-1500:] for path in folder.glob("*.log"))
            raise RuntimeError(f"SLURM did not start:\n{logs}")
        time.sleep(0.2)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()

"""Several nodes: what each of two made-up ones is told, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nspo.errors import UserError
from nspo.run.node import machine_flags
from nspo.workflow.launch import launcher

FAKE = """#!{python}
import json, os, sys
print("host-a\\nhost-b" if sys.argv[0].endswith("scontrol") else json.dumps([sys.argv[1:], os.environ["SLURM_NODEID"]]))
"""


def test_two_nodes_agree(tmp_path: Path) -> None:
    """Both learn the same address, port and sizes, and each its own rank; what else was asked comes after."""
    for name in ("scontrol", "accelerate"):
        (tmp_path / name).write_text(FAKE.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    start = launcher(4, 8, nodes=2)
    assert start.startswith(
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=8 python -m nspo.run.node accelerate launch "
    )
    words = start.partition("nspo.run.node ")[2].split()
    told = []
    for rank in range(2):
        slurm = {"SLURM_NODEID": str(rank), "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "host-[a-b]"}
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        command = [sys.executable, "-m", "nspo.run.node", *words, "nspo", "train-policy"]
        run = subprocess.run(
            command, env={**os.environ, **slurm, "PATH": path}, capture_output=True, text=True, check=True
        )
        told.append(json.loads(run.stdout))
    for rank, (arguments, environment) in enumerate(told):
        flags = dict(zip(arguments[1:9:2], arguments[2:9:2], strict=True))
        assert flags == {
            "--num_machines": "2",
            "--machine_rank": str(rank),
            "--main_process_ip": "host-a",
            "--main_process_port": "32345",
        }
        assert environment == str(rank)
        assert arguments[0] == "launch"
        assert arguments[9:] == [*words[2:], "nspo", "train-policy"]
        assert "--num_processes 4 --num_cpu_threads_per_process 4" in " ".join(arguments)


def test_outside_of_a_cluster_it_says_what_is_missing() -> None:
    """In one line, with the key of the profile."""
    with pytest.raises(UserError, match=r"SLURM_NODEID.* expected a job of SLURM .*mpi: srun"):
        machine_flags({}, ["a", "b"])
    with pytest.raises(UserError, match="this is node 2 of 2"):
        machine_flags({"SLURM_NODEID": "2", "SLURM_JOB_ID": "1"}, ["a", "b"])

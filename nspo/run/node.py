"""One node's share of a stage that several nodes train together: `srun` starts this once on each of them.

    srun --nodes=2 --ntasks=2 --ntasks-per-node=1 python -m nspo.run.node accelerate launch ... -m nspo train-policy ...

says to `accelerate launch` which machine this is, how many there are and where the first one listens, as SLURM knows it
in the environment of the job, and becomes it.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from nspo.errors import UserError

PORTS = 20000, 20000  # first port and how many: one for each job of a node


def machine_flags(environment: Mapping[str, str], hosts: Sequence[str]) -> list[str]:
    """The flags of `accelerate launch` for this node.

    Args:
        environment: of a task of SLURM.
        hosts: the job's nodes, in SLURM's order.

    Raises:
        UserError: where SLURM started no such task.
    """
    try:
        rank, job = int(environment["SLURM_NODEID"]), int(environment["SLURM_JOB_ID"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"several nodes: {error} in the environment of this task",
            expected="a job of SLURM started by srun (in the profile, for this rule: `mpi: srun`)",
        ) from error
    if not hosts or rank >= len(hosts):
        raise UserError(f"several nodes: this is node {rank} of {len(hosts)}", expected="one of the job's own")
    flags = {
        "num_machines": len(hosts),
        "machine_rank": rank,
        "main_process_ip": hosts[0],
        "main_process_port": PORTS[0] + job % PORTS[1],
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def main(arguments: Sequence[str]) -> None:
    """Become `arguments`, a call of `accelerate launch`, with the flags of this node.

    Raises:
        UserError: for another command, or outside of a job of SLURM.
    """
    if list(arguments[:2]) != ["accelerate", "launch"]:
        raise UserError("several nodes run another command", expected="`accelerate launch` and its arguments")
    hosts = []
    if nodes := os.environ.get("SLURM_JOB_NODELIST"):
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, encoding="utf-8", check=True
        )
        hosts = listed.stdout.split()
    command = ["accelerate", "launch", *machine_flags(os.environ, hosts), *arguments[2:]]
    os.execvp(command[0], command)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        sys.exit(f"nspo: error: {fault}")

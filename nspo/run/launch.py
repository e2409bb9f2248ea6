"""Whether a launcher started this process as one of several; what else the environment says of a group is put aside.

Pods and cluster steps set WORLD_SIZE, RANK and MASTER_ADDR for programs that form a group by themselves. Nothing here
does: stages are shared out by `accelerate launch` alone, which marks its processes. Any other process that believed
these variables would wait, without a word, for partners that never come.
"""

import os
import re

from nspo.errors import UserError
from nspo.run.progress import say

LAUNCHED = "TORCHELASTIC_RUN_ID"  # what `accelerate launch`, by torchrun, gives to each process that it starts
OF_A_GROUP = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(OMPI_COMM_WORLD|MV2_COMM_WORLD|PMI)_\w+|MPI_LOCAL\w+"
)


def forget_foreign_group() -> None:
    """Put aside what the environment says of a group of processes, where no launcher of ours started this one.

    Raises:
        UserError: when this is not the first process of such a group: the others would do the same work again.
    """
    if LAUNCHED in os.environ:
        return
    found = {name: os.environ.pop(name) for name in sorted(os.environ) if OF_A_GROUP.fullmatch(name)}
    told = ", ".join(f"{name}={value}" for name, value in found.items() if re.search("RANK|SIZE", name))
    if any(found.get(name, "0") != "0" for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")):
        raise UserError(
            f"found {told} in the environment, but no `accelerate launch` started this process",
            expected="one process",
            change="start the stage once and set `policy.processes` or `runtime.processes`, or unset these variables",
        )
    if any("SIZE" in name and value != "1" for name, value in found.items()):
        say(f"found {told} in the environment, but no `accelerate launch` started this process: ignored, it runs alone")

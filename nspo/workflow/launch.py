"""How a stage is started: alone, by `accelerate launch`, on GPUs that it claims; and how many of them it asks for.

None of this changes what a stage makes, but for the number of processes that train a policy, which is one of its
settings.
"""

import shlex

from nspo.settings.config import Config


def launcher(processes: int, threads: int, sharded: str = "", gpus: int = 0, nodes: int = 1, mpi: str = "srun") -> str:
    """What stands before `nspo STAGE` in the command of a job.

    Args:
        processes: how many share the stage, one per GPU.
        threads: CPU threads of the job on a node, shared out among its processes.
        sharded: the accelerate configuration that splits the model; empty for whole replicas.
        nodes: over how many nodes of a cluster the processes are spread, evenly.
        mpi: what starts a task on each of them.
        gpus: devices to claim on this machine; 0 where a cluster assigns them, or where there are none.
    """
    claimed = f"python -m nspo.run.gpus {gpus} " if gpus else ""
    if processes == 1:
        return f"{claimed}python -m"
    how = "--multi_gpu --mixed_precision no --dynamo_backend no"
    if sharded:
        how = f"--config_file {shlex.quote(sharded)}"
    share = f"--num_processes {processes} --num_cpu_threads_per_process {max(1, threads * nodes // processes)}"
    if nodes > 1:
        tasks = (
            f"--nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --cpus-per-task={threads}"  # srun inherits no CPUs
        )
        each = f"{mpi} {tasks} python -m nspo.run.node"
        return f"{each} accelerate launch {how} {share} -m"
    port = "--main_process_port 0"  # a free one, for each job
    return f"{claimed}accelerate launch {how} {share} --num_machines 1 {port} -m"


def gpus(settings: Config, processes: int = 1) -> int:
    """GPUs of a job that runs a model: one per process, none on a CPU."""
    return 0 if settings.runtime.device == "cpu" else processes

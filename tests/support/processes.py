"""Two processes of one group, on the CPU: forks, which need not import anything again."""

import os
import socket
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState


def spawn(worker: Any, *args: Any) -> None:
    """Run `worker(rank, port, *args)` in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(worker, (port, *args), nprocs=2, start_method="fork")


def launched(rank: int, port: int) -> None:
    """Make this process one of two, as `accelerate launch` does, with one thread for arithmetic."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # what a run of this test's own process left
    GradientState._reset_state()


def join(rank: int, port: int) -> Any:
    """Join a gloo group of two, and return their device mesh."""
    launched(rank, port)
    torch.distributed.init_process_group("gloo")
    return torch.distributed.init_device_mesh("cpu", (2,))

"""Processes launched by `accelerate launch`, and error reporting that does not repeat per rank."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from nspo.errors import Paused, UserError
from nspo.run.devices import device_of

GRACE_SECONDS = 5.0  # how long another process's error waits for the main process to say the same first


@contextmanager
def processes_of(device: str, key: str) -> Iterator[PartialState]:
    """This process among those of `accelerate launch`; alone when it was started plainly, without a process group.

    An error that all processes meet is told once: the others wait until the launcher has ended them.

    Args:
        device: `runtime.device`.
        key: the configuration's key for the number of processes.

    Raises:
        UserError: more processes than GPUs.
    """
    processes = _this_process(device, key)
    try:
        yield processes
    except Paused:
        processes.destroy_process_group()
        raise
    except (UserError, OSError):
        if not processes.is_main_process:
            time.sleep(GRACE_SECONDS)
        raise
    processes.destroy_process_group()


def own_device(processes: PartialState, device: str) -> torch.device:
    """Where this process computes: its own GPU when there are several processes, else what `device` says."""
    return processes.device if processes.num_processes > 1 else device_of(device)


def _this_process(device: str, key: str) -> PartialState:
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_gpu = device_of(device).type == "cuda" and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if on_gpu and wanted > torch.cuda.device_count():
        raise UserError(
            f"{key} is {wanted}, but torch finds {torch.cuda.device_count()} GPUs: lower it to at most that"
        )
    return PartialState(cpu=not on_gpu)

"""GPUs of this machine for the jobs of a workflow: each job claims as many as it asked for, and sees no others.

    python -m nspo.run.gpus 2 python -m nspo evaluate ...

waits until two devices are free, sets CUDA_VISIBLE_DEVICES to them and becomes the command. A claim is a kernel lock on
a file of the machine's temporary folder. The command inherits the lock, so it ends with the command, however that ends,
and two workflows on one machine keep out of each other's way. Where CUDA_VISIBLE_DEVICES is set, only those devices are
taken. A cluster assigns devices itself: there nothing is claimed.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from nspo.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
RETRY_SECONDS = 1.0
QUERY = ("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")


def devices() -> list[str]:
    """The GPUs that may be used here, as CUDA_VISIBLE_DEVICES names them; none without NVIDIA's driver."""
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    try:
        found = subprocess.run(QUERY, capture_output=True, encoding="utf-8", check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.splitlines() if line.strip()]


def claim(count: int, names: Sequence[str], folder: Path, say: Callable[[str], None]) -> list[str]:
    """Wait for `count` free devices among `names` and claim them until this process has ended.

    All or nothing: a job that waits holds no device, so no two jobs wait for each other. Where there are fewer devices
    than `count`, all are claimed, and the command itself says what it lacks.

    Args:
        folder: of the lock files, one per device, shared by all users of the machine; made where it is missing.
        say: told once when there is something to wait for.

    Returns:
        The devices claimed, in the order of `names`.
    """
    folder.mkdir(exist_ok=True)
    with suppress(PermissionError):  # made by another user, who opened it for all
        folder.chmod(0o1777)
    wanted, told = min(count, len(names)), False
    while True:
        held: dict[str, int] = {}
        for name in names:
            if len(held) < wanted and (handle := _lock(folder / f"{name.replace(os.sep, '_')}.lock")) is not None:
                held[name] = handle
        if len(held) == wanted:
            for handle in held.values():
                os.set_inheritable(handle, True)
            return list(held)
        for handle in held.values():
            os.close(handle)
        if not told:
            say(f"waiting for {wanted} of {len(names)} GPUs: other jobs hold them")
            told = True
        time.sleep(RETRY_SECONDS)


def _lock(path: Path) -> int | None:
    """An open handle with the lock of `path`; None where another process has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with suppress(PermissionError):
        os.chmod(handle, 0o666)  # whatever the umask
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main(arguments: Sequence[str]) -> None:
    """Claim `arguments[0]` devices and become the command of the others.

    Raises:
        UserError: no number, or no command.
    """
    if len(arguments) < 2 or not arguments[0].isdigit():
        raise UserError(
            f"found {' '.join(arguments) or 'nothing'!r}",
            expected="a number of GPUs and a command, such as python -m nspo.run.gpus 2 COMMAND",
        )
    names = devices()
    if names and int(arguments[0]):
        place = Path(os.environ.get("NSPO_GPU_LOCKS", Path(tempfile.gettempdir(), "nspo-gpus")))
        taken = claim(int(arguments[0]), names, place, _say)
        os.environ[VISIBLE] = ",".join(taken)
    os.execvp(arguments[1], list(arguments[1:]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        sys.exit(f"nspo: error: {fault}")

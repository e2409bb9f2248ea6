"""The sandbox: runs a Python program that a model wrote, and says whether it ran to its end.

What it gives. The program runs in a process of its own, in fresh mount, network, process, IPC and host-name namespaces
made by bubblewrap where that is on the PATH, else by `unshare`. It sees this Python and the system's libraries,
read-only, and no other file: no /proc, no /dev, nowhere to write. It has nothing of the caller's environment, no
capability, and no open file but four pipes. It can start no process and no thread and open no socket, and the CPU time,
wall time and memory of its one process are limited. What it prints is read and forgotten. `run` returns when nothing of
it is left. Whether a machine can do all this is tried, not looked up; where it cannot, nothing runs.

What it does not give. A hole in the kernel is a hole in the sandbox. What lies in Python's own folder or below /usr/lib
can be read, and the clock and the kind of machine are seen. A program written to cheat can find the tests that follow
it in its own process and skip them: the sandbox protects the machine, not the score.

The part that runs inside is `nspo/evaluation/sandbox/jail.py`. Python's own means alone (`resource`, fewer builtins)
would be no sandbox.
"""

import inspect
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from typing import Literal

from nspo.errors import UserError
from nspo.evaluation.sandbox import jail

Verdict = Literal["passed", "failed", "timed out", "refused"]

NAMESPACES = ("net", "mnt", "pid", "ipc", "uts")
UNSHARE = (
    *("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--ipc", "--uts"),
    *("--fork", "--kill-child"),
)
# The ways to get the namespaces, best first. Without a user namespace only root can make the others.
WRAPPERS = {
    "bubblewrap": ("bwrap", "--unshare-all", "--as-pid-1", "--die-with-parent", "--cap-drop", "ALL"),
    "unshare": (*UNSHARE, "--user", "--map-root-user"),
    "unshare as root": UNSHARE,
}
TOOLS = ("bwrap", "setpriv", "unshare")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
# Reaches its end only where every way out that it tries is closed.
PROBE = """
import os, socket
for way_out in (os.fork, socket.socket, lambda: open("/trace", "w"), lambda: os.listdir("/proc/self")):
    try:
        way_out()
    except OSError:
        continue
    os._exit(1)
"""
WAIT = 3  # wall seconds per CPU second: a busy machine fails no program
GRACE = 10  # seconds by which the jail itself may be late before it is killed from outside


@dataclass(frozen=True)
class Limits:
    """What one program may use: seconds of CPU time (and `WAIT` times that by the clock), bytes of address space."""

    seconds: int = 5
    memory: int = 1 << 30


LIMITS = Limits()


def run(program: str, limits: Limits = LIMITS) -> Verdict:
    """Run Python source in the sandbox.

    Returns:
        "passed" when it ran to its last line, "failed" when it ended before (an error, an exit, too much memory),
        "timed out" when it used up its time, "refused" when the sandbox could not be set up: the program did not run.

    Raises:
        UserError: when this machine cannot isolate a program; nothing was run.
    """
    return _run(isolation(), program, limits)[0]


@cache
def isolation() -> str:
    """The first of `WRAPPERS` in which `PROBE` finds no way out.

    Raises:
        UserError: when there is none, with what stopped each.
    """
    reasons = []
    for name in WRAPPERS:
        verdict, reason = _run(name, PROBE, LIMITS)
        if verdict == "passed":
            return name
        reasons.append(f"{name}: {reason or verdict}")
    raise UserError(
        f"evaluation.run_code is true, but this machine cannot isolate a program ({'; '.join(reasons)}): install "
        "bubblewrap, allow user namespaces, or set run_code to false"
    )


def _run(wrapper: str, program: str, limits: Limits) -> tuple[Verdict, str]:
    """The verdict, and what the wrapper said last."""
    tools = {word: shutil.which(word) for word in TOOLS if word in WRAPPERS[wrapper]}
    if missing := [word for word, path in tools.items() if path is None]:
        return "refused", f"no {missing[0]} on the PATH"
    token = secrets.token_hex(16)
    source = f"{program}\n\n__import__('os').write({jail.VERDICT}, b'{token}')\n"
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="nspo-sandbox-") as root, open(reader, "rb") as verdict:
        try:
            process = subprocess.Popen(
                [tools.get(word) or word for word in _command(wrapper, root, writer, limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={},  # no PATH either, hence the full paths
                cwd="/",
                pass_fds=[writer],
                start_new_session=True,
            )
        finally:
            os.close(writer)
        said = _finish(process, source.encode(errors="replace"), limits.seconds * WAIT + GRACE)
        found = verdict.read()
    if not found.startswith(jail.STARTED):
        return "refused", said
    if found == jail.STARTED + token.encode():
        return "passed", said
    return ("timed out" if process.returncode in (jail.TIMED_OUT, -signal.SIGKILL) else "failed"), said


def _finish(process: subprocess.Popen[bytes], source: bytes, seconds: float) -> str:
    """Feed and await a process, and kill its group where it does not end by itself; the last line of its errors."""
    try:
        _, errors = process.communicate(source, timeout=seconds)
    except subprocess.TimeoutExpired:
        return ""
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return (errors.decode(errors="replace").strip().splitlines() or [""])[-1]


def _command(wrapper: str, root: str, verdict: int, limits: Limits) -> list[str]:
    folders = [path for path in (sys.base_prefix, *LIBRARIES) if os.path.exists(path)]
    plan = {"root": root, "folders": folders, "verdict": verdict, "wait": limits.seconds * WAIT, **asdict(limits)}
    binds: list[str] = []
    if wrapper == "bubblewrap":
        plan["root"] = None  # bubblewrap makes its own
        binds = [word for path in folders for word in ("--ro-bind", path, path)]
        binds += ["--remount-ro", "/", "--chdir", "/"]
    else:
        plan["namespaces"] = {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES}
    python: str = sys._base_executable  # type: ignore[attr-defined]  # of the installation, not of the environment
    return [*WRAPPERS[wrapper], *binds, python, "-I", "-S", "-B", "-c", inspect.getsource(jail), json.dumps(plan)]

"""A model server beside a command, on GPUs of its own: started before it, ended with it, whatever happens.

    nspo with-server --model meta-llama/Llama-Guard-4-12B --gpus 1 -- snakemake --cores all --configfile my.yaml

starts `vllm serve` on the job's last GPU, waits until it answers, runs the command on the others, and ends the server.
The command finds the address in NSPO_SERVER (http://127.0.0.1:PORT), and wherever `{server}` stands in its words.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from nspo.errors import UserError
from nspo.run.gpus import VISIBLE, devices
from nspo.run.progress import say

ADDRESS = "NSPO_SERVER"
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE_SECONDS = 30  # for the server to end before it is killed
PR_SET_PDEATHSIG = 1


def with_server(
    command: Sequence[str], model: str, gpus: int, serve: Sequence[str] = ("vllm", "serve"), wait: float = 1800.0
) -> int:
    """Run `command` beside a server of `model`; its exit code.

    Args:
        gpus: devices of the server, the last that are visible; the command sees the others. 0: they share.
        serve: what starts a server, given the model and `--port`.
        wait: most seconds until it answers.

    Raises:
        UserError: too few GPUs, or a server that cannot be started, ends, or does not answer in time.
    """
    own, others = _split(gpus)
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    words = [*serve, model, "--port", str(port)]
    try:
        server = subprocess.Popen(
            words, env=_seeing(own), start_new_session=True, preexec_fn=_end_with_parent, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise UserError(f"{serve[0]} cannot be started ({error.strerror})", change="install it") from error
    try:
        _await(server, address, wait)
        say(f"{model} answers at {address}")
        return _run([word.replace("{server}", address) for word in command], {**_seeing(others), ADDRESS: address})
    finally:
        _end(server)


def _split(gpus: int) -> tuple[list[str] | None, list[str] | None]:
    """The devices of the server and of the command; None: whatever there is."""
    names = devices()
    if not gpus:
        return None, None
    if gpus > len(names):
        raise UserError(f"--gpus {gpus}: found {len(names)} GPUs", expected="at least as many")
    return names[-gpus:], names[:-gpus]


def _seeing(names: list[str] | None) -> dict[str, str]:
    return {**os.environ, **({} if names is None else {VISIBLE: ",".join(names)})}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _end_with_parent() -> None:
    """Also where this process is killed outright."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _await(server: "subprocess.Popen[Any]", address: str, wait: float) -> None:
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        if (code := server.poll()) is not None:
            raise UserError(f"the server ended with {code} before it answered: its own lines above say why")
        try:
            with urllib.request.urlopen(f"{address}/v1/models", timeout=5) as reply:
                if reply.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            time.sleep(0.5)
    raise UserError(f"the server did not answer within {wait:.0f} s: give it longer (--wait), or a smaller model")


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command to its end, with the signals passed on that this process gets."""
    running: list[subprocess.Popen[Any]] = []

    def pass_on(number: int, frame: Any) -> None:
        for process in running:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        running.append(subprocess.Popen(command, env=environment))
        code = running[0].wait()
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started ({error.strerror})") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _end(server: "subprocess.Popen[Any]") -> None:
    """End the server and all that it started: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE_SECONDS)
            return

"""Processes that have imported all that Snakemake, or the stages, need, and run each as a fork of themselves.

See `forked/sitecustomize.py`, which asks them. A fork has the folder, environment and files of who asks, and one thread
for arithmetic. What is about fresh processes themselves (launchers, kills, threads) is tested without them.
"""

import atexit
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
SERVERS = "NSPO_TESTS_FORK_SERVERS"
QUIET = {  # what `nspo` itself sets before it imports a stage
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
OF_SNAKEMAKE = ("snakemake.cli", "snakemake.parser", "pydantic", "pandas", "pyarrow.parquet", "requests", "smart_open")
OF_STAGES = ("trl", "transformers.models.llama.modeling_llama")  # what stages import as they run


@cache
def environment() -> dict[str, str]:
    """The variables with which `python -m` asks the servers, which end with this process."""
    if not hasattr(os, "pidfd_open"):
        return {}
    folder = tempfile.TemporaryDirectory(prefix="nspo")  # short: the path of a socket may have 100 characters
    atexit.register(folder.cleanup)
    paths = _paths(str(TESTS), str(TESTS.parent))
    server = subprocess.Popen(
        [sys.executable, "-m", "support.fork_server", folder.name],
        stdin=subprocess.PIPE,
        env={**os.environ, **QUIET, "PYTHONPATH": paths},
    )
    while not all(Path(folder.name, name).exists() for name in ("nspo", "snakemake")):
        assert server.poll() is None, "the servers did not start"
        time.sleep(0.05)
    return {SERVERS: folder.name, "PYTHONPATH": _paths(str(TESTS / "support/forked"))}


def _paths(*more: str) -> str:
    return os.pathsep.join(filter(None, [*more, os.environ.get("PYTHONPATH", "")]))


def run(module: str, arguments: list[str], folder: str, environment: dict[str, str], files: list[int]) -> int:
    """Run `python -m MODULE ARGUMENTS` in this process; the exit code."""
    for place, file in enumerate(files):
        os.dup2(file, place)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(place, "w"), line_buffering=True) for place in (1, 2))
    sys.stderr.reconfigure(errors="backslashreplace")
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [folder, *(path for path in sys.path if not Path(path).is_relative_to(TESTS))]
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def answer(module: str, client: socket.socket) -> None:
    """Run what a client asks for in a fork and tell the exit code; kill the fork where the client goes first."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(client, 8, 3)
    with client.makefile("rb") as text:
        asked = json.loads(text.read(int.from_bytes(size, "big")))
    fork = os.fork()
    if not fork:
        client.close()
        os._exit(run(module, **asked, files=files))
    ended = os.pidfd_open(fork)
    if ended not in select.select([ended, client], [], [])[0]:
        os.kill(fork, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
    client.sendall(str(code if code >= 0 else 128 - code).encode())


def serve(module: str, path: Path) -> None:
    """Answer whoever connects to the socket `path`, until standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{path}.new")
        listening.listen(64)
        Path(f"{path}.new").rename(path)
        while 0 not in select.select([listening, 0], [], [])[0]:
            client, _ = listening.accept()
            if not os.fork():
                listening.close()
                try:
                    answer(module, client)
                finally:
                    os._exit(0)
            client.close()


def main(folder: Path) -> None:
    """Serve Snakemake, which imports the package itself, from wherever its copy lies; and the stages in a fork."""
    for name in OF_SNAKEMAKE:
        importlib.import_module(name)
    if os.fork():
        return serve("snakemake", folder / "snakemake")
    import torch

    from nspo.cli.stages import STAGES

    for name in (*{stage.function.partition(":")[0] for stage in STAGES.values()}, *OF_STAGES):
        importlib.import_module(name)
    torch.set_num_threads(1)
    return serve("nspo", folder / "nspo")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

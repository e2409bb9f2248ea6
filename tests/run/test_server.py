"""A server beside a command: a small real one in place of vLLM's."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

SERVER = """
import http.server, os, pathlib, sys, time
folder, model, flag, port = pathlib.Path({folder!r}), *sys.argv[1:]
(folder / "pid").write_text(str(os.getpid()))
(folder / "sees").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
time.sleep(1)
class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(port)), Models).serve_forever()
"""
ASK = "import os, sys, urllib.request; print(urllib.request.urlopen(sys.argv[1] + '/v1/models').status, "
ASK += "os.environ['NSPO_SERVER'] == sys.argv[1], os.environ['CUDA_VISIBLE_DEVICES'])"


def command(folder: Path, *words: str, code: str = "") -> list[str]:
    """The words of `nspo with-server` with the small server, or another program, in place of vLLM's."""
    (folder / "server.py").write_text(code or SERVER.format(folder=str(folder)))
    serve = f"{sys.executable} {folder / 'server.py'}"
    return [sys.executable, "-m", "nspo", "with-server", "--model", "m", "--gpus", "2", "--serve", serve, *words]


def run(folder: Path, *words: str, code: str = "", visible: str = "0,1,2,3") -> "subprocess.CompletedProcess[str]":
    """Run it to its end."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    return subprocess.run(
        command(folder, *words, code=code), env=environment, text=True, capture_output=True, check=False
    )


def gone(folder: Path) -> bool:
    """Whether the server has ended, some seconds allowed."""
    pid, deadline = int((folder / "pid").read_text()), time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_the_command_finds_the_server_and_the_server_ends_with_it(tmp_path: Path) -> None:
    """It answers before the command starts; each sees its own devices; the exit code is the command's."""
    done = run(tmp_path, "--", sys.executable, "-c", ASK, "{server}")
    assert (done.stdout.strip(), done.returncode) == ("200 True 0,1", 0), done.stderr
    assert (tmp_path / "sees").read_text() == "2,3"
    assert gone(tmp_path)
    assert run(tmp_path, "--", sys.executable, "-c", "import sys; sys.exit(7)").returncode == 7
    assert gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_when_the_job_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    """Asked to, or outright."""
    sleep = command(tmp_path, "--", sys.executable, "-c", "print('runs', flush=True); import time; time.sleep(60)")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    job = subprocess.Popen(sleep, env=environment, text=True, stdout=subprocess.PIPE)
    assert job.stdout is not None
    assert job.stdout.readline() == "runs\n"
    below = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(number)
    assert job.wait(timeout=60) == (143 if number == signal.SIGTERM else -number)
    assert gone(tmp_path)
    for process in below:  # SIGKILL leaves the command itself to the cluster
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.parametrize(
    ("code", "visible", "said"),
    [
        ("import sys; sys.exit(3)", "0,1,2", "the server ended with 3 before it answered"),
        ("", "0", "--gpus 2: found 1 GPUs, expected at least as many"),
    ],
)
def test_a_server_that_cannot_serve_is_told(code: str, visible: str, said: str, tmp_path: Path) -> None:
    """In one line, and the command never starts."""
    done = run(tmp_path, "--", sys.executable, "-c", "print('ran')", code=code, visible=visible)
    assert done.returncode == 2
    assert said in done.stderr
    assert "ran" not in done.stdout

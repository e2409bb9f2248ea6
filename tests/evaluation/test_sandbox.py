"""The sandbox: programs that try to break out, and the score of code.

An attack is a program that reaches its last line only when it has done what it must not. Where that is harmless it is
first run without the sandbox, where it must succeed: an attack that fails everywhere would prove nothing.
"""

import contextlib
import inspect
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nspo.errors import UserError
from nspo.evaluation.checks import mark, runs_code
from nspo.evaluation.sandbox import jail
from nspo.evaluation.sandbox import run as sandbox
from nspo.evaluation.sandbox.programs import whole_program
from nspo.evaluation.sandbox.run import Limits, run

try:
    sandbox.isolation()
    refusal = ""
except UserError as error:
    refusal = str(error)
isolated = pytest.mark.skipif(bool(refusal), reason=refusal)

MEMORY = (256 << 20) + 4096 * (os.getpid() % 4096)  # of this test run alone, so that what is left of it can be found
SMALL = Limits(seconds=1, memory=MEMORY)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that sleep are given up sooner."""
    monkeypatch.setattr(sandbox, "WAIT", 2)


def outside(program: str, **options: object) -> bool:
    """Whether the program reaches its last line in a plain process."""
    python = [sys.executable, "-I", "-S", "-B", "-"]
    ended = subprocess.run(python, input=program.encode(), capture_output=True, timeout=30, **options)  # type: ignore[call-overload]
    return bool(ended.returncode == 0)


def left_over() -> list[str]:
    """Processes of this machine under the memory limit of these tests."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            limits = (path / "limits").read_text().splitlines()
            found += [path.name for line in limits if line.startswith("Max address space") and str(MEMORY) in line]
    return found


# ------------------------------------------------------------------------------------------- verdicts


@isolated
@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("assert sum(range(5)) == 10", "passed"),
        ("import math, re, random, hashlib, collections, typing\nhashlib.md5(b'').digest()", "passed"),
        ("for _ in range(50_000): print('x' * 100)", "passed"),  # far more than a pipe holds
        ("print('\ud800')", "passed"),  # half a surrogate pair
        ("assert False", "failed"),
        ("def f(:", "failed"),
        ("x = '''", "failed"),
        ("import numpy", "failed"),  # this Python's library only
        ("input()", "failed"),
        ("import sys; sys.exit(0)", "failed"),
        ("import os; os._exit(0)", "failed"),
        ("import os; os.write(3, b'x')", "failed"),
        ("import os; os.kill(os.getpid(), 15)", "failed"),
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "timed out"),
        ("import os\nwhile True: os.write(3, b'x' * 4096)", "timed out"),  # into the verdict itself
    ],
)
def test_verdicts(program: str, verdict: str) -> None:
    """Only a program that runs to its last line has passed; leaving early, however politely, has not."""
    began = time.monotonic()
    assert run(program, SMALL) == verdict
    assert time.monotonic() - began < SMALL.seconds * sandbox.WAIT + sandbox.GRACE / 2


# ------------------------------------------------------------------------------------------- attacks


@pytest.fixture
def listener() -> Iterator[int]:
    """A port of this machine that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that anyone may read."""
    path = tmp_path / "secret.txt"
    path.write_text("planted")
    path.chmod(0o644)
    return path


def both(program: str) -> None:
    """The attack succeeds outside and fails inside, and leaves no process."""
    assert outside(program), "the attack itself is broken"
    assert run(program, SMALL) == "failed"
    assert not left_over()


@isolated
def test_no_network(listener: int) -> None:
    """No way to a port of this machine, nor to a socket with an abstract name."""
    both(f"import socket; socket.create_connection(('127.0.0.1', {listener}), 2)")
    name = f"\0nspo-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        both(f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})")
    both("import socket; socket.socket(socket.AF_UNIX)")
    for family in ("AF_INET6", "AF_NETLINK", "AF_VSOCK"):
        assert run(f"import socket; socket.socket(socket.{family})", SMALL) == "failed"


@isolated
def test_the_network_namespace_holds_alone(listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sockets allowed, as through a hole in the filter, there is still no way to a port of this machine."""
    source = inspect.getsource(jail)
    rule = '    "socket": (41, 198),\n'
    assert rule in source
    monkeypatch.setattr(inspect, "getsource", lambda _: source.replace(rule, ""))
    assert run("import socket; socket.socket(); socket.socket(socket.AF_UNIX)", SMALL) == "passed"
    assert run(f"import socket; socket.create_connection(('127.0.0.1', {listener}), 2)", SMALL) == "failed"


@isolated
def test_no_reading_outside(secret: Path, tmp_path: Path) -> None:
    """A file outside cannot be read, neither by its path nor through a link; folders outside are not even there."""
    both(f"assert open({str(secret)!r}).read() == 'planted'")
    link = tmp_path / "link"
    for kind in ("symlink", "link"):
        made = f"os.{kind}({str(secret)!r}, {str(link)!r})"
        both(f"import os; {made}; open({str(link)!r}).read(); os.unlink({str(link)!r})")
    both(f"import os; os.chdir({str(tmp_path)!r})")
    for folder in ("/proc/self", "/dev", tempfile.gettempdir()):
        both(f"import os; os.listdir({folder!r})")


@isolated
def test_no_writing_anywhere(tmp_path: Path) -> None:
    """Nothing can be written: not outside, not at home, in this project or a temporary folder, not even inside."""
    trace = tmp_path / "trace"
    both(f"open({str(trace)!r}, 'w').write('x')")
    trace.unlink()
    folders = [Path.home(), Path(__file__).parents[2], Path(tempfile.gettempdir()), Path("/dev/shm"), Path("/var/tmp")]
    name = f"nspo-trace-{os.getpid()}"
    for folder in (*folders, Path("/"), Path(sys.base_prefix)):
        assert run(f"open({str(folder / name)!r}, 'w')", SMALL) == "failed"
        assert not (folder / name).exists()
    walk = f"""
import os
folders = 0

def writable(path):
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
    except OSError:
        return False
    return True

for folder, _, files in os.walk("/"):
    folders += 1
    assert not any(writable(os.path.join(folder, file)) for file in [{name!r}, *files[:1]]), folder
assert folders > 20
"""
    assert run(walk, Limits(seconds=20)) == "passed"


@isolated
def test_no_environment_and_no_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: Path) -> None:
    """A variable and an inheritable file of the caller do not come in; all that is open is four pipes."""
    monkeypatch.setenv("NSPO_PLANTED", "secret")
    both("import os; os.environ['NSPO_PLANTED']")
    file = os.open(secret, os.O_RDONLY)
    os.set_inheritable(file, True)
    program = f"import os; assert os.pread({file}, 7, 0) == b'planted'"
    assert outside(program, close_fds=False)
    assert run(program, SMALL) == "failed"
    os.close(file)
    pipes = """
import os, stat
found = {}
for file in range(4096):
    try:
        found[file] = stat.S_ISFIFO(os.fstat(file).st_mode)
    except OSError:
        pass
assert found == dict.fromkeys(range(4), True), found
assert set(os.environ) <= {"LC_CTYPE"}  # which Python itself sets
"""
    assert run(pipes) == "passed"


@isolated
def test_no_way_to_other_processes() -> None:
    """Processes outside can be neither killed nor looked into, by their number or as the parent."""
    victim = subprocess.Popen(["sleep", "60"])
    try:
        attack = f"import os; os.kill({victim.pid}, 9)"
        assert run(attack, SMALL) == "failed"
        assert victim.poll() is None
        assert outside(attack)
    finally:
        victim.kill()
        victim.wait()
    assert run(f"import os; os.kill({os.getpid()}, 0)", SMALL) == "failed"
    # Signals to the parent, and to all, reach nobody.
    assert run("import os\nos.kill(os.getppid(), 9)\nassert os.getppid() > 0", SMALL) == "passed"
    for name in ("mem", "environ", "cmdline", "maps", "root/etc/passwd"):
        for process in ("self", "1", str(os.getpid())):
            assert run(f"open('/proc/{process}/{name}', 'rb')", SMALL) == "failed"


FORK = "import os\nif os.fork() == 0:\n    os._exit(0)"
SPAWN = f"import subprocess\nsubprocess.run([{os.path.realpath(sys.executable)!r}, '-c', ''])"
THREAD = "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()"
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1)
    os._exit(0)
"""


@isolated
@pytest.mark.parametrize("attack", [FORK, SPAWN, THREAD, DAEMON], ids=["fork", "spawn", "thread", "daemon"])
def test_no_second_process(attack: str) -> None:
    """Nothing can be started, so limits per process are limits of all, and nothing can stay behind."""
    both(attack)


@isolated
def test_fork_bomb() -> None:
    """A bomb that goes on after every refusal is alone until its time is up."""
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    assert run(bomb, SMALL) == "timed out"
    assert not left_over()


@isolated
def test_nothing_outlives_the_time_limit() -> None:
    """A program that left its session and cancelled the signal for its parent's death is gone when `run` returns."""
    hide = "import ctypes, os, time\nos.setsid()\nctypes.CDLL(None).prctl(1, 0)\nos.close(3)\ntime.sleep(60)"
    assert run(hide, SMALL) == "timed out"
    assert not left_over()


@isolated
def test_nothing_outlives_the_caller(tmp_path: Path) -> None:
    """When the stage itself is killed, the program in the sandbox dies with it."""
    caller = (
        "from nspo.evaluation.sandbox.run import Limits, run\n"
        f"run('import time; time.sleep(60)', Limits(seconds=60, memory={MEMORY}))"
    )
    process = subprocess.Popen([sys.executable, "-c", caller], env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        assert _soon(lambda: bool(left_over()), 60)
    finally:
        process.kill()
        process.wait()
    assert _soon(lambda: not left_over(), 10)


def _soon(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


BOMBS = {
    "heap": "hoard = [bytearray(1 << 20) for _ in range(SIZE >> 20)]",
    "map": "import mmap\nhoard = [mmap.mmap(-1, 1 << 24) for _ in range(SIZE >> 24)]",
    "memory file": "import os\nfile = os.memfd_create('x')\nfor _ in range(SIZE >> 20): os.write(file, bytes(1 << 20))",
    "segment": "import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 20, 0o600) >= 0",
    "queue": "import ctypes\nassert ctypes.CDLL(None).msgget(0, 0o600) >= 0",
}


@isolated
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_memory_bombs(bomb: str) -> None:
    """No kind of memory goes beyond the limit, or escapes the count."""
    both(f"SIZE = {MEMORY + (64 << 20)}\n{bomb}")


@isolated
def test_output_is_not_kept() -> None:
    """Floods of output, into every open pipe, cost this process no memory."""
    run("pass", SMALL)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flood = "import os\nfor _ in range(2000):\n    os.write({}, bytes(1 << 16))"
    assert [run(flood.format(file), Limits(5, MEMORY)) for file in (1, 2)] == ["passed", "passed"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10


@isolated
def test_limits_and_privileges_are_gone_for_good() -> None:
    """With ctypes too, no limit can be raised, no namespace made, no file system mounted, no filter or root left."""
    program = f"""
import ctypes, os, resource

libc = ctypes.CDLL(None, use_errno=True)
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
    most = resource.getrlimit(kind)[1]
    try:
        resource.setrlimit(kind, (most + 1, most + 1))
    except (ValueError, OSError):
        pass
    assert resource.getrlimit(kind)[1] == most
unlimited = (ctypes.c_uint64 * 2)(2**64 - 1, 2**64 - 1)
assert libc.prlimit(0, resource.RLIMIT_AS, unlimited, None) == -1
assert resource.getrlimit(resource.RLIMIT_AS) == ({MEMORY}, {MEMORY})

header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
assert not any(sets)
refused = {{
    "capset": libc.capset(header, (ctypes.c_uint32 * 6)(*[2**32 - 1] * 6)),
    "user namespace": libc.unshare(0x10000000),
    "mount namespace": libc.unshare(0x00020000),
    "mount": libc.mount(b"none", b"/usr", b"tmpfs", 0, None),
    "remount": libc.mount(None, b"/", None, 32, None),
    "umount": libc.umount2(b"/usr/lib", 2),
    "chroot": libc.chroot(b"/usr"),
    "pivot_root": libc.pivot_root(b"/usr", b"/usr"),
    "host name": libc.sethostname(b"x", 1),
    "ptrace": libc.ptrace(16, 1, None, None),
    "memory of the parent": libc.process_vm_readv(1, None, 0, None, 0, 0),
    "another user": libc.setuid(12345),
    "mode of a file": libc.chmod(b"/usr/lib", 0o777),
    "x32 numbering, or no filter": 0 if libc.prctl(21, 0, 0, 0, 0) == 2 else -1,
}}
assert refused.pop("x32 numbering, or no filter") == 0
assert set(refused.values()) == {{-1}}, refused
assert libc.prctl(39, 0, 0, 0, 0) == 1
"""
    assert run(program, SMALL) == "passed"


@isolated
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the second numbering of calls is x86_64's")
def test_the_filter_knows_both_numberings() -> None:
    """A refused call under its number of the x32 numbering ends the program instead of reaching the kernel."""
    assert run("import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 39)", SMALL) == "failed"


# ------------------------------------------------------------------------------------------- refusal


def test_refused_where_nothing_isolates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without bubblewrap and `unshare`, or where they fail, nothing runs and one line says why."""
    trace = tmp_path / "trace"
    sandbox.isolation.cache_clear()
    try:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match="no bwrap on the PATH") as error:
            run(f"open({str(trace)!r}, 'w')")
        assert "\n" not in str(error.value)
        for name in sandbox.TOOLS:
            (tmp_path / name).write_text("#!/bin/sh\necho not permitted >&2\nexit 1\n")
            (tmp_path / name).chmod(0o755)
        with pytest.raises(UserError, match="bubblewrap: not permitted; unshare: not permitted"):
            run(f"open({str(trace)!r}, 'w')")
    finally:
        sandbox.isolation.cache_clear()
    assert not trace.exists()


@isolated
def test_a_leaking_wrapper_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A way that starts programs but leaves one way out open, here the call filter's, is refused like none."""
    source = inspect.getsource(jail)
    monkeypatch.setattr(inspect, "getsource", lambda _: source.replace("        filter_calls()\n", ""))
    sandbox.isolation.cache_clear()
    try:
        with pytest.raises(UserError, match="cannot isolate a program"):
            sandbox.isolation()
    finally:
        sandbox.isolation.cache_clear()


def test_a_shared_namespace_is_noticed() -> None:
    """The jail goes no further in a namespace of its caller's, whatever tool was to make a new one."""
    ours = {name: os.readlink(f"/proc/self/ns/{name}") for name in sandbox.NAMESPACES}
    for name in sandbox.NAMESPACES:
        with pytest.raises(SystemExit, match=f"the {name} namespace is not a new one"):
            jail.require_new_namespaces({name: ours[name]})
    jail.require_new_namespaces(dict.fromkeys(ours, "another"))


# ------------------------------------------------------------------------------------------- code answers

TASKS = [
    ("double", "x", "return x * 2", "candidate(4) == 8"),
    ("is_even", "n", "return n % 2 == 0", "candidate(2) and not candidate(3)"),
    ("largest", "items", "best = items[0]\nfor item in items:\n    if item > best:\n        best = item\nreturn best",
     "candidate([3, 9, 2]) == 9"),
    ("vowels", "text", "return sum(letter in 'aeiou' for letter in text.lower())", "candidate('Audio') == 4"),
    ("fibonacci", "n", "a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn a", "candidate(10) == 55"),
    ("unique", "items", "return list(dict.fromkeys(items))", "candidate([1, 2, 1]) == [1, 2]"),
    ("mean", "items: List[float]", "return math.fsum(items) / len(items)", "abs(candidate([1.0, 2.0]) - 1.5) < 1e-9"),
    ("is_palindrome", "text", "return text == text[::-1]", "candidate('level') and not candidate('ab')"),
    ("gcd", "a, b", "while b:\n    a, b = b, a % b\nreturn a", "candidate(12, 18) == 6"),
    ("flatten", "lists", "return [item for part in lists for item in part]", "candidate([[1], [2, 3]]) == [1, 2, 3]"),
]  # fmt: skip


def check_of(name: str, arguments: str, test: str) -> dict[str, str]:
    """A check as HumanEval's columns give it."""
    prompt = f'import math\nfrom typing import List\n\n\ndef {name}({arguments}):\n    """ The {name} of it.\n    """\n'
    return {
        "type": "program",
        "prompt": prompt,
        "entry_point": name,
        "test": f"def check(candidate):\n    assert {test}\n",
    }


def indented(body: str) -> str:
    """A function's body."""
    return "".join(f"    {line}\n" for line in body.splitlines())


@isolated
@pytest.mark.parametrize(("name", "arguments", "body", "test"), TASKS, ids=[task[0] for task in TASKS])
def test_solutions_pass(name: str, arguments: str, body: str, test: str) -> None:
    """A right solution passes as a whole function in a fence and as a continuation; a wrong one and none fail."""
    check = check_of(name, arguments, test)
    whole = f"def {name}({arguments}):\n{indented(body)}"
    assert mark(check, f"Here it is:\n```python\n{whole}```\nIt works.")
    assert mark(check, indented(body))
    assert not mark(check, f"```python\ndef {name}({arguments}):\n    return 'wrong'\n```")
    assert not mark(check, "")


CHECK = check_of("double", "x", "candidate(4) == 8")
FUNCTION = "def double(x):\n    return x * 2\n"


@pytest.mark.parametrize(
    "answer",
    [
        FUNCTION,
        f"```\n{FUNCTION}```",
        f"```py\n{FUNCTION}",  # cut off before the fence was closed
        f"First:\n```python\nprint(double(1))\n```\nThen:\n```python\n{FUNCTION}```",
        "return x * 2",  # the first indent is lost where answers are stripped
        "y = x\n    return y * 2\n\nThis doubles x.",
        "```python\n    return x * 2\n```",
    ],
)
def test_code_is_found(answer: str) -> None:
    """The program holds the function, however the answer wraps it, and no prose: it compiles, and is right."""
    names: dict[str, object] = {}
    exec(compile(whole_program(CHECK, answer), "program", "exec"), names)
    assert names["double"](21) == 42  # type: ignore[operator]


def test_where_code_hides() -> None:
    """A check that runs code is found inside `all` too, and nowhere else."""
    assert runs_code(CHECK)
    assert runs_code({"type": "all", "checks": [{"type": "json"}, {"type": "all", "checks": [CHECK]}]})
    assert not runs_code({"type": "all", "checks": [{"type": "json"}]})
    assert not runs_code({"type": "number", "answer": 1})


def test_a_refused_program_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sandbox stops working, the stage stops: the model is not blamed."""
    monkeypatch.setattr(sandbox, "run", lambda program: "refused")
    with pytest.raises(UserError, match="could not be set up again"):
        mark(CHECK, FUNCTION)

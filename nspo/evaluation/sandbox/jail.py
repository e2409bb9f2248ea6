"""The inside of the sandbox: what runs between fresh namespaces and the untrusted program.

`nspo.evaluation.sandbox.run` gives the source of this file to a bare Python (`python -I -S -c`), so it imports the
standard library only. It leaves the machine's files for a read-only root, forks, and in the child gives up every
capability, sets the limits, filters system calls, says so on the verdict pipe, and becomes the Python that reads the
program from its standard input. The parent is the first process of the namespace: when it ends, with the program or at
the time limit, the kernel ends what is left before it tells anyone.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

VERDICT = 3  # file descriptor of the verdict pipe inside
STARTED = b"started "
TIMED_OUT = 128 + signal.SIGKILL  # as the kernel ends a program for its CPU time
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC = 2, 4, 4096, 16384
MNT_DETACH = 2
MOUNT_SETATTR, AT_RECURSIVE, READ_ONLY_NOSUID_NODEV = 442, 0x8000, 1 | 2 | 4
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_NO_NEW_PRIVS = 22, 2, 38
CAPABILITIES_V3 = 0x20080522
X32 = 0x40000000  # calls of x86-64's second numbering
KILL, REFUSE, ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000

# Refused are calls that namespaces leave open and no limit counts: further processes and threads (with one process its
# limits are those of the whole), namespaces of its own, other processes' memory, memory that belongs to no process,
# sockets (a network namespace does not hold those to a virtual machine's host), and the parts of the kernel with most
# holes. Numbers on x86_64 and on aarch64.
CALLS = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "fork": (57, None),
    "vfork": (58, None),
    "unshare": (272, 97),
    "setns": (308, 268),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "socket": (41, 198),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
    "perf_event_open": (298, 241),
    "syslog": (103, 116),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # the column of CALLS, and the audit number

libc = ctypes.CDLL(None, use_errno=True)


def main(plan: Mapping[str, Any]) -> None:
    """Set up the fence that `plan` describes and run the program in it; exits with the program's own status.

    `plan` holds root (an empty folder, or None where the root is ready), folders, namespaces (those of the caller),
    verdict (file descriptor), wait (seconds by the clock), seconds and memory (see
    `nspo.evaluation.sandbox.run.Limits`).
    """
    if plan["root"]:
        require_new_namespaces(plan["namespaces"])
        enter(plan["root"], plan["folders"])
    output, drain = os.pipe()
    child = os.fork()
    if child == 0:
        give_up_privileges()
        limit(plan["seconds"], plan["memory"])
        filter_calls()
        become_quiet(drain, plan["verdict"])
        os.write(VERDICT, STARTED)
        os.execve(sys.executable, [sys.executable, "-I", "-S", "-B", "-"], {})
    signal.signal(signal.SIGALRM, lambda *_: os._exit(TIMED_OUT))
    signal.alarm(plan["wait"])
    os.close(drain)
    while os.read(output, 1 << 16):  # what the program prints is read and forgotten
        pass
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def require_new_namespaces(theirs: Mapping[str, str]) -> None:
    """Stop unless this process shares none of the caller's namespaces: the next step would change the caller's mounts.

    Raises:
        SystemExit: one that is shared, by name.
    """
    for name, identity in theirs.items():
        if os.readlink(f"/proc/self/ns/{name}") == identity:
            sys.exit(f"the {name} namespace is not a new one")


def enter(root: str, folders: Sequence[str]) -> None:
    """Make `root` this process's file system: read-only, empty but for `folders` (and files) at their own paths.

    Raises:
        OSError: where the kernel refuses a step.
    """
    _done(libc.mount(b"none", root.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=755"), "mount")
    for path in folders:
        target = root + path
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(target, os.O_CREAT))
        _done(libc.mount(path.encode(), target.encode(), None, MS_BIND | MS_REC, None), f"bind {path}")
    os.chdir(root)
    _done(libc.pivot_root(b".", b"."), "pivot_root")  # the old root now lies on top of the new one
    _done(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")
    attributes = struct.pack("QQQQ", READ_ONLY_NOSUID_NODEV, 0, 0, 0)
    _done(libc.syscall(MOUNT_SETATTR, -1, b"/", AT_RECURSIVE, attributes, len(attributes)), "mount_setattr")


def give_up_privileges() -> None:
    """Drop every capability, for good: no program run from here on can gain any.

    Raises:
        OSError: where the kernel refuses.
    """
    _done(libc.capset((ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0), (ctypes.c_uint32 * 6)()), "capset")
    _done(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def limit(seconds: int, memory: int) -> None:
    """Limits that cannot be raised again: CPU seconds, bytes of address space, no file content, no core, few files."""
    most = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 1,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in most.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def filter_calls() -> None:
    """Have the kernel refuse the calls in `CALLS`, and end a program that uses another numbering of calls.

    Raises:
        SystemExit: on a machine whose numbers are not known here.
        OSError: where the kernel has no filter.
    """
    machine = platform.machine()
    if machine not in MACHINES:
        sys.exit(f"the calls to refuse are not known for {machine}, only for {', '.join(MACHINES)}")
    column, audit = MACHINES[machine]
    numbers = [number for call in CALLS.values() if (number := call[column]) is not None]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    steps = [(load, 0, 0, 4), (equal, 1, 0, audit), (answer, 0, 0, KILL), (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, X32), (answer, 0, 0, KILL)]
    steps += chain.from_iterable([(equal, 0, 1, number), (answer, 0, 0, REFUSE)] for number in numbers)
    steps += [(answer, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    _done(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0), "seccomp")


def become_quiet(drain: int, verdict: int) -> None:
    """Leave open only standard input, output and error (both into `drain`), and the verdict pipe.

    These are pipes: of a device such as /dev/null, root could change the mode through the open file.
    """
    os.dup2(drain, 1)
    os.dup2(drain, 2)
    os.dup2(verdict, VERDICT)
    if verdict != VERDICT:
        os.close(verdict)


def _done(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""Let `python -m nspo` and `python -m snakemake` run as forks of a process that has imported all they need.

Python imports this module as it starts, where its folder is on PYTHONPATH. On a tiny model nearly all of a stage's time
is imports. This process only passes on its command, folder, environment and files to `support/fork_server.py`, waits,
and ends with the exit code that it is told. Where it is killed, so is the fork.
"""

import os
import sys

SERVERS = "NSPO_TESTS_FORK_SERVERS"  # the folder of their sockets, each named like its module

words = sys.orig_argv[2:] if sys.orig_argv[1:2] == ["-u"] else sys.orig_argv[1:]  # -u: below accelerate

if words[:2] in (["-m", "nspo"], ["-m", "snakemake"]) and SERVERS in os.environ:
    import json
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.path.join(os.environ[SERVERS], words[1]))
        asked = {"arguments": words[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
        text = json.dumps(asked).encode()
        socket.send_fds(server, [len(text).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(text)
        code = server.recv(8)
    os._exit(int(code or 1))

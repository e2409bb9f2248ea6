"""Run the stages of the smoke pipeline on a full disk: each says so in one line, and nothing is lost.

    PYTHONPATH=tests python -m support.full_disk PROJECT [STAGE ...]

PROJECT is a folder on a disk of its own, such as a small tmpfs, in which the smoke configuration has run to its end.
What a stage made is removed, and it runs again as a fork of one process that has imported all there is: with room for
no byte, then for half of what it makes. Beside its working folder it may leave whole files only. At last it runs with
room enough, and every artifact must be as it was.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.kill_harness import artifacts, commands, difference, fork, import_all, remove_outputs, say

SAID = "no space left on the disk"


@contextmanager
def room_for(size: int, project: Path) -> Iterator[None]:
    """Fill the disk of `project` but for `size` bytes."""
    state, ballast = os.statvfs(project), project / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (state.f_bavail - size // state.f_frsize) * state.f_frsize)
    try:
        yield
    finally:
        ballast.unlink()


def run(project: Path, stage: list[str], log: Path) -> tuple[int, list[str]]:
    """Run a stage; its status and what it said."""
    _, status = os.waitpid(fork(project, stage, str(log)), 0)
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace").splitlines()


def told(code: int, lines: list[str]) -> bool:
    """Whether a stage ended in the one line that it should."""
    errors = [line for line in lines if line.startswith("nspo: error: ")]
    return code == 2 and len(errors) == 1 and SAID in errors[0]


def main() -> int:
    """Try the stages of one method, say how each ends; 1 where one ends otherwise, leaves half a file or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("stages", nargs="*", help="commands of nspo; all of them where none is named")
    options = parser.parse_args()
    project, wrong = options.project, 0
    stages = [stage for stage in commands(project) if "grpo_no_kl" not in stage]
    stages = [stage for stage in stages if not options.stages or stage[0] in options.stages]
    import_all(stages)
    before = artifacts(project)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        for stage in stages:
            remove_outputs(project, stage)
            needed = sum(len(before[path]) for path in before.keys() - artifacts(project).keys())
            for room in (0, needed // 2):
                remove_outputs(project, stage)
                with room_for(room, project):
                    code, lines = run(project, stage, log)
                left = {path: text for path, text in artifacts(project).items() if not path.startswith(".work/")}
                halves = [path for path in left if left[path] != before.get(path)]
                say(f"{stage[0]}, room for {room} of {needed} bytes: code {code}, {lines[-1:]}, half files: {halves}")
                wrong += not told(code, lines) or bool(halves)
            code, lines = run(project, stage, log)
            differing = difference(before, artifacts(project))
            say(f"{stage[0]}, with room: code {code}, different: {differing or 'none'}")
            wrong += code != 0 or bool(differing)
    say(f"{len(stages)} stages, {wrong} faults")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

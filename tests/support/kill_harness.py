"""Kill the stages of the smoke pipeline at random moments of their work, and compare what they make with a quiet run.

    PYTHONPATH=tests python -m support.kill_harness --kills 3 --seed 0

Every stage runs as a fork of one process that has imported all there is, so a kill falls into the work and not into
the imports. First all stages run undisturbed, one after the other. Then each is done again: killed with SIGKILL at
random moments `--kills` times, each time going on from what the last left, and at last run to its end. Its artifacts
must be those of the quiet run, byte for byte, with nothing else left beside them.
"""

import argparse
import contextlib
import importlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from support.workflow_project import BENCHMARK, contents, copy_project, set_config, snakemake, snakemake_command

RESULTS = Path("results/smoke")
OUTPUTS = ("--out", "--summary", "--latex", "--cards", "--plots")


def processes(workflow: psutil.Process, stage: str) -> list[psutil.Process]:
    """The processes of a stage (a command of `nspo`) below Snakemake."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in workflow.children(recursive=True):
            if child.cmdline()[1:4] == ["-m", "nspo", stage]:
                found.append(child)
    return found


def kill_once(project: Path, stage: str, victim: str, delay: float, *targets: str) -> bool:
    """Start the workflow and kill `delay` seconds after `stage` began; False where it did not run, or not so long.

    Args:
        victim: "stage", "workflow" (Snakemake itself), or "all" of them, as a power cut would.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = subprocess.Popen(snakemake_command(*targets), cwd=project, **quiet)
    workflow = psutil.Process(running.pid)
    while not (stages := processes(workflow, stage)):
        if running.poll() is not None:
            return False
        time.sleep(0.05)
    time.sleep(delay)
    hit = any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in stages)
    below = workflow.children(recursive=True) if victim == "all" else []
    for process in stages if victim == "stage" else [workflow, *below]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    running.wait()
    return hit


def artifacts(project: Path) -> dict[str, bytes]:
    """All that the workflow made, but for logs and the times it took (of training.parquet the rows without them)."""
    found = {}
    for path, content in contents(project / RESULTS).items():
        if path.endswith("training.parquet"):
            table = pq.read_table(io.BytesIO(content))
            times = [name for name in table.column_names if name.endswith(("seconds", "per_second"))]
            found[path] = repr(table.drop_columns(times).to_pylist()).encode()
        elif not path.startswith(("logs/", "timings/")) and not path.endswith(".snakemake_timestamp"):
            found[path] = content
    return found


def difference(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """The files that are not the same, byte for byte, in both."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def commands(project: Path) -> list[list[str]]:
    """The arguments of `nspo` for every stage of the workflow, in an order in which they can run."""
    shown = snakemake(project, "--dry-run", "--forceall", "--printshellcmds").stdout
    lines = re.findall(r"^Shell command: (python -m nspo .*) 2>&1", shown, re.MULTILINE)
    print_words = 'python() { shift 2; printf "%s\\0" "$@"; }; '
    words = [subprocess.check_output(["bash", "-c", print_words + line], text=True) for line in lines]
    if not words:
        raise RuntimeError(f"no stage in the plan of Snakemake:\n{shown}")
    return [text.split("\0")[:-1] for text in words]


def import_all(stages: list[list[str]]) -> None:
    """Import what these stages need, so that a fork has it."""
    from nspo.cli.stages import STAGES

    for name in {stage[0] for stage in stages} & STAGES.keys():
        importlib.import_module(STAGES[name].function.partition(":")[0])


def fork(project: Path, arguments: list[str], log: str = os.devnull) -> int:
    """Run a stage in a fork of this process, with all that it says in `log`; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(project)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        from nspo.cli import main as cli

        code = cli.main(arguments)
    finally:
        os._exit(code)


def undisturbed(project: Path, arguments: list[str]) -> float:
    """Run a stage to its end; the seconds it took."""
    begun = time.monotonic()
    _, status = os.waitpid(fork(project, arguments), 0)
    if status:
        raise RuntimeError(f"the stage ended with status {status}: nspo {' '.join(arguments)}")
    return time.monotonic() - begun


def killed(project: Path, arguments: list[str], delay: float) -> bool:
    """Run a stage and kill it after `delay` seconds; False where it had ended before."""
    pid = fork(project, arguments)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)  # not reaped yet, so the id is still its own
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def remove_outputs(project: Path, arguments: list[str]) -> None:
    """Remove what a stage made."""
    for flag, value in pairwise(arguments):
        path = project / value
        if flag in OUTPUTS and path.is_dir():
            shutil.rmtree(path)
        elif flag in OUTPUTS:
            path.unlink(missing_ok=True)


def say(text: str) -> None:
    """A line at once, also in a file."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Kill in every stage, say every kill and every difference; 1 where an artifact differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="kills per stage")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        project = copy_project(Path(folder))
        set_config(project, benchmarks=BENCHMARK)
        stages = commands(project)
        import_all(stages)
        seconds = [undisturbed(project, stage) for stage in stages]
        say(f"undisturbed: {len(stages)} stages, {sum(seconds):.1f} s")
        before = artifacts(project)
        hits, lost, resumed, again = 0, 0, 0.0, 0.0
        for stage, whole in zip(stages, seconds, strict=True):
            remove_outputs(project, stage)
            delays = [chance.uniform(0, whole) for _ in range(options.kills)]
            times = [delay for delay in delays if killed(project, stage, delay)]
            last = undisturbed(project, stage)
            differing = difference(before, artifacts(project))
            hits, lost, resumed, again = hits + len(times), lost + bool(differing), resumed + last, again + whole
            say(
                f"{' '.join(stage[:1])}: {whole:.2f} s undisturbed, killed after {[round(t, 2) for t in times]}, "
                f"the last run took {last:.2f} s, different: {differing or 'none'}"
            )
    say(f"{hits} kills in {len(stages)} stages, {lost} differences; last runs {resumed:.1f} of {again:.1f} s")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Kill the smoke pipeline at random moments, again and again, and compare what it makes with an undisturbed run.

    python tests/kill_harness.py --rounds 2 --seed 0

A round starts from nothing. For every stage, in the order of the pipeline, the workflow is started (again), the harness
waits until that stage is at work and then for a random part of the time it took undisturbed, and kills with SIGKILL:
the stage, Snakemake itself, or all there is (as a power cut would). In the end the workflow runs to its end, and
every artifact is compared byte for byte.
"""

import argparse
import contextlib
import io
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from workflow_project import contents, copy_project, snakemake, snakemake_command

RESULTS = Path("results/smoke")
# The commands of the stages and, where several jobs share one, the flag that tells them apart; in the pipeline's order.
STAGES = {
    "prepare_model": ("prepare-model",),
    "prepare_prompts": ("prepare-prompts",),
    "prepare_labels": ("prepare-labels",),
    "collect_activations": ("collect",),
    "train_cost": ("train-preference", "--target cost"),
    "train_reward": ("train-preference", "--target reward"),
    "compute_bases": ("bases",),
    "evaluate_base": ("evaluate", "--name base"),
    "train_policy nspo": ("train-policy", "--name nspo"),
    "train_policy grpo_no_kl": ("train-policy", "--name grpo_no_kl"),
    "certify": ("verify",),
    "evaluate_policy": ("evaluate", "--name nspo"),
    "report": ("report",),
}
VICTIMS = ("stage", "workflow", "all")


def processes(workflow: psutil.Process, stage: str) -> list[psutil.Process]:
    """The processes of a stage below Snakemake."""
    command, *flags = STAGES[stage]
    found = []
    with contextlib.suppress(psutil.Error):
        for child in workflow.children(recursive=True):
            words = child.cmdline()
            if words[1:4] == ["-m", "nspo", command] and all(flag in " ".join(words) for flag in flags):
                found.append(child)
    return found


def undisturbed(project: Path) -> dict[str, float]:
    """Run the workflow in peace; {stage: seconds it took}."""
    begun: dict[str, float] = {}
    seconds: dict[str, float] = {}
    running = start(project)
    workflow = psutil.Process(running.pid)
    while running.poll() is None:
        for stage in STAGES:
            if processes(workflow, stage):
                now = time.monotonic()
                seconds[stage] = now - begun.setdefault(stage, now)
        time.sleep(0.2)
    assert running.returncode == 0, "the undisturbed run failed"
    return seconds


def start(project: Path, *targets: str) -> subprocess.Popen[bytes]:
    """Start the workflow; what it says goes to its own log."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(snakemake_command(*targets), cwd=project, **quiet)


def kill_once(project: Path, stage: str, victim: str, delay: float, *targets: str) -> bool:
    """Start the workflow and kill `delay` seconds after `stage` began; False where it did not run, or not so long."""
    running = start(project, *targets)
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
            found[path] = repr(pq.read_table(io.BytesIO(content)).drop_columns("seconds").to_pylist()).encode()
        elif not path.startswith(("logs/", "benchmarks/")):
            found[path] = content
    return found


def difference(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """The files that are not the same, byte for byte, in both."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def say(text: str) -> None:
    """A line at once, also in a file."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Run the rounds, say every kill and every difference; 1 where an artifact differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work [a temporary folder]")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        project = copy_project(Path(folder))
        begun = time.monotonic()
        seconds = undisturbed(project)
        say(f"undisturbed: {time.monotonic() - begun:.0f} s, of them {seconds}")
        before = artifacts(project)
        kills, lost = 0, 0
        for turn in range(arguments.rounds):
            shutil.rmtree(project / RESULTS)
            for stage in STAGES:
                victim, delay = chance.choice(VICTIMS), chance.uniform(0, seconds[stage])
                hit = kill_once(project, stage, victim, delay)
                kills += hit
                say(f"round {turn}: {'killed' if hit else 'missed'} {victim} {delay:.1f} s after {stage} began")
            begun = time.monotonic()
            last = snakemake(project)
            say(f"round {turn}: the last run ended with {last.returncode} after {time.monotonic() - begun:.0f} s")
            differing = difference(before, artifacts(project)) if last.returncode == 0 else [last.stdout[-3000:]]
            lost += bool(differing)
            say(f"round {turn}: {len(before)} files, different: {differing or 'none'}")
    say(f"{kills} kills, {arguments.rounds} rounds, {lost} of them with a difference")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())

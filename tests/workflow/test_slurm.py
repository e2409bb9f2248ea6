"""The workflow on a real SLURM of two nodes: `make test-slurm` (as root, with Debian's slurm-wlm and munge).

The shipped profile is used as it is, but for the partition that a user fills in, and for options that say that this
cluster has no accounting database and that its jobs are short.
"""

import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml
from support.kill_harness import artifacts, difference
from support.slurm_cluster import Cluster, cluster, missing
from support.workflow_project import BENCHMARK, copy_project, set_config

from nspo.settings.reading import load_config
from nspo.workflow.resources import requests

pytest.importorskip("snakemake_executor_plugin_slurm", reason="the dev extra installs the SLURM plugin")
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(missing() is not None, reason=f"no SLURM: {missing()}")]

SITE = ("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2")
SHORT = ("--seconds-between-status-checks", "2", "--latency-wait", "10")
RESULTS = Path("results/smoke")
POLICY, BASE = RESULTS / "policy/nspo/seed0", RESULTS / "evaluation/base/seed0"
JOBS = {
    "prepare_model": 1,
    "prepare_prompts": 1,
    "prepare_labels": 1,
    "collect_activations": 1,
    "compute_bases_part": 3,
    "compute_bases": 1,
    "train_cost": 1,
    "train_reward": 1,
    "train_policy": 2,
    "match_safety": 2,
    "certify": 2,
    "evaluate": 3,
    "benchmark": 3,
    "attribute": 2,
}
NO_GPU = {"prepare_model", "prepare_prompts", "prepare_labels", "compute_bases_part", "compute_bases", "certify"}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster."""
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, slurm: Cluster) -> Path:
    """A copy of the project, its profile and configuration filled in; the stages last long enough to be cancelled."""
    folder = copy_project(tmp_path_factory.mktemp("project"))
    profile = folder / "profiles/slurm/profile.yaml"
    profile.write_text(profile.read_text().replace("<partition>", slurm.partition))
    set_config(
        folder,
        bases={"jobs": 3},
        cost={"positive_above": 0.2},  # then all that this model says counts as unsafe: it trains to its last step
        policy={"steps": 12, "probe_prompts": 8},
        evaluation={"batch_size": 2},
        benchmarks=BENCHMARK,
    )
    return folder


def start(project: Path, log: Path, *arguments: str, config: str = "config/smoke.yaml") -> subprocess.Popen[bytes]:
    """Start the workflow on the cluster, with all it says in `log`."""
    profile = ("--workflow-profile", "profiles/slurm", "--configfile", config)
    command = [sys.executable, "-m", "snakemake", *profile, *SITE, *SHORT, *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=project, stdout=file, stderr=subprocess.STDOUT)


def stop_once(
    slurm: Cluster, running: subprocess.Popen[bytes], rule: str, at_work: Callable[[], bool], *command: str
) -> str:
    """Stop the job of `rule` by `command` and its id, as soon as it is `at_work`; its id."""
    before = set(slurm.jobs())
    while not at_work():
        assert running.poll() is None, "the workflow ended before its job could be cancelled"
        time.sleep(0.05)
    new = {job: facts for job, facts in slurm.jobs().items() if job not in before and of_rule(facts) == rule}
    (job,) = [job for job, facts in new.items() if facts["JobState"] == "RUNNING"]
    subprocess.run([*command, job], check=True)
    return job


def at_work(project: Path) -> bool:
    """Whether a policy has a checkpoint."""
    return any((project / RESULTS).glob(".work/policy-*/*/trainer_state.json"))


def said(project: Path) -> str:
    """The log of the policy's training."""
    return (project / RESULTS / "logs/train_policy/nspo-seed0.log").read_text()


def of_rule(job: dict[str, str]) -> str:
    """The rule of a job."""
    return re.sub(r"_wildcards.*", "", job["Comment"].removeprefix("rule_"))


def test_the_workflow_runs_on_the_cluster(project: Path, slurm: Cluster, tmp_path: Path) -> None:
    """Every stage is a job that was queued, run and accounted, with the GPU, memory and time of its rule."""
    assert start(project, tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()[-6000:]
    assert (project / RESULTS / "report.html").stat().st_size > 10_000
    jobs = slurm.jobs()
    assert JOBS.items() <= Counter(map(of_rule, jobs.values())).items()
    assert {job["JobState"] for job in jobs.values()} == {"COMPLETED"}
    ended = slurm.accounted()
    assert {job: entry["JobState"] for job, entry in ended.items()} == dict.fromkeys(jobs, "COMPLETED")
    assert {of_rule(job) for job in jobs.values() if job.get("TresPerJob") != "gres:gpu:1"} == NO_GPU
    policy = next(job for job in jobs.values() if of_rule(job) == "train_policy")
    assert asked(policy) == planned(project, attempt=1)


def test_small_jobs_share_a_submission(project: Path, slurm: Cluster, tmp_path: Path) -> None:
    """A group of two certificates is one job, and an array of two is one submission of two."""
    certificates = [
        str(path.relative_to(project)) for path in (project / RESULTS / "certificates").glob("*/seed0.json")
    ]
    assert len(certificates) == 2
    before = artifacts(project)
    for options, jobs in (
        (("--groups", "certify=a", "--group-components", "a=2"), 1),
        (("--slurm-array-jobs", "certify"), 2),
    ):
        known = set(slurm.jobs())
        for certificate in certificates:
            (project / certificate).unlink()
        running = start(project, tmp_path / "log", *certificates, *options)
        assert running.wait() == 0, (tmp_path / "log").read_text()[-6000:]
        new = [facts for job, facts in slurm.jobs().items() if job not in known]
        assert len(new) == jobs
        assert jobs == 1 or len({facts["ArrayJobId"] for facts in new}) == 1
        assert difference(before, artifacts(project)) == []


def planned(project: Path, attempt: int) -> tuple[int, int]:
    """Megabytes and minutes that the rule train_policy asks for."""
    asks = requests(load_config(project / "config/smoke.yaml"))("train_policy")
    return asks["mem_mb"](None, attempt), asks["runtime"](None, attempt)


def asked(job: dict[str, str]) -> tuple[int, int]:
    """Megabytes and minutes of a job, as SLURM writes them: 9000M or 8.79G, 1:00:00 or 1-00:00:00."""
    number, unit = float(job["MinMemoryNode"][:-1]), job["MinMemoryNode"][-1]
    days, _, clock = job["TimeLimit"].rpartition("-")
    hours, minutes, _ = map(int, clock.split(":"))
    return round(number * {"M": 1, "G": 1024}[unit]), (int(days or 0) * 24 + hours) * 60 + minutes


def test_a_cancelled_job_is_submitted_again_with_more(project: Path, slurm: Cluster, tmp_path: Path) -> None:
    """After `scancel` in mid-training the same run submits the job again with more memory: same policy. It resumes, so
    it asks for no more time."""
    before = artifacts(project)
    shutil.rmtree(project / POLICY)
    running = start(project, tmp_path / "log", str(POLICY))
    job = stop_once(slurm, running, "train_policy", partial(at_work, project), "scancel")
    assert running.wait() == 0, (tmp_path / "log").read_text()[-6000:]
    assert slurm.accounted()[job]["JobState"] == "CANCELLED"
    again = max(slurm.jobs().values(), key=lambda entry: int(entry["JobId"]))
    assert (asked(again), again["JobState"]) == (planned(project, attempt=2), "COMPLETED")
    assert "resuming nspo (seed 0) from" in said(project)
    assert difference(before, artifacts(project)) == []


def test_a_cancelled_workflow_goes_on(project: Path, slurm: Cluster, tmp_path: Path) -> None:
    """A run whose job was cancelled for good ends with a failure; the next one goes on to the same answers."""
    before = artifacts(project)
    (project / BASE / "metrics.json").unlink()
    target = str(BASE / "metrics.json")
    running = start(project, tmp_path / "log", "--retries", "0", target)
    kept = partial((project / RESULTS).glob, ".work/evaluation-*.jsonl")
    stop_once(slurm, running, "evaluate", lambda: any(path.stat().st_size for path in kept()), "scancel")
    assert running.wait() == 1
    assert not (project / target).exists()
    assert start(project, tmp_path / "log", target).wait() == 0, (tmp_path / "log").read_text()[-6000:]
    assert "continuing after" in (project / RESULTS / "logs/evaluate/base-seed0.log").read_text()
    assert difference(before, artifacts(project)) == []


def test_a_warning_writes_a_checkpoint(project: Path, slurm: Cluster, tmp_path: Path) -> None:
    """SIGUSR1, which `--signal=USR1@300` sends ahead of a limit, ends training after a step, and the next attempt goes
    on to the same policy."""
    before = artifacts(project)
    shutil.rmtree(project / POLICY)
    running = start(project, tmp_path / "log", str(POLICY))
    warned = stop_once(slurm, running, "train_policy", partial(at_work, project), "scancel", "--signal=USR1")
    assert running.wait() == 0, (tmp_path / "log").read_text()[-6000:]
    assert slurm.accounted()[warned]["JobState"] == "FAILED"
    assert "resuming nspo (seed 0) from" in said(project)
    assert difference(before, artifacts(project)) == []


def test_a_requeued_job_goes_on(project: Path, slurm: Cluster, tmp_path: Path) -> None:
    """Pre-empted: SIGTERM, and queued again by SLURM itself. One job to the workflow, which makes the same policy."""
    before, jobs = artifacts(project), len(slurm.jobs())
    shutil.rmtree(project / POLICY)
    running = start(project, tmp_path / "log", "--retries", "0", str(POLICY))
    job = stop_once(slurm, running, "train_policy", partial(at_work, project), "scontrol", "requeue")
    assert running.wait() == 0, (tmp_path / "log").read_text()[-6000:]
    assert slurm.jobs()[job]["Restarts"] == "1"
    assert len(slurm.jobs()) == jobs + 1
    assert "resuming nspo (seed 0) from" in said(project)
    assert difference(before, artifacts(project)) == []


def test_two_nodes_train_one_policy(project: Path, slurm: Cluster, tmp_path: Path) -> None:
    """As docs/cluster.md says: `srun` starts a task on each node, and both train together."""
    shutil.copytree(project / RESULTS, project / "results/two")
    shutil.rmtree(project / "results/two/policy/nspo")
    raw = yaml.safe_load((project / "config/smoke.yaml").read_text())
    raw["policy"] |= {"processes": 2, "micro_batch_size": 2}
    raw["runtime"]["results"] = "results/two"
    (project / "config/two.yaml").write_text(yaml.safe_dump(raw))
    resources = [f"train_policy:{name}" for name in ("nodes=2", "tasks=2", "tasks_per_gpu=0", "mpi=srun")]
    options = ("results/two/policy/nspo/seed0", "--set-resources", *resources)
    running = start(project, tmp_path / "log", *options, config="config/two.yaml")
    assert running.wait() == 0, (tmp_path / "log").read_text()[-6000:]
    job = max(slurm.jobs().values(), key=lambda entry: int(entry["JobId"]))
    assert (of_rule(job), job["NumNodes"], job["NumTasks"], job["JobState"]) == ("train_policy", "2", "2", "COMPLETED")
    log = (project / "results/two/logs/train_policy/nspo-seed0.log").read_text()
    assert log.count("probe step 0") == 1  # told by one voice


def test_scratch_is_the_nodes(project: Path, slurm: Cluster, tmp_path: Path) -> None:
    """`$SLURM_JOB_ID` in the `tmpdir` of a rule is that of its job, and Snakemake makes the folder on the node."""
    raw = yaml.safe_load((project / "config/smoke.yaml").read_text())
    raw["runtime"]["results"] = "results/scratch"
    (project / "config/scratch.yaml").write_text(yaml.safe_dump(raw))
    options = ("results/scratch/labels.parquet", "--set-resources", f"prepare_labels:tmpdir={tmp_path}/$SLURM_JOB_ID")
    running = start(project, tmp_path / "log", *options, config="config/scratch.yaml")
    assert running.wait() == 0, (tmp_path / "log").read_text()[-6000:]
    job = max(map(int, slurm.jobs()))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [str(job)]

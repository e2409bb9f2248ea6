"""The shipped profiles: what every rule asks a cluster for, and that each further attempt asks for more."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from support.workflow_project import BENCHMARK, ROOT, snakemake

from nspo.workflow.resources import RESUMING

pytestmark = pytest.mark.workflow

NOT_PLANNED = {
    "fetch_bases",
    "fetch_hub",
    "all_policies",
    "compute_own_bases",
    "study",
}  # of a hub, a method, variants; no job at all
EVERY_RULE = {
    "bases": {"jobs": 2},
    "policy": {"methods": {name: {"objective": name, "learning_rate": 1e-4} for name in ("nspo", "dpo")}},
    "evaluation": {"judges": {"net": {"kind": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "m"}}},
    "benchmarks": BENCHMARK,
    "screen": {"enabled": True},
}


class Job(NamedTuple):
    """What a rule asks for, and the command that it runs."""

    resources: dict[str, str]
    command: str


def planned(folder: Path, profile: str, attempt: int = 1) -> dict[str, Job]:
    """A job of every rule at this attempt, in a run in which all rules take part."""
    (folder / "config.yaml").write_text(yaml.safe_dump(EVERY_RULE | {"runtime": {"results": str(folder / "results")}}))
    text = (ROOT / "profiles" / profile / "profile.yaml").read_text()
    (folder / "profile.yaml").write_text(text.replace("executor: slurm\n", ""))  # a plugin, which a plan does without
    options = ("--dry-run", "--forceall", "--printshellcmds", "--nolock", "--attempt", str(attempt))
    run = snakemake(ROOT, *options, "--workflow-profile", str(folder), config=str(folder / "config.yaml"))
    assert run.returncode == 0, run.stdout[-3000:]
    jobs = re.findall(r"^rule (\w+):$.*?^    resources: (.*?)$\n^Shell command: (.*?)$", run.stdout, re.M | re.S)
    return {rule: Job(dict(re.findall(r"(\w+)=([^,]+)", asked)), command) for rule, asked, command in jobs}


def test_every_attempt_asks_for_more(tmp_path: Path) -> None:
    """Memory of every rule there is is three times as much at the third attempt; time only where work starts over."""
    first, third = (planned(tmp_path, "slurm", attempt) for attempt in (1, 3))
    texts = "".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    named = set(re.findall(r"^rule (\w+):|^use rule \w+ as (\w+) ", texts, re.M))
    assert first.keys() - {"all"} == {one or other for one, other in named} - NOT_PLANNED
    for rule, job in third.items():
        times = {"mem_mb": 3, "runtime": 1 if rule.removesuffix("_part") in RESUMING else 3}
        for name, factor in times.items():
            assert int(job.resources[name]) == factor * int(first[rule].resources[name]), (rule, name)


def test_a_site_profile_beside_the_default_one_limits_nothing(tmp_path: Path) -> None:
    """`--profile SITE` loads profiles/default too: eight GPUs stay eight, and two jobs start together."""
    (tmp_path / "profile.yaml").write_text("jobs: 4\nset-resources:\n  train_policy:\n    gpu: 8\n")
    config = {"runtime": {"results": str(tmp_path / "results")}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    options = ("--dry-run", "--forceall", "--nolock", "--profile", str(tmp_path))
    run = snakemake(ROOT, *options, config=str(tmp_path / "config.yaml"))
    assert run.returncode == 0, run.stdout[-3000:]
    asked = re.findall(r"^rule train_policy:$.*?^    resources: (.*?)$", run.stdout, re.M | re.S)
    assert len(asked) == 2
    assert all("gpu=8" in line for line in asked)
    assert "Provided resources" not in run.stdout


@pytest.mark.parametrize("profile", ["default", "slurm"])
def test_what_runs_a_model_asks_for_a_gpu(profile: str, tmp_path: Path) -> None:
    """The rules whose command says where tensors live ask for a GPU, and no others do."""
    jobs = planned(tmp_path, profile)
    on_device = {rule for rule, job in jobs.items() if " --device " in job.command}
    assert {rule for rule, job in jobs.items() if job.resources.get("gpu") == "1"} == on_device
    assert {"train_policy", "benchmark", "attribute"} <= on_device

"""The workflow, driven end to end on a tiny model: what runs again after a change, and what does not.

One real run of config/smoke.yaml in a copy of the project; the cases then change a setting or a file of that copy and
ask Snakemake for its plan.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.workflow_project import ROOT, contents, copy_project, snakemake, snakemake_command

from nspo.evaluation.benchmarks.registry import TASKS
from nspo.settings.policy.methods import PRESETS, MethodSettings

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def finished(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished project that these tests may change, while others read the first one."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("changed") / "project", symlinks=True))


# What comes after a policy; and what writes the configuration into the page.
AFTER = {"report", "write_config"}


def changed(project: Path, **sections: Any) -> str:
    """The smoke configuration with these keys of its sections set anew, as a file in `project`."""
    raw = yaml.safe_load((project / "config/smoke.yaml").read_text())
    for section, keys in sections.items():
        raw[section] = {**raw.get(section, {}), **keys}
    path = project / "config/changed.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(path.relative_to(project))


def plan(project: Path, config: str = "config/smoke.yaml") -> set[str]:
    """The jobs that Snakemake would run, such as `certify nspo` (the target `all` left out)."""
    run = snakemake(project, "--dry-run", config=config)
    assert run.returncode == 0, run.stdout[-3000:]
    jobs = set()
    for block in run.stdout.split("\n\n"):
        rule = re.search(r"^(?:local)?rule (\w+):$", block, re.MULTILINE)
        method = re.search(r"^    wildcards: method=(\w+)", block, re.MULTILINE)
        if rule and rule[1] != "all":
            jobs.add(f"{rule[1]} {method[1]}" if method else rule[1])
    assert bool(jobs) != ("Nothing to be done" in run.stdout)
    return jobs


def of(method: str, *rules: str) -> set[str]:
    """Jobs of one method."""
    return {f"{rule} {method}" for rule in rules}


METHODS = ("nspo", "grpo_no_kl")
POLICY = ("train_policy", "match_safety", "evaluate", "certify", "attribute")


def test_all_results_are_there(finished: Path) -> None:
    """The page, the table, and beside each policy its logs; a certificate for the constrained and the other."""
    results = finished / "results/smoke"
    assert (results / "report.html").stat().st_size > 10_000
    assert "nspo" in (results / "summary.csv").read_text()
    for method in METHODS:
        assert (results / f"policy/{method}/seed0/model.safetensors").is_file()
        assert (results / f"certificates/{method}/seed0.json").is_file()
        assert (results / f"attribution/{method}/seed0.json").is_file()
        assert "Certificate" in (results / f"cards/{method}/seed0.md").read_text()
    assert [path.name for path in (finished / "results").iterdir()] == ["smoke"]


def test_second_run_does_nothing(finished: Path) -> None:
    """Without a change, nothing is planned."""
    assert plan(finished) == set()


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"bases": {"threshold": 0.8}},
            {"compute_bases", *of("grpo_no_kl", "certify", "attribute"), *of("nspo", *POLICY), *AFTER},
        ),
        (
            {
                "policy": {
                    "methods": {
                        "nspo": {"objective": "nspo", "learning_rate": 1.0e-3},
                        "grpo_no_kl": {"objective": "grpo_no_kl", "learning_rate": 2.0e-3},
                    }
                }
            },
            {*of("grpo_no_kl", *POLICY), *AFTER},
        ),
        ({"policy": {"clip": 0.3}}, {*of("nspo", *POLICY), *of("grpo_no_kl", *POLICY), *AFTER}),
        (
            {"evaluation": {"general_prompts": 5}},
            {"evaluate base", *(job for m in METHODS for job in of(m, "evaluate", "attribute")), *AFTER},
        ),
        (
            {"attribution": {"general_prompts": 3}},
            {"attribute nspo", "attribute grpo_no_kl", *AFTER},
        ),
        ({"runtime": {"log_every": 7, "device": "cpu"}}, set()),
    ],
    ids=["bases.threshold", "one learning rate", "policy.clip", "evaluation", "attribution", "runtime"],
)
def test_a_setting_reruns_what_depends_on_it(
    finished: Path, sections: dict[str, dict[str, Any]], expected: set[str]
) -> None:
    """A changed key plans exactly the stages that read it and what follows them."""
    raw = yaml.safe_load((finished / "config/smoke.yaml").read_text())
    config = changed(finished, **{name: {**raw.get(name, {}), **keys} for name, keys in sections.items()})
    assert plan(finished, config) == expected


@pytest.mark.parametrize(
    ("lost", "job"),
    [
        ("policy/nspo/seed0/model.safetensors", "train_policy nspo"),
        ("model/model.safetensors", "prepare_model"),
        ("model/tokenizer_config.json", "prepare_model"),
        ("cost/manifest.json", "train_cost"),
        ("reward", "train_reward"),
        ("training/nspo/seed0/probes.parquet", "train_policy nspo"),
    ],
)
def test_what_is_lost_is_made_again(finished: Path, lost: str, job: str) -> None:
    """Weights, a part of a model's folder, the whole folder, a log beside it."""
    path = finished / "results/smoke" / lost
    path.rename(path.with_name("away"))
    try:
        assert job in plan(finished)
    finally:
        path.with_name("away").rename(path)
    assert plan(finished) == set()


def test_a_reason_names_the_setting(finished: Path) -> None:
    """Of a changed key the plan shows its value before and now, and nothing of the others."""
    raw = yaml.safe_load((finished / "config/smoke.yaml").read_text())
    run = snakemake(finished, "--dry-run", config=changed(finished, policy={**raw["policy"], "clip": 0.3}))
    assert "before: '--clip 0.2' now: '--clip 0.3'" in run.stdout


def test_delete_all_output_leaves_no_weights(finished: Path) -> None:
    """Every model is an output, so `--delete-all-output` would remove it."""
    said = snakemake(finished, "--delete-all-output", "--dry-run").stdout
    for folder in ("model", "cost", "reward", "policy/nspo/seed0", "policy/grpo_no_kl/seed0"):
        assert re.search(rf"results/smoke/{folder}$", said, re.MULTILINE), folder


def test_swapped_values_are_noticed(finished: Path) -> None:
    """Two keys that exchange their values rerun the stage (Snakemake compares parameters as a set)."""
    raw = yaml.safe_load((finished / "config/smoke.yaml").read_text())["activations"]
    config = changed(finished, activations={"max_new_tokens": raw["samples"], "samples": raw["max_new_tokens"]})
    assert "collect_activations" in plan(finished, config)


def test_precomputed_bases_skip_collection(finished: Path) -> None:
    """With a bases file of one's own, nothing is collected or computed, and the unconstrained policy stays."""
    shutil.copy(finished / "results/smoke/bases/bases.safetensors", finished / "shared.safetensors")
    jobs = plan(finished, changed(finished, bases={"precomputed": "shared.safetensors"}))
    assert not jobs & {"collect_activations", "compute_bases", "train_policy grpo_no_kl"}
    assert {"train_policy nspo", "certify nspo", "certify grpo_no_kl"} <= jobs


def test_precomputed_bases_from_a_hub_are_fetched_first(finished: Path) -> None:
    """`hub:` bases come by a rule of their own; nothing is collected or computed."""
    jobs = plan(finished, changed(finished, bases={"precomputed": "hub:someone/bases@main"}))
    assert "fetch_bases" in jobs
    assert not jobs & {"collect_activations", "compute_bases", "train_policy grpo_no_kl"}


def test_jobs_share_out_the_sites(finished: Path) -> None:
    """`bases.jobs` makes one job per share and the same file, byte for byte; the shares are removed."""
    before = (finished / "results/smoke/bases/bases.safetensors").read_bytes()
    config = changed(finished, bases={"jobs": 3}, runtime={"results": "results/shares"})
    run = snakemake(finished, "--until", "compute_bases", config=config)
    assert run.returncode == 0, run.stdout[-3000:]
    assert run.stdout.count("rule compute_bases_part:") == 3
    assert [path.name for path in (finished / "results/shares/bases").glob("*.safetensors")] == ["bases.safetensors"]
    assert (finished / "results/shares/bases/bases.safetensors").read_bytes() == before


def test_processes_share_out_the_collection(finished: Path) -> None:
    """`runtime.processes` starts the stage with accelerate and makes the same store, byte for byte."""
    config = changed(finished, runtime={"processes": 2, "results": "results/processes"})
    run = snakemake(finished, "--until", "collect_activations", config=config)
    assert run.returncode == 0, run.stdout[-3000:]
    assert contents(finished / "results/processes/activations") == contents(finished / "results/smoke/activations")
    assert plan(finished, changed(finished, runtime={"processes": 2})) == set()


def test_processes_share_out_the_training(finished: Path) -> None:
    """`policy.processes` starts the stage with accelerate: one saved policy, in the null space, told by one voice.

    Its key reruns the policies, since other processes sample other answers; sizes that do not divide are refused.
    """
    results = finished / "results/several"
    shutil.copytree(finished / "results/smoke", results)
    for part in ("policy/nspo", "matched/nspo", "certificates/nspo"):
        shutil.rmtree(results / part)
    policy = yaml.safe_load((finished / "config/smoke.yaml").read_text())["policy"]
    two = {**policy, "processes": 2, "micro_batch_size": 2}
    target = "results/several/certificates/nspo/seed0.json"
    config = changed(finished, policy=two, runtime={"results": "results/several"})
    run = snakemake(finished, target, config=config)
    assert run.returncode == 0, run.stdout[-6000:]
    certificate = json.loads((finished / target).read_text())
    assert certificate["summary"]["leakage_basis"]["max"] < 1e-6
    log = results / "logs/train_policy/nspo-seed0.log"
    assert "accelerate launch" in run.stdout
    assert log.read_text().count("probe step 0") == 1
    assert {f"train_policy {method}" for method in policy["methods"]} <= plan(finished, changed(finished, policy=two))
    refused = snakemake(finished, config=changed(finished, policy={**policy, "processes": 2}))
    assert "micro_batch_size x processes (4 x 2)" in refused.stdout


def test_artifacts_are_cached_between_workflows(tmp_path: Path) -> None:
    """With `--cache`, a second workflow with the same settings and another results folder takes both artifacts over."""
    (tmp_path / "project").mkdir()
    project, cache = copy_project(tmp_path / "project"), tmp_path / "cache"
    cache.mkdir()
    settings = {"SNAKEMAKE_OUTPUT_CACHE": str(cache)}
    for name in ("first", "second"):
        config = changed(project, runtime={"results": f"results/{name}"})
        run = snakemake(project, "--until", "compute_bases", "--cache", config=config, environment=settings)
        assert run.returncode == 0, run.stdout[-3000:]
    assert len(list(cache.iterdir())) == 2
    for artifact in ("activations/manifest.json", "bases/bases.safetensors"):
        first, second = (project / f"results/{name}" / artifact for name in ("first", "second"))
        assert first.resolve() == second.resolve()
        assert first.resolve().is_relative_to(cache)


def test_an_edit_of_code_reruns_its_stage_and_a_touch_does_not(finished: Path) -> None:
    """What a stage's modules compute counts, not their date or comments, and not the modules of others."""
    module = finished / "nspo/certify/certificate.py"
    before = module.read_text()
    try:
        os.utime(module)
        assert plan(finished) == set()
        module.write_text(before + "\n# a comment\n")
        assert plan(finished) == set()
        module.write_text(before + "\nEDITED = True\n")
        assert plan(finished) == {"report", *(job for m in METHODS for job in of(m, "certify", "attribute"))}
    finally:
        module.write_text(before)
    assert plan(finished) == set()


def test_the_order_of_keys_does_not_count(finished: Path) -> None:
    """Domains written in another order make the same prompts; only the page, which shows them in order, is new."""
    raw = yaml.safe_load((finished / "config/smoke.yaml").read_text())["data"]
    config = changed(finished, data={"general": dict(reversed(raw["general"].items()))})
    assert plan(finished, config) == AFTER


def test_data_files_count(finished: Path) -> None:
    """An edited file of prompts or labels reruns what reads it."""
    labels = finished / "tests/data/harm_labels.jsonl"
    before = labels.read_text()
    try:
        labels.write_text("".join(before.splitlines(keepends=True)[::-1]))
        jobs = plan(finished)
    finally:
        labels.write_text(before)
    assert {"prepare_labels", "train_cost", "train_reward"} <= jobs
    assert not jobs & {"prepare_prompts", "collect_activations", "compute_bases"}


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"bases": {"treshold": 0.8}}, "bases.treshold: unknown key, did you mean 'threshold'?"),
        ({"policy": {"group_size": 3}}, "policy: minibatch_size (4) must be divisible by group_size (3)"),
        ({"model": {"source": "no/such/model"}}, "model.source: no/such/model does not exist"),
        ({"bases": {"precomputed": "typo.safetensors"}}, "bases.precomputed: typo.safetensors does not exist"),
        (
            {"bases": {"precomputed": "s3://a/b.safetensors"}},
            "bases.precomputed: s3://a/b.safetensors: No storage provider",
        ),
    ],
)
def test_mistakes_end_before_any_work(finished: Path, sections: dict[str, dict[str, Any]], line: str) -> None:
    """A misspelt key, sizes that do not divide or a missing file end the run at once, in a line that names the key."""
    run = snakemake(finished, "--dry-run", config=changed(finished, **sections))
    said = [text for text in run.stdout.splitlines() if line in text]
    assert run.returncode == 1
    assert len(said) == 1
    assert "Traceback" not in run.stdout


def test_keys_on_the_command_line_are_those_of_a_file(finished: Path) -> None:
    """`--config` is typed as YAML, numbers too: the value in force reruns nothing, a new seed only what it adds."""
    same = snakemake(finished, "--dry-run", "--config", "policy={seeds: [0], steps: 2, judge: null}")
    assert "Nothing to be done" in same.stdout, same.stdout[-2000:]
    more = snakemake(finished, "--dry-run", "--config", "policy={seeds: [0, 1]}")
    assert set(re.findall(r"policy/\w+/seed(\d)", more.stdout)) >= {"1"}
    planned = set(re.findall(r"^(?:local)?rule (\w+):", more.stdout, re.MULTILINE))
    assert {"train_policy", "evaluate", "report"} <= planned
    assert planned & {"collect_activations", "compute_bases", "train_cost"} == set()
    assert "evaluation/base/" not in "".join(re.findall(r"^    output: .*", more.stdout, re.MULTILINE))
    wrong = snakemake(finished, "--dry-run", "--config", "policy={stepz: 2}")
    assert "config/smoke.yaml + --config: policy.stepz: unknown key, did you mean 'steps'?" in wrong.stdout
    assert wrong.returncode == 1


def test_default_configuration_plans() -> None:
    """A bare run reads config/config.yaml and plans every stage; pairs of answers only for methods that need them."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--dry-run", "--forceall", "--nolock"]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "rule train_policy" in run.stdout
    assert "make_pairs" not in run.stdout


def test_bases_and_certificates_follow_the_objective(tmp_path: Path) -> None:
    """A method trains with bases, pairs and a guide, and is certified as constrained, where its settings say so."""
    methods = {name: MethodSettings(objective=name, learning_rate=1e-4) for name in PRESETS}
    raw = yaml.safe_load((ROOT / "config/smoke.yaml").read_text())
    raw["policy"]["methods"] = {name: method.dump() for name, method in methods.items()}
    raw["runtime"]["results"] = str(tmp_path / "results")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    run = snakemake(ROOT, "--dry-run", "--printshellcmds", "--nolock", config=str(tmp_path / "config.yaml"))
    assert run.returncode == 0, run.stdout[-3000:]
    for name, method in methods.items():
        train = re.findall(rf"nspo train-policy .*--name {name} .*", run.stdout)
        verify = re.findall(rf'nspo verify .*"method": "{name}".*', run.stdout)
        assert [" --bases " in command for command in train] == [method.constraint.needs_bases]
        assert [" --pairs " in command for command in train] == [method.loss.on_pairs]
        guided = [bool(re.search(r" --guide-policy \S+/policy/dpo/seed0 ", command)) for command in train]
        assert guided == [method.loss.kind == "wdoor"]
        assert [f'"constrained": {str(method.constraint.exact).lower()}' in command for command in verify] == [True]
    assert len(re.findall(r"nspo make-pairs .*--seed 0 ", run.stdout)) == 1


def test_policies_are_compared_with_the_base(tmp_path: Path) -> None:
    """With `against: base` AlpacaEval waits for the base's answers; no other benchmark sees the comparison."""
    data = tmp_path / "data"
    for task, row in (("advbench", {"goal": "x"}), ("alpaca_eval", {"instruction": "x"})):
        file = tmp_path / "data" / TASKS[task].file
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps([row]) if file.suffix == ".json" else "goal\nx\n")
    raw = yaml.safe_load((ROOT / "config/smoke.yaml").read_text())
    comparison = {"url": "http://localhost:1/v1", "model": "m", "against": "base"}
    raw["benchmarks"] = {"tasks": ["advbench", "alpaca_eval"], "data": str(data), "comparison": comparison}
    raw["runtime"]["results"] = str(tmp_path / "results")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    run = snakemake(ROOT, "--dry-run", "--printshellcmds", "--nolock", config=str(tmp_path / "config.yaml"))
    assert run.returncode == 0, run.stdout[-3000:]
    commands = re.findall(r"nspo benchmark .*", run.stdout)
    assert len(commands) == 2 * (1 + len(raw["policy"]["methods"]) * len(raw["policy"].get("seeds", [0])))
    for command in commands:
        compared, base = "--tasks '[\"alpaca_eval\"]'" in command, "--name base " in command
        assert ('"against": "base"' in command) == compared
        waits = "/benchmarks/base/seed0/alpaca_eval/responses.parquet" in command
        assert (" --base-answers " in command, waits) == (compared and not base,) * 2


def test_snakemake_report(finished: Path) -> None:
    """`snakemake --report` collects the page, the scores and the plots."""
    run = snakemake(finished, "--report", "report.zip")
    assert run.returncode == 0, run.stdout[-3000:]
    assert (finished / "report.zip").stat().st_size > 100_000


def stages_of(process: psutil.Process, name: str) -> Iterator[psutil.Process]:
    """Running stages with this name below `process`."""
    for child in process.children(recursive=True):
        try:
            command = child.cmdline()
        except psutil.NoSuchProcess:
            continue
        if command[1:4] == ["-m", "nspo", name]:
            yield child


def test_a_killed_stage_resumes(finished: Path) -> None:
    """A stage that is killed outright goes on from what it had done when the same command runs again.

    Last in this file: the evaluation of the base model is another one afterwards.
    """
    config = changed(finished, evaluation={"batch_size": 1, "max_new_tokens": 48})
    target = "results/smoke/evaluation/base/seed0/metrics.json"
    command = snakemake_command(target, config=config)
    running = subprocess.Popen(command, cwd=finished, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = finished / "results/smoke/.work"
    deadline = time.monotonic() + 300
    while sum(path.read_text().count("\n") for path in work.glob("evaluation-*.jsonl")) < 3:
        assert running.poll() is None, "the stage ended before it could be killed"
        assert time.monotonic() < deadline, "the stage did not start"
        time.sleep(0.02)
    for stage in stages_of(psutil.Process(running.pid), "evaluate"):
        stage.send_signal(signal.SIGKILL)
    assert running.wait(timeout=60) == 1
    assert not (finished / target).exists()

    again = snakemake(finished, target, config=config)
    assert again.returncode == 0, again.stdout[-4000:]
    assert re.search(r"answers of base: continuing after \d+ of \d+ prompts", again.stdout)
    assert (finished / target).is_file()
    assert not list(work.glob("evaluation-*.jsonl"))

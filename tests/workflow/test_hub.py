"""Repositories of the hub are fetched on the submitting host, by local jobs; whatever else runs asks no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.workflow_project import copy_project, snakemake

from nspo.files.sources import Source, repository_name, repository_of
from nspo.run.workflow_lock import PARENT, this_process

pytestmark = pytest.mark.workflow


def test_every_kind_of_repository_is_fetched_first(tmp_path: Path) -> None:
    """A model, its revision a path; data; a backbone; a benchmark: one local job each, before the job that reads it."""
    project = copy_project(tmp_path)
    config = {
        "model": {"source": "hub:org/model@refs/pr/1"},
        "data": {"general": {"maths": {"source": "hub:org/data@v1"}}},
        "cost": {"backbone": "hub:org/model-2"},
        "benchmarks": {"tasks": ["mbpp"]},
    }
    (project / "hub.yaml").write_text(yaml.safe_dump(config))
    plan = snakemake(project, "--dry-run", "--printshellcmds", config="hub.yaml").stdout
    fetched = [line for line in plan.splitlines() if "nspo fetch-hub" in line]
    assert len(fetched) == 4, plan[-3000:]
    for words in (
        "--source hub:org/model@refs/pr/1 --of model",
        "--source hub:org/data@v1 --of data",
        "--source hub:org/model-2 --of model",
        "--source hub:google-research-datasets/mbpp@4bb6404fdc6cacfda99d4ac4205087b89d32030c --of mbpp",
    ):
        assert sum(words in line for line in fetched) == 1, fetched
    assert plan.count("localrule fetch_hub") + plan.count("rule fetch_hub") >= 4


def test_a_repository_has_a_file_name() -> None:
    assert repository_name(Source.parse("hub:org/it@refs/pr/1")) == "org--it@refs%2Fpr%2F1"
    assert repository_name(Source.parse("hub:org/it")) == "org--it"
    assert repository_of("org--it--too@refs%2Fpr%2F1") == "hub:org/it--too@refs/pr/1"


@pytest.mark.parametrize(("stage", "offline"), [("prepare-prompts", "1"), ("fetch-hub", None)])
def test_jobs_ask_no_network_but_those_that_fetch(stage: str, offline: str | None, tmp_path: Path) -> None:
    """Where the workflow started it, a stage finds in the hub's cache what it needs, or fails at once."""
    code = (
        "import json, os, sys\n"
        "from nspo.cli import main\n"
        "main.import_module = lambda name: sys.exit(print(json.dumps(os.environ.get('HF_HUB_OFFLINE'))) or 0)\n"
        f"main.main({arguments(stage, tmp_path)!r})\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | {
        PARENT: this_process()
    }
    ran = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=False)
    assert json.loads(ran.stdout) == offline, ran.stderr


def arguments(stage: str, folder: Path) -> list[str]:
    """A command line of the stage that is whole."""
    given = {
        "prepare-prompts": ["--wheels-dir", str(folder)],
        "fetch-hub": ["--source", "hub:org/it", "--of", "model"],
    }
    return [stage, *given[stage], "--out", str(folder / "out")]

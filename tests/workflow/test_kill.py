"""Killed at random moments, the workflow goes on to the artifacts of an undisturbed run.

Three kills in a few stages; `PYTHONPATH=tests python -m support.kill_harness` does many in all of them.
"""

import random
import shutil
from pathlib import Path

import pytest
from support.kill_harness import RESULTS, artifacts, difference, kill_once
from support.workflow_project import snakemake

pytestmark = pytest.mark.workflow

KILLS = (("train-policy", "stage"), ("train-policy", "workflow"), ("verify", "all"))


def test_killed_runs_end_in_the_same_artifacts(finished: Path, tmp_path: Path) -> None:
    """After kills of a stage, of Snakemake and of everything: every byte as before, and no `snakemake --unlock`."""
    target = "results/smoke/certificates/nspo/seed0.json"
    before = artifacts(finished)
    project = Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))
    for made in ("policy/nspo", "matched/nspo"):
        shutil.rmtree(project / RESULTS / made)
    (project / target).unlink()
    chance = random.Random(0)
    hits = [kill_once(project, stage, victim, chance.uniform(1, 4), target) for stage, victim in KILLS]
    assert any(hits)
    last = snakemake(project, target)
    assert last.returncode == 0, last.stdout[-4000:]
    assert difference(before, artifacts(project)) == []

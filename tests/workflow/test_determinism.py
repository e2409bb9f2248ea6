"""The same configuration gives the same bytes again, on one thread and on two (docs/determinism.md)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.kill_harness import artifacts, commands, difference

pytestmark = pytest.mark.workflow

STAGES = ("collect", "bases", "train-policy")


def test_another_number_of_threads_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    """Collection, bases and the constrained policy, made anew on two threads, are what one thread made."""
    before = artifacts(finished)
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    again = [words for words in commands(project) if words[0] in STAGES and "grpo_no_kl" not in words]
    assert [words[0] for words in again] == list(STAGES)
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(project)}
    for words in again:
        subprocess.run([sys.executable, "-m", "nspo", *words], cwd=project, env=environment, check=True)
    assert difference(before, artifacts(project)) == []

"""Results that were copied without `.snakemake`: said before anything is removed, and kept by `--touch --forceall`."""

import shutil
from pathlib import Path

import pytest
from support.workflow_project import contents, copy_project, snakemake

pytestmark = pytest.mark.workflow
WARNING = "results/smoke was made elsewhere"


def test_copied_results_are_warned_of_and_kept_by_touch(finished: Path, tmp_path: Path) -> None:
    """Where they were made there is no warning; in a copy there is, until all is taken as it is."""
    assert WARNING not in snakemake(finished, "--dry-run").stdout
    (tmp_path / "project").mkdir()
    project = copy_project(tmp_path / "project")
    shutil.copytree(finished / "results", project / "results")
    before = contents(project / "results")
    plan = snakemake(project, "--dry-run")
    assert plan.returncode == 0
    assert WARNING in plan.stdout
    assert "--touch --forceall" in plan.stdout
    touched = snakemake(project, "--touch", "--forceall")
    assert touched.returncode == 0, touched.stdout[-2000:]
    assert WARNING not in touched.stdout
    again = snakemake(project, "--dry-run")
    assert "Nothing to be done" in again.stdout, again.stdout[-2000:]
    assert WARNING not in again.stdout
    after = contents(project / "results")
    assert {name: after[name] for name in before if not name.startswith("smoke/logs/")} == {
        name: content for name, content in before.items() if not name.startswith("smoke/logs/")
    }

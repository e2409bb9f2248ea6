"""Shared fixtures, each made once per session from a tiny random model; nothing is ever downloaded."""

import os
from pathlib import Path

import pytest
from filelock import FileLock
from support.workflow_project import copy_project, snakemake

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model `tiny:llama` (see nspo/models/tiny.py), as `prepare_model` writes it."""
    from nspo.models.stage import prepare_model
    from nspo.settings.model import ModelSettings

    folder = tmp_path_factory.mktemp("tiny") / "model"
    prepare_model(ModelSettings(source="tiny:llama"), Path("unused"), folder)
    return folder


@pytest.fixture(scope="session")
def inputs(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the policy stage reads, made once; no test changes a file of it."""
    from support.policy_runs import make_inputs

    return make_inputs(tiny_model_dir, tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which the smoke configuration has run to its end; workers of pytest-xdist share it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    project, done = root / "finished", root / "finished.done"
    with FileLock(root / "finished.lock"):
        if not done.exists():
            project.mkdir()
            run = snakemake(copy_project(project))
            assert run.returncode == 0, run.stdout[-6000:]
            done.touch()
    return project

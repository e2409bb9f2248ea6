"""Finished runs that tests read and never change, each trained once."""

from pathlib import Path

import pytest
from support.policy_runs import run


@pytest.fixture(scope="session")
def nspo_run(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy under the constraint."""
    return run(inputs, tmp_path_factory.mktemp("nspo"), "nspo")


@pytest.fixture(scope="session")
def free_run(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its twin without the constraint."""
    return run(inputs, tmp_path_factory.mktemp("grpo_no_kl"), "grpo_no_kl")

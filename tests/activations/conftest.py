"""Stores that tests read and never change, collected once."""

from pathlib import Path

import pytest
from support.activation_runs import run
from support.rows import prompt_file

from nspo.activations.store import ActivationStore


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    return prompt_file(tmp_path_factory.mktemp("prompts") / "prompts.parquet")


@pytest.fixture(scope="session")
def raw(tmp_path_factory, tiny_model_dir, prompts) -> ActivationStore:
    return run(tmp_path_factory.mktemp("raw") / "activations", tiny_model_dir, prompts)


@pytest.fixture(scope="session")
def moments(tmp_path_factory, tiny_model_dir, prompts) -> ActivationStore:
    return run(tmp_path_factory.mktemp("moments") / "activations", tiny_model_dir, prompts, storage="moments")

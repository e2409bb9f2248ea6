"""The public face of the package: every name loads, says how it is used, and the example that it shows runs."""

import doctest
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.policy_runs import write_bases

import nspo
from nspo.models.loading import load_model

SHOWN_ELSEWHERE = {"Constraint", "push_to_hub"}  # made by `constrain`; needs the hub


@pytest.fixture
def scene(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the examples take as given: a model, its bases, token ids, and folders beside the working directory."""
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    shutil.copytree(tiny_model_dir, tmp_path / "tuned")
    file = write_bases(tiny_model_dir, tmp_path / "bases.safetensors")
    monkeypatch.chdir(tmp_path)
    public = {name: getattr(nspo, name) for name in nspo.__all__}
    model, ids = load_model(tiny_model_dir), torch.tensor([[1, 2, 3, 4]])
    return {**public, "torch": torch, "model": model, "bases": nspo.NullSpaceBases.load(file), "ids": ids}


@pytest.mark.parametrize("name", sorted(set(nspo.__all__) - SHOWN_ELSEWHERE))
def test_its_example_runs(name: str, scene: dict[str, Any]) -> None:
    """As it stands in the docstring, whose results are checked."""
    examples = doctest.DocTestParser().get_doctest(getattr(nspo, name).__doc__, scene, name, None, None)
    if name == "NullSpaceCallback":  # a Trainer trains in tests/constraint/test_reference.py
        examples.examples = examples.examples[:1]
    assert examples.examples
    report: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(examples, out=report.append)
    assert results.failed == 0, "".join(report)


def test_every_public_name_says_what_it_is() -> None:
    """A docstring, and for functions what they raise."""
    for name in nspo.__all__:
        text = getattr(nspo, name).__doc__
        assert (text or "")[:1].isupper(), name


def test_importing_the_package_loads_no_torch() -> None:
    """So that configuration errors and `nspo --help` are told at once."""
    code = "import sys, nspo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

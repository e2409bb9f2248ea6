"""Too little disk or memory, for real: a stage says so in a line, leaves no half file, and goes on when there is more.

The disk is a small tmpfs (`tests/support/full_disk.py`, which also tries every stage), the memory a limit of the
process.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.policy_runs import command
from support.workflow_project import ROOT
from transformers import LlamaForCausalLM

from nspo.models.tiny import tiny_model, tiny_tokenizer

# The process has imported all there is when its limit begins: so many MB more.
LIMITED = """
import importlib, resource, sys
from pathlib import Path
from nspo.cli import main as cli
from nspo.cli.stages import STAGES
importlib.import_module(STAGES[sys.argv[2]].function.partition(":")[0])
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = taken + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 MB."""
    if shutil.which("mount") is None:
        pytest.skip("no small disk: mount is not installed")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.workflow
def test_a_full_disk_is_told_and_loses_nothing(finished: Path, small_disk: Path) -> None:
    """With no byte and with half of what they need stages end in a line; with room all artifacts are as before."""
    project = shutil.copytree(finished, small_disk / "project", ignore=shutil.ignore_patterns(".snakemake"))
    stages = ("prepare-model", "bases", "train-policy", "evaluate")
    harness = [sys.executable, "-m", "support.full_disk", str(project), *stages]
    tried = subprocess.run(harness, cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True, check=False)
    assert tried.returncode == 0, tried.stdout
    assert "train-policy, room for 0 of" in tried.stdout


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 34 million weights, 135 MB."""
    config = tiny_model().config
    config.hidden_size, config.intermediate_size, config.head_dim = 1024, 4096, 256
    folder = tmp_path_factory.mktemp("large") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_too_little_memory_is_told_and_loses_nothing(
    large_model: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    """A model that does not fit: one line that says what to change, and no policy."""
    words = command(inputs | {"model": large_model}, tmp_path, "grpo_no_kl", autocast="no", steps=1, max_new_tokens=2)
    limited = [sys.executable, "-c", LIMITED, "64", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}  # threads reserve address space
    run = subprocess.run(limited, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 2, run.stderr[-3000:]
    (error,) = [line for line in run.stderr.splitlines() if line.startswith("nspo: error: ")]
    assert error.startswith("nspo: error: not enough memory (")
    assert "lower batch_size, micro_batch_size or max_new_tokens" in error
    assert {path.name for path in tmp_path.iterdir()} <= {"work"}

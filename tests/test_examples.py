"""examples/: each script runs as it stands, moves the weights, and what it saved passes the certificate."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_basis
from nspo.certify.certificate import verify
from nspo.models.loading import load_model, model_identity
from nspo.models.structure.linears import layer_norms
from nspo.models.structure.sites import find_sites

EXAMPLES = Path(__file__).parent.parent / "examples"
IN_VERL = "nspo_in_verl.py"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != IN_VERL)


@pytest.fixture(scope="module")
def bases_file(tiny_model_dir, tmp_path_factory) -> Path:
    """Bases of random inputs that protect 5 of 8 directions at every site."""
    model, generator = load_model(tiny_model_dir), torch.Generator().manual_seed(0)
    made = []
    for site in find_sites(model):
        inputs = torch.randn(site.width, 2 * site.width, generator=generator, dtype=torch.float64)
        made.append(compute_basis(site.name, site.layers, inputs @ inputs.T, 10_000, "fraction", 0.625))
    path = tmp_path_factory.mktemp("bases") / "bases.safetensors"
    norms = layer_norms(model, [layer for site in made for layer in site.layers])
    NullSpaceBases(made, norms, model=model_identity(tiny_model_dir)).save(path)
    return path


@pytest.mark.parametrize("script", SCRIPTS)
def test_example_trains_in_the_null_space(script, tiny_model_dir, bases_file, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"I cannot help with request {i}.\n" for i in range(20)))
    command = [sys.executable, EXAMPLES / script, tiny_model_dir, bases_file, texts, tmp_path / "out"]
    run = subprocess.run(
        [str(part) for part in command], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    printed = re.search(r"^worst leakage (\S+)$", run.stdout, re.MULTILINE)
    assert printed is not None, run.stdout
    assert float(printed[1]) <= 1e-6

    certificate = verify(tiny_model_dir, tmp_path / "out", NullSpaceBases.load(bases_file))
    layers = certificate["layers"].values()
    assert max(layer["leakage_basis"] for layer in layers) <= 1e-5
    assert min(layer["relative_update"] for layer in layers) > 1e-4
    assert not certificate["unconstrained"]


def test_verl_trains_in_the_null_space(tiny_model_dir, bases_file):
    """Its own FSDP2 engine and optimizer, on one CPU process, with the module that examples/ has for it."""
    pytest.importorskip("verl", reason="verl is not installed")
    paths = os.pathsep.join(map(str, (EXAMPLES, Path(__file__).parent, os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "support.verl_on_cpu", str(tiny_model_dir), str(bases_file)]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    printed = dict(re.findall(r"^(moved|worst leakage) (\S+)$", run.stdout, re.MULTILINE))
    assert int(printed["moved"]) > 0
    assert float(printed["worst leakage"]) <= 1e-6


def test_notebook_runs_from_top_to_bottom(tiny_model_dir, tmp_path, monkeypatch):
    """Every cell, on a tiny model; the constrained run leaks rounding only, and the figures are drawn."""
    notebook = nbformat.read(EXAMPLES / "null_space.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "what a run printed is not kept"
    monkeypatch.setenv("NSPO_MODEL", str(tiny_model_dir))
    monkeypatch.setenv("NSPO_STEPS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert float(re.search(r"leakage of any layer: (\S+)", printed)[1]) < 1e-6
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3

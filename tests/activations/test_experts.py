"""Activations and bases of a mixture of experts: what each expert's tokens are, in passes, and who saw too few."""

from pathlib import Path

import pyarrow.dataset as ds
import pytest
import torch
from support.mixtures import ASKED, EXPERTS, mixture
from support.rows import prompt_file

from nspo.activations import stage as activations
from nspo.activations.stage import choose_storage, collect, stored_bytes
from nspo.activations.store import ActivationStore
from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_bases
from nspo.models.structure.sites import Site
from nspo.models.tiny import tiny_tokenizer
from nspo.settings.bases import ActivationSettings, BasesSettings
from nspo.settings.runtime import RuntimeSettings

DOWN = "model.layers.1.mlp.experts.down_proj"
FED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Qwen3-MoE whose routers never choose expert 3 of the second block."""
    folder = tmp_path_factory.mktemp("mixture") / "model"
    network = mixture("Qwen3Moe", num_experts_per_tok=1)
    with torch.no_grad():
        network.model.layers[1].mlp.gate.weight[3] = 0.0
        network.model.layers[1].mlp.gate.weight[2] = -network.model.layers[1].mlp.gate.weight[1]
    network.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return prompt_file(tmp_path_factory.mktemp("prompts") / "prompts.parquet")


def run(folder: Path, model: Path, prompts: Path, **changed) -> ActivationStore:
    settings = {"samples": 8, "harmful_samples": 4, "benign_samples": 0, "max_new_tokens": 4, "storage": "raw"}
    runtime = RuntimeSettings(device="cpu", workdir=str(folder.parent / "work"))
    collect(ActivationSettings(**{**settings, **changed}), model, prompts, folder, runtime)
    return ActivationStore(folder)


@pytest.fixture(scope="module")
def raw(tmp_path_factory, model, prompts) -> ActivationStore:
    return run(tmp_path_factory.mktemp("raw") / "activations", model, prompts)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_token_reaches_the_experts_it_asks_and_no_other(raw):
    """Over the experts of a block, kept tokens add up to all times the experts asked; nobody's rows are another's."""
    for split in ("basis", "validation"):
        everything = raw.gram(FED, split)[1]
        assert sum(raw.gram(f"{DOWN}.{number}", split)[1] for number in range(EXPERTS)) == everything
    gram, tokens = raw.gram(f"{DOWN}.3", "basis")
    assert (tokens, float(gram.abs().max())) == (0, 0.0)
    fed = ds.dataset(raw.path / "raw" / f"site={FED}").to_table(columns=["domain", "split", "sample", "position"])
    down = ds.dataset(raw.path / "raw" / f"site={DOWN}.0").to_table(columns=["domain", "split", "sample", "position"])
    rows = {tuple(row.values()) for row in down.to_pylist()}
    assert len(rows) == down.num_rows > 0
    assert rows < {tuple(row.values()) for row in fed.to_pylist()}


def test_moments_of_experts_equal_those_of_their_rows(raw, model, prompts, tmp_path):
    """Both storages give the same mean over the expert's own tokens, weighted by domain or not."""
    moments = run(tmp_path / "activations", model, prompts, storage="moments")
    for site in (f"{DOWN}.{number}" for number in range(EXPERTS)):
        for weights in (None, {"maths": 3.0, "chat": 1.0}):
            domains = None if weights is None else list(weights)
            (first, tokens), (second, counted) = (s.gram(site, "basis", domains, weights) for s in (raw, moments))
            assert tokens == counted
            torch.testing.assert_close(first, second, atol=1e-6 * float(first.trace()), rtol=1e-5)


def test_passes_over_few_sites_at_a_time_give_the_same_bytes(raw, model, prompts, tmp_path, monkeypatch):
    """Experts that do not fit one pass, for their files or their moments, take another: nothing else changes."""
    monkeypatch.setattr(activations, "OPEN_FILES", 3)
    again = run(tmp_path / "activations", model, prompts)
    assert contents(again.path) == contents(raw.path)


def test_experts_count_for_the_tokens_that_reach_them_when_the_storage_is_chosen():
    """Rows of all experts together are as many as tokens times experts asked, not times experts."""
    sites = [Site(f"experts.down_proj.{n}", (f"experts.down_proj.{n}",), 8, ASKED / EXPERTS) for n in range(EXPERTS)]
    settings = ActivationSettings(max_new_tokens=0, disk_budget_gb=1e-9)
    chunk = activations.Chunk(0, "maths", "basis", 0, ((1,) * 1000,), None, 0, "")
    storage = {site.name: "raw" for site in sites}
    assert stored_bytes(settings, sites, [chunk], storage) == 4 * 1000 * ASKED * 8
    assert set(choose_storage(settings, sites, [chunk]).values()) == {"moments"}


def test_an_expert_that_saw_too_few_tokens_is_frozen_and_named(raw, tmp_path, capsys):
    """Under four tokens per direction all of it is protected, whatever the rule; others have a basis of their own."""
    runtime = RuntimeSettings(device="cpu", workdir=str(tmp_path / "work"))
    compute_bases(BasesSettings(rule="energy", threshold=0.9), raw.path, tmp_path / "bases.safetensors", runtime)
    bases = NullSpaceBases.load(tmp_path / "bases.safetensors")
    idle = [site for site in bases.values() if site.rule == "frozen"]
    assert [site.null_dim for site in idle] == [0] * len(idle)
    assert bases[f"{DOWN}.3"] in idle
    assert all(site.tokens < 4 * site.width and ".down_proj." in site.site for site in idle)
    free = [site for site in bases.values() if site not in idle]
    assert any(".down_proj." in site.site for site in free)
    assert all(site.tokens >= 4 * site.width and site.null_dim for site in free)
    said = capsys.readouterr().err
    assert f"{len(idle)} of {2 * EXPERTS} experts saw fewer than 4 tokens per direction and stay frozen" in said
    assert f"{DOWN}.3 with 0 tokens" in said

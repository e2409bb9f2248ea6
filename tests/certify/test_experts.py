"""The certificate of a mixture of experts: every expert on the saved weights, and how much of the blocks is covered."""

from pathlib import Path

import pytest
import torch
from support.mixtures import EXPERTS, MIXTURES, mixture, mixture_bases

from nspo import NullSpaceBases, constrain
from nspo.certify.attribution import changed_tensors
from nspo.certify.certificate import verify
from nspo.models.loading import load_model, model_identity
from nspo.models.tiny import tiny_tokenizer

DOWN = "model.layers.1.mlp.experts.down_proj"


def prepared(family, folder, frozen=""):
    """The folder of a base model, and its bases."""
    model = mixture(family)
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    bases = mixture_bases(model, frozen)
    identity = model_identity(folder / "base")
    return NullSpaceBases(bases.values(), bases.manifest["layer_norms"], model=identity)


def trained(folder, bases, change=lambda model: None):
    """The base after three constrained steps and a `change`, saved."""
    model = load_model(folder / "base").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    constrain(model, optimizer, bases, anchor=folder / "base")
    for seed in range(3):
        ids = torch.randint(3, 259, (4, 8), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder / "tuned")
    tiny_tokenizer().save_pretrained(folder / "tuned")


@pytest.mark.parametrize("family", MIXTURES)
def test_saved_experts_leak_nothing_whatever_they_are_called_on_disk(family, tmp_path):
    """Of every family: each expert has its row, the worst leaks rounding alone, all that moved is constrained."""
    bases = prepared(family, tmp_path)
    trained(tmp_path, bases)
    found = verify(tmp_path / "base", tmp_path / "tuned", bases)
    assert set(found["layers"]) == set(bases.layers)
    assert found["summary"]["leakage_basis"]["max"] <= 1e-6
    assert found["unconstrained"] == {}
    assert all(row["update_norm"] > 0 for row in found["layers"].values())
    coverage = found["coverage"]
    assert coverage["constrained"] > 0.9
    assert coverage["unprotected"] == 0
    assert coverage["constrained"] + coverage["frozen"] == pytest.approx(1)


def test_what_is_frozen_and_what_trains_freely_is_told_apart(tmp_path):
    """A frozen expert counts as frozen, a router that moved as unprotected; a leak is found in its expert."""
    bases = prepared("Qwen3Moe", tmp_path, frozen=f"{DOWN}.2")
    protected = bases[f"{DOWN}.1"].basis[:, 0]

    def change(model):
        experts = model.model.layers[1].mlp.experts
        model.model.layers[0].mlp.gate.weight += 0.1
        experts.down_proj[1, 0] += 0.1 * protected

    trained(tmp_path, bases, change)
    found = verify(tmp_path / "base", tmp_path / "tuned", bases)
    assert found["layers"][f"{DOWN}.2"]["update_norm"] == 0
    assert found["summary"]["leakage_basis"]["worst_layer"] == f"{DOWN}.1"
    assert found["summary"]["leakage_basis"]["max"] > 1e-2
    assert list(found["unconstrained"]) == ["model.layers.0.mlp.gate.weight"]
    blocks = {name: p.numel() for name, p in mixture("Qwen3Moe").named_parameters() if ".layers." in name}
    total, coverage = sum(blocks.values()), found["coverage"]
    assert coverage["weights"] == total
    assert coverage["unprotected"] == pytest.approx(blocks["model.layers.0.mlp.gate.weight"] / total)
    rest = sum(count for name, count in blocks.items() if name.endswith(("norm.weight", "gate.weight")))
    assert coverage["frozen"] == pytest.approx((rest + blocks[DOWN] / EXPERTS) / total - coverage["unprotected"])


def test_the_attribution_takes_the_experts_of_a_parameter_together(tmp_path):
    """Their tensor is what is set back: its update is the root of the sum of theirs."""
    bases = prepared("Qwen3Moe", tmp_path)
    trained(tmp_path, bases)
    certificate = verify(tmp_path / "base", tmp_path / "tuned", bases)
    changed = changed_tensors(certificate)
    base, tuned = (load_model(tmp_path / name).state_dict() for name in ("base", "tuned"))
    assert set(changed) == {name for name in base if not torch.equal(base[name], tuned[name])}
    norm = float((tuned[DOWN].double() - base[DOWN].double()).norm())
    assert changed[DOWN]["update_norm"] == pytest.approx(norm, rel=1e-5)
    assert (changed[DOWN]["block"], changed[DOWN]["part"]) == (1, "MLP")


NAMED = [
    "qwen3_moe",
    "qwen3_5_moe",
    "gpt_oss",
    "mixtral",
    "olmoe",
    "glm4_moe",
    "deepseek_v3",
    "minimax",
    "granitemoe",
    "lfm2_moe",
    "nemotron_h",
]


@pytest.mark.parametrize("kind", NAMED)
def test_the_table_of_the_docs_has_the_families_that_people_align(kind):
    """Each works, with most of its blocks constrained and rounding alone leaked."""
    page = Path(__file__).parents[2].joinpath("docs/models.md").read_text()
    cells = next(line for line in page.splitlines() if line.startswith(f"| {kind} |")).split("|")
    constrained, _, leakage = (cell.strip() for cell in cells[3:6])
    assert float(constrained.rstrip("%")) > 90
    assert float(leakage) < 1e-6

"""Families whose checkpoints are not like their models: from a published folder to its policy's certificate."""

from pathlib import Path

import pytest
import torch
from transformers import GitConfig, GitForCausalLM

from nspo import constrain
from nspo.bases.file import NullSpaceBases
from nspo.certify.certificate import verify
from nspo.models.loading import load_model, model_identity
from nspo.models.structure.sites import find_sites
from tests.support.constrained import EXACT, bases_of
from tests.support.families import DENSE, TOKENIZER, VISION, tiny_family


@pytest.mark.parametrize(
    "family", ["gemma3", "qwen3_5", "qwen3_vl", "llava", "mistral3", "nemotron_h", "bamba", "gpt2"]
)
def test_the_saved_policy_keeps_to_its_null_space(family: str, tmp_path: Path) -> None:
    """Trained on text, anchored at the published folder, saved whole, certified on what was saved: rounding leaks, no
    more; a tower that reads images is frozen, and the certificate says that images are unprotected."""
    tiny_family(family).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base").train()
    sites = {site.name: ([*site.layers], site.width, site.width // 2) for site in find_sites(model)}
    assert not any("vision" in name or "visual" in name for name in sites)
    made = bases_of(model, sites)
    bases = NullSpaceBases(made.values(), made.manifest["layer_norms"], model=model_identity(tmp_path / "base"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    constraint = constrain(model, optimizer, bases, anchor=tmp_path / "base", mode="anchor")
    for seed in range(3):
        ids = torch.randint(6, 90, (2, 12), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        inputs = {"token_type_ids": torch.zeros_like(ids)} if family == "gemma3" else {}
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **inputs).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "tuned")
    TOKENIZER.save_pretrained(tmp_path / "tuned")

    certificate = verify(tmp_path / "base", tmp_path / "tuned", bases)
    assert certificate["summary"]["leakage_basis"]["max"] < EXACT
    assert certificate["summary"]["relative_update"]["mean"] > 1e-3
    assert certificate["unconstrained"] == {}
    read = ["image"] if hasattr(model.config, "vision_config") else []
    assert certificate["coverage"]["unprotected_inputs"] == read
    assert constraint.frozen_names
    state = load_model(tmp_path / "tuned").state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_model_that_calls_itself_its_decoder_is_trained_outside_its_tower() -> None:
    """GIT: its tower for images comes first and is as deep."""
    config = GitConfig(**{**DENSE, "vision_config": {**VISION, "model_type": "git_vision_model"}})
    model = GitForCausalLM(config).eval()
    assert model.get_decoder() is model.git
    assert {site.name.split(".layer.")[0] for site in find_sites(model)} == {"git.encoder"}


def test_the_towers_are_as_deep_as_the_decoders() -> None:
    """Else the test above would not tell whose blocks were found."""
    assert VISION["num_hidden_layers"] == VISION["depth"] == tiny_family("gemma3").config.text_config.num_hidden_layers

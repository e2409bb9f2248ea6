"""Experts that share a 3-D parameter: their sites, what they are handed out as reading, and what is refused."""

import pytest
import torch
import transformers as tf
from support.mixtures import COMMON, EXPERTS, LOCAL, MIXTURES, mixture

from nspo.errors import UserError
from nspo.models.structure.coverage import blocks_of, coverage_of, in_words
from nspo.models.structure.linears import find_weights, locate
from nspo.models.structure.sites import find_sites, watch
from nspo.nullspace.projection import project_

IDS = torch.arange(3, 9)[None]  # fewer tokens than any width, so that every site has a free space


def handed_out(model: tf.PreTrainedModel) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The vectors of every site in one pass over `IDS`, (n, d) each, and the logits of that pass."""
    vectors = {}

    def receive(site, tensor, _tokens):
        assert site.name not in vectors
        vectors[site.name] = tensor.reshape(-1, site.width)

    with torch.no_grad(), watch(model, find_sites(model), receive):
        return vectors, model(input_ids=IDS, use_cache=False).logits


def move(model: tf.PreTrainedModel, vectors: dict[str, torch.Tensor] | None) -> None:
    """Add a random update to every weight that has a site; given `vectors`, one that vanishes on them."""
    generator, sites = torch.Generator().manual_seed(1), find_sites(model)
    weights = find_weights(model, [layer for site in sites for layer in site.layers])
    for site in sites:
        for layer in site.layers:
            rows = weights[layer].rows(weights[layer].parameter)
            update = torch.randn(rows.shape, generator=generator) * 0.1
            if vectors is not None:
                basis = torch.linalg.svd(vectors[site.name].double(), full_matrices=False)[2].T.float()
                update = project_(update.reshape(-1, site.width), basis, "range").reshape(rows.shape)
            with torch.no_grad():
                rows += update


@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_has_a_site_and_no_router_has(family):
    """All experts are covered: their inputs together, their down projections one by one; and 90% of the blocks."""
    model = mixture(family)
    layers = {layer for site in find_sites(model) for layer in site.layers}
    weights = locate(model, layers)
    modules = [name for name, module in model.named_modules() if hasattr(module, "has_gate")]
    assert modules
    for name in modules:
        up = next(f"{name}.{up}" for up in ("gate_up_proj", "up_proj") if hasattr(model.get_submodule(name), up))
        assert {up, *(f"{name}.down_proj.{number}" for number in range(EXPERTS))} <= layers
    assert not [layer for layer in layers if layer.endswith((".gate", ".router"))]
    blocks = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    assert sum(weight.size for weight in weights.values()) > 0.9 * blocks


@pytest.mark.parametrize("family", MIXTURES)
def test_an_update_that_vanishes_on_what_is_handed_out_changes_no_output(family):
    """The vectors are those that the weights read, biases, transposed and ungated experts included: an update of every
    weight that is zero on them leaves the logits, one of the same size that is not changes them."""
    model, free = mixture(family), mixture(family)
    vectors, before = handed_out(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, before)  # watching changes nothing
        move(model, vectors)
        move(free, None)
        after, other = (m(input_ids=IDS, use_cache=False).logits for m in (model, free))
    scale = float(before.norm())
    assert float((after - before).norm()) < 1e-4 * scale
    assert float((other - before).norm()) > 0.1 * scale


def test_an_expert_is_handed_only_the_tokens_that_were_routed_to_it():
    """Every token comes to as many experts as it asks, each at its place."""
    model, places = mixture("Qwen3Moe"), []
    with torch.no_grad(), watch(model, find_sites(model, r".*\.1\..*down_proj"), lambda _s, _t, at: places.append(at)):
        model(input_ids=IDS, use_cache=False)
    assert len(places) == EXPERTS
    assert sorted(torch.cat(places).tolist()) == sorted([*range(6), *range(6)])


def test_latent_attention_reads_one_vector_per_token():
    """DeepSeek's kv_b_proj is given its vectors with a dimension of one head, and has a site like any layer."""
    names = {layer for site in find_sites(mixture("DeepseekV3")) for layer in site.layers}
    assert "model.layers.0.self_attn.kv_b_proj" in names


LLAMA4 = {**COMMON, **LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 24}
DBRX = {
    "vocab_size": 64,
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 2,
    "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
}


@pytest.mark.parametrize(
    ("config", "settings", "first"),
    [
        ("Llama4TextConfig", LLAMA4, r"model\.layers\.0\.feed_forward\.experts"),
        ("JetMoeConfig", {**COMMON, **LOCAL}, r"model\.layers\.0\.\S+"),
        ("DbrxConfig", DBRX, r"transformer\.blocks\.0\.ffn\.experts\.mlp"),
    ],
)
def test_experts_of_another_form_are_refused_by_name(config, settings, first):
    """Inputs multiplied before, sorted tokens, all experts in one matrix: never left out in silence."""
    model = tf.AutoModelForCausalLM.from_config(getattr(tf, config)(**settings)).eval()
    with pytest.raises(UserError, match=rf"{first}.* hold experts in a form.*activations\.layers"):
        find_sites(model)
    assert find_sites(model, r".*attn.*|.*attention.*(q|k|v)_proj|.*norm_attn.*|.*kv_proj")


def test_a_recurrent_block_is_no_mixture():
    """RecurrentGemma's gates are 3-D parameters, one matrix per head: frozen, and no reason to refuse the rest."""
    small = {**COMMON, "num_hidden_layers": 1, "lru_width": 16, "head_dim": 8}
    model = tf.RecurrentGemmaForCausalLM(tf.RecurrentGemmaConfig(**small)).eval()
    assert model.get_submodule("model.layers.0.temporal_block.rg_lru").input_gate_weight.ndim == 3
    assert any("temporal_block.linear_x" in layer for site in find_sites(model) for layer in site.layers)


def test_experts_that_compute_something_else_are_refused():
    """The output is rebuilt from what is handed out: a module that changes its inputs first is found out."""
    model = mixture("Mixtral")
    experts = model.model.layers[1].mlp.experts
    forward = experts.forward
    experts.forward = lambda hidden_states, chosen, weights: forward(2 * hidden_states, chosen, weights)
    with pytest.raises(UserError, match=r"experts of model\.layers\.1\.mlp\.experts do not compute what"):
        find_sites(model)
    assert find_sites(model, r".*attn.*|.*gate_up_proj")


def test_some_experts_of_a_parameter_alone_are_refused():
    """The others would move freely: one parameter cannot be frozen in part."""
    model = mixture("Olmoe")
    with pytest.raises(UserError, match=r"the bases hold 1 of the 4 experts of model\.layers\.0\.mlp\.experts\.down"):
        locate(model, ["model.layers.0.mlp.experts.down_proj.2"])
    with pytest.raises(UserError, match=r"no layer model\.layers\.0\.mlp\.experts\.down_proj\.4"):
        locate(model, [f"model.layers.0.mlp.experts.down_proj.{number}" for number in range(1, 5)])


def test_the_coverage_names_what_is_frozen_and_what_is_not_read():
    """Shares are of all weights of the blocks; routers and norms are named, and towers that read images."""
    model = mixture("Qwen3Moe")
    sites = find_sites(model)
    found = blocks_of(model, [layer for site in sites for layer in site.layers], ())
    inside = {name: p.numel() for name, p in model.named_parameters() if ".layers." in name}
    assert found["weights"] == sum(inside.values())
    assert found["frozen"]["mlp.gate.weight"] == sum(n for name, n in inside.items() if name.endswith("gate.weight"))
    assert sum(found["layers"].values()) + sum(found["frozen"].values()) == found["weights"]
    rows = {site.name: {"site": site.name, "layers": site.layers, "null_dim": 3} for site in sites}
    idle = sites[-1].name
    rows[idle]["null_dim"] = 0
    covered = coverage_of({"blocks": {**found, "unprotected_inputs": ["image"]}, "sites": rows})
    free = sum(count for layer, count in found["layers"].items() if layer != idle)
    assert covered["constrained"] == pytest.approx(free / found["weights"])
    said = in_words(covered)
    assert f"1 sites without a free direction ({idle})" in said
    assert "image inputs are unprotected" in said
    assert in_words(coverage_of({})) == "not recorded"

"""adapter.py: a LoRA adapter that stays in the null space whatever trains it, saved, loaded and merged."""

import copy
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_basis
from nspo.certify.certificate import verify
from nspo.constraint.adapter import free_directions, merge_adapter, null_space_adapter, verify_adapter
from nspo.constraint.constrain import constrain
from nspo.errors import UserError
from nspo.models.loading import load_model, model_identity
from nspo.models.structure.linears import layer_norms
from nspo.models.structure.sites import find_sites
from nspo.models.tiny import tiny_model
from nspo.nullspace.basis import SiteBasis

EXACT = 1e-6
DOWN, UP, QUERY = (f"model.layers.1.{name}_proj" for name in ("mlp.down", "mlp.up", "self_attn.q"))
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
}


def made_site(site, rank: int, seed: int = 0) -> SiteBasis:
    inputs = torch.randn(site.width, 3 * site.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return compute_basis(site.name, site.layers, inputs @ inputs.T, 10_000, "rank", rank)


def bases_of(net: nn.Module, free: int = 6, **identity) -> NullSpaceBases:
    """Inputs of `down` keep a range basis with most directions free, all others a null basis of `free` directions."""
    sites = find_sites(net)
    wide = max(site.width for site in sites)
    made = [made_site(site, 10 if site.width == wide else site.width - free, i) for i, site in enumerate(sites)]
    assert {site.kind for site in made} == {"range", "null"}
    return NullSpaceBases(made, layer_norms(net, [layer for site in made for layer in site.layers]), **identity)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> None:
    for seed in range(steps):
        ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def relative_leaks(model: nn.Module, base: nn.Module, bases: NullSpaceBases) -> dict[str, float]:
    """||(W - W0) Q|| / ||W0 Q|| in float64, with Q from the free space's complement: independent of the package."""
    leaks = {}
    for layer in bases.layers:
        site = bases.for_layer(layer)
        basis = torch.linalg.qr(site.basis.double(), mode="complete")[0]
        protected = basis[:, : site.rank] if site.kind == "range" else basis[:, site.null_dim :]
        before, after = (m.get_submodule(layer).weight.detach().double() for m in (base, model))
        leaks[layer] = float(((after - before) @ protected).norm() / (before @ protected).norm())
    return leaks


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exact_under_any_optimizer(name):
    base, model = tiny_model(), tiny_model()
    bases = bases_of(base)
    adapted = null_space_adapter(model, bases)
    assert all(".lora_B." in parameter for parameter in trainable(adapted))
    train(adapted, OPTIMIZERS[name](p for p in adapted.parameters() if p.requires_grad))
    assert max(verify_adapter(adapted, bases).values()) <= EXACT
    merged = merge_adapter(adapted, bases)
    assert max(relative_leaks(merged, base, bases).values()) <= EXACT
    for layer in bases.layers:
        before, after = base.get_submodule(layer).weight, merged.get_submodule(layer).weight
        assert (after - before).norm() / before.norm() > 5e-3


def test_gradient_descent_makes_the_steps_of_the_projected_gradient():
    """dL/dB = (dL/dW) U, so with all free directions plain SGD equals SGD under `constrain`."""
    adapted_base, constrained = tiny_model(), tiny_model()
    bases = bases_of(constrained)
    adapted = null_space_adapter(adapted_base, bases)
    train(adapted, torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=0.3), 5)
    optimizer = torch.optim.SGD(constrained.parameters(), lr=0.3)
    constrain(constrained, optimizer, bases)
    train(constrained, optimizer, 5)
    merged = merge_adapter(adapted, bases)
    for layer in bases.layers:
        torch.testing.assert_close(
            merged.get_submodule(layer).weight, constrained.get_submodule(layer).weight, atol=1e-6, rtol=1e-5
        )


def test_stock_lora_leaks_and_is_refused():
    """The control: the same ranks and steps with A as PEFT draws it."""
    base, model = tiny_model(), tiny_model()
    bases = bases_of(base)
    adapted = get_peft_model(model, LoraConfig(r=6, lora_alpha=6, target_modules=list(bases.layers)))
    train(adapted, OPTIMIZERS["adamw"](adapted.parameters()))
    with pytest.raises(UserError, match=r"lora_A\.default\.weight is trainable, expected lora_B alone"):
        verify_adapter(adapted, bases)
    adapted.requires_grad_(False)
    with pytest.raises(UserError, match=r"the adapter of layer model\S+ leaves the null space by \d"):
        merge_adapter(adapted, bases)
    assert max(relative_leaks(adapted.merge_and_unload(), base, bases).values()) > 0.1


def test_the_merged_model_is_the_adapted_one_and_passes_the_certificate(tiny_model_dir, tmp_path):
    model = load_model(tiny_model_dir)
    bases = bases_of(model, model=model_identity(tiny_model_dir))
    adapted = null_space_adapter(model, bases)
    train(adapted, OPTIMIZERS["adamw"](p for p in adapted.parameters() if p.requires_grad))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
        merged = merge_adapter(adapted, bases)
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    certificate = verify(tiny_model_dir, tmp_path, bases)
    assert max(layer["leakage_basis"] for layer in certificate["layers"].values()) <= EXACT
    assert min(layer["relative_update"] for layer in certificate["layers"].values()) > 5e-3
    assert not certificate["unconstrained"]


def test_a_conv1d_is_adapted_too():
    """GPT-2 stores weights as (input, output)."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=32, n_inner=64))
    bases = bases_of(model)
    adapted = null_space_adapter(model, bases)
    train(adapted, OPTIMIZERS["adamw"](p for p in adapted.parameters() if p.requires_grad))
    leaks = verify_adapter(adapted, bases)
    assert leaks.keys() == set(bases.layers)
    assert 0 < max(leaks.values()) <= EXACT


# ------------------------------------------------------------------------------------------ ranks and directions


def ranks(adapted: nn.Module) -> dict[str, int]:
    return {
        name.split("base_model.model.")[1].removesuffix(".lora_A.default"): module.out_features
        for name, module in adapted.named_modules()
        if name.endswith("lora_A.default")
    }


def test_every_layer_gets_its_own_rank():
    """All that is free, or at most `rank`; the pattern of layer 1 does not catch layer 11; scaling is 1 everywhere."""
    model = tiny_model()
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 12, "layer_types": None})
    model, other = type(model)(config), type(model)(config)
    other.load_state_dict(model.state_dict())
    sites = find_sites(model)
    made = [made_site(site, site.width - 1 - i % 7) for i, site in enumerate(sites)]
    bases = NullSpaceBases(made, layer_norms(model, [layer for site in made for layer in site.layers]))
    adapted = null_space_adapter(model, bases)
    assert ranks(adapted) == {layer: bases.for_layer(layer).null_dim for layer in bases.layers}
    assert {m.scaling["default"] for m in adapted.modules() if isinstance(m, LoraLayer)} == {1.0}
    limited = null_space_adapter(other, bases, rank=3)
    assert ranks(limited) == {layer: min(3, bases.for_layer(layer).null_dim) for layer in bases.layers}


def test_a_layer_without_a_free_direction_stays_as_it_is():
    model = tiny_model()
    site = next(site for site in find_sites(model) if QUERY in site.layers)
    with pytest.warns(UserWarning, match="its layers cannot move"):
        stuck = made_site(site, site.width)
    others = [made_site(other, other.width - 2) for other in find_sites(model) if other != site]
    bases = NullSpaceBases([stuck, *others], layer_norms(model, [la for s in [stuck, *others] for la in s.layers]))
    adapted = null_space_adapter(model, bases)
    assert set(ranks(adapted)) == set(bases.layers) - set(stuck.layers)
    verify_adapter(adapted, bases)


@pytest.mark.parametrize("count", [1, 7, 22])
def test_directions_of_a_range_basis_are_free_orthonormal_and_the_same_each_time(count):
    site = made_site(find_sites(tiny_model())[0], 10)
    assert site.kind == "range"
    free = free_directions(site, count).double()
    assert free.shape == (32, count)
    torch.testing.assert_close(free.T @ free, torch.eye(count, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (site.basis.double().T @ free).abs().max() <= 1e-6
    assert torch.equal(free_directions(site, count).double(), free)


def test_the_most_harmful_directions_come_first():
    """With rule contrast and rank 1, the direction whose harmful share most exceeds mu times its general share."""
    general, harmful = torch.eye(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    harmful[3, 3], harmful[5, 5], harmful[6, 6] = 20.0, 90.0, 40.0
    site = compute_basis("x", ["x"], general, 1000, "contrast", 1.5, harmful_gram=harmful)
    assert (site.kind, site.null_dim) == ("null", 2)
    assert free_directions(site, 1).abs().argmax() == 5


# ------------------------------------------------------------------------------------------ saved, loaded, switched


def test_peft_keeps_the_directions_frozen():
    """Switching, disabling and loading adapters re-enable gradients in PEFT: never those of A."""
    model = tiny_model()
    bases = bases_of(model)
    adapted = null_space_adapter(model, bases)
    expected = trainable(adapted)
    adapted.set_adapter("default")
    with adapted.disable_adapter():
        pass
    adapted.base_model.set_requires_grad("default")
    assert trainable(adapted) == expected


def test_a_saved_adapter_is_stock_lora_and_training_goes_on_to_the_bit(tmp_path):
    """PEFT alone loads it for use; loaded into a new adapter, training continues as if it had never stopped."""
    bases = bases_of(tiny_model())

    def build() -> tuple[PeftModel, torch.optim.Optimizer]:
        adapted = null_space_adapter(tiny_model(), bases, rank=5)
        return adapted, OPTIMIZERS["adamw"](p for p in adapted.parameters() if p.requires_grad)

    adapted, optimizer = build()
    train(adapted, optimizer, 5)
    adapted.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    resumed, other = build()
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    other.load_state_dict(state)
    assert trainable(resumed) == trainable(adapted)
    for model, rest in ((adapted, optimizer), (resumed, other)):
        train(model, rest, 5)
    for name, weight in adapted.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name

    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert max(verify_adapter(loaded, bases).values()) <= EXACT
    with pytest.raises(UserError, match=r"lora_A\.default\.weight is trainable"):
        verify_adapter(PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True), bases)


# ------------------------------------------------------------------------------------------ refusals


def test_refuses_a_rank_that_is_not_free():
    model = tiny_model()
    for rank in (0, 55):
        with pytest.raises(UserError, match=f"rank {rank}, expected 1 to 54, the most free directions of an input"):
            null_space_adapter(model, bases_of(model), rank=rank)


def test_refuses_a_model_with_adapters():
    model = tiny_model()
    bases = bases_of(model)
    other = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    for adapted in (null_space_adapter(model, bases), model, other):
        with pytest.raises(UserError, match="the model has an adapter already, expected a bare model"):
            null_space_adapter(adapted, bases)


def test_refuses_another_model():
    model = tiny_model()
    bases = bases_of(model)
    model.get_submodule(UP).weight.data.mul_(1.1)
    with pytest.raises(UserError, match=rf"layer {UP} has weight norm"):
        null_space_adapter(model, bases)
    assert not hasattr(model, "peft_config")


def test_refuses_more_adapters_and_other_kinds():
    model = tiny_model()
    bases = bases_of(model)
    with pytest.raises(UserError, match=r"the model has the adapters \[\], expected \['default'\]"):
        verify_adapter(model, bases)
    adapted = null_space_adapter(model, bases)
    adapted.add_adapter("more", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"the model has the adapters \['default', 'more'\]"):
        merge_adapter(adapted, bases)
    dora = get_peft_model(tiny_model(), LoraConfig(target_modules=[QUERY], use_dora=True))
    dora.requires_grad_(False)
    with pytest.raises(UserError, match=rf"layer {QUERY} has another kind of LoRA"):
        verify_adapter(dora, bases)
    head = get_peft_model(tiny_model(), LoraConfig(target_modules=["lm_head"]))
    head.requires_grad_(False)
    with pytest.raises(UserError, match="bases hold no layer lm_head"):
        verify_adapter(head, bases)


def test_refuses_to_merge_into_rounded_weights_that_it_trains_on():
    """A bf16 base trains with A and B in float32; merged, its rounding would leave the null space."""
    model = tiny_model().bfloat16()
    bases = bases_of(tiny_model())
    adapted = null_space_adapter(model, bases)
    train(adapted, OPTIMIZERS["adamw"](p for p in adapted.parameters() if p.requires_grad), 3)
    assert max(verify_adapter(adapted, bases).values()) <= EXACT
    with pytest.raises(UserError, match=r"has bfloat16 weights, expected float32 to merge into"):
        merge_adapter(adapted, bases)


def test_says_how_to_install_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny_model()
    with pytest.raises(UserError, match=r"needs the package peft: pip install 'nspo\[lora\]'"):
        null_space_adapter(model, bases_of(model))

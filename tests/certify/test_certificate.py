"""The certificate: every figure against brute force, and planted faults that it must show."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_copy import copy_model
from transformers import GPT2Config, GPT2LMHeadModel

from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_basis
from nspo.certify import certificate, checkpoints
from nspo.certify.certificate import verify
from nspo.certify.stage import write_certificate
from nspo.errors import UserError
from nspo.files.manifest import fingerprint_model
from nspo.models.loading import load_model, load_tokenizer, model_identity
from nspo.nullspace.projection import project_

QKV = "model.layers.0.self_attn.qkv"
DOWN = "model.layers.1.mlp.down_proj"
SITES = {QKV: [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"], DOWN: [DOWN]}
CONV1D = "transformer.h.0.attn.c_proj"
WIDTHS = {QKV: 32, DOWN: 64, CONV1D: 16}
TOKENS = {"maths": 80, "code": 200, "harmful": 70}


def inputs(site, domain):
    """(N, d) float64 inputs of a site, mostly in a few directions."""
    generator = torch.Generator().manual_seed(sum(map(ord, site + domain)))
    width = WIDTHS[site]
    scale = torch.linspace(0, 6, width, dtype=torch.float64).neg().exp()
    return torch.randn(TOKENS[domain], width, generator=generator, dtype=torch.float64) * scale


class FakeStore:
    """What the certificate needs of an activation store, with known inputs."""

    def __init__(self, weights):
        self.manifest = {"model": {"weights": weights}}

    def domains(self, split):
        assert split == "validation"
        return list(TOKENS)

    def gram(self, site, split, domains=None):
        rows = torch.cat([inputs(site, domain) for domain in domains])
        return rows.T @ rows / len(rows), len(rows)


@pytest.fixture(scope="module")
def bases(tiny_model_dir):
    """One site of each kind: the range of q, k, v and the null space of a down projection."""
    sites = []
    for (name, layers), energy in zip(SITES.items(), (0.9, 0.999), strict=True):
        rows = torch.cat([inputs(name, domain) for domain in ("maths", "code")])
        sites.append(compute_basis(name, layers, rows.T @ rows / len(rows), len(rows), "energy", energy))
    assert [site.kind for site in sites] == ["range", "null"]
    weights = load_file(tiny_model_dir / "model.safetensors")
    norms = {layer: float(weights[f"{layer}.weight"].norm()) for site in sites for layer in site.layers}
    return NullSpaceBases(sites, norms, model=fingerprint_model(tiny_model_dir))


@pytest.fixture
def tuned(bases, tiny_model_dir, tmp_path):
    """Make a tuned folder: each constrained layer moves inside its null space, then `change(weights)`."""

    def make(change=lambda weights: None):
        folder = tmp_path / "tuned"
        copy_model(tiny_model_dir, folder)
        weights = load_file(folder / "model.safetensors")
        torch.manual_seed(0)
        for layer in bases.layers:
            site = bases.for_layer(layer)
            weight = weights[f"{layer}.weight"]
            weight += project_(0.01 * torch.randn_like(weight), site.basis, site.kind)
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def validation(weight, update, site, domains):
    rows = torch.cat([inputs(site, domain) for domain in domains])
    return float((update @ rows.T).norm() / (weight @ rows.T).norm())


@pytest.mark.parametrize(("values", "product_bytes"), [(2**25, 7e9), (100, 1)])
def test_every_figure_equals_brute_force(bases, tiny_model_dir, tuned, monkeypatch, values, product_bytes):
    """Leakage on basis, on held-out inputs per domain and pooled, and sizes, from the definitions in float64.

    So too when a matrix comes in slices of few rows and one product at a time is in memory.
    """
    monkeypatch.setattr(checkpoints, "SLICE", values)
    monkeypatch.setattr(certificate, "PRODUCT_BYTES", product_bytes)
    monkeypatch.setattr(certificate, "BLOCK", 10)
    folder = tuned(lambda weights: weights[f"{DOWN}.weight"].add_(1e-3))
    store = FakeStore(fingerprint_model(tiny_model_dir)["weights"])
    found = verify(tiny_model_dir, folder, bases, store)
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model_dir, folder))
    for layer in bases.layers:
        site, report = bases.for_layer(layer), found["layers"][layer]
        weight = before[f"{layer}.weight"].double()
        update = (after[f"{layer}.weight"] - before[f"{layer}.weight"]).double()
        basis = site.basis.double()
        protected = basis @ basis.T if site.kind == "range" else torch.eye(site.width) - basis @ basis.T
        exact = float((update @ protected).norm() / (weight @ protected).norm())
        assert report["leakage_basis"] == pytest.approx(exact, rel=1e-3, abs=1e-6)
        assert report["leakage_validation"] == pytest.approx(
            {
                "maths": validation(weight, update, site.site, ["maths"]),
                "code": validation(weight, update, site.site, ["code"]),
                "all": validation(weight, update, site.site, ["maths", "code"]),
            },
            rel=1e-6,
        )
        assert report["harmful"] == pytest.approx(validation(weight, update, site.site, ["harmful"]), rel=1e-6)
        assert report["update_norm"] == pytest.approx(float(update.norm()), rel=1e-6)
        assert report["relative_update"] == pytest.approx(float(update.norm() / weight.norm()), rel=1e-6)


def test_random_reference_is_the_mean_over_random_updates(bases, tiny_model_dir, tuned):
    """The closed form for a random update of equal norm agrees with sampled ones."""
    folder = tuned()
    report = verify(tiny_model_dir, folder, bases, FakeStore(fingerprint_model(tiny_model_dir)["weights"]))
    layer, site = DOWN, bases[DOWN]
    weight = load_file(tiny_model_dir / "model.safetensors")[f"{layer}.weight"].double()
    norm = report["layers"][layer]["update_norm"]
    protected = torch.eye(site.width) - site.basis.double() @ site.basis.double().T
    on_inputs, on_basis = [], []
    for _ in range(400):
        random = torch.randn(weight.shape, dtype=torch.float64)
        random *= norm / random.norm()
        on_inputs.append(validation(weight, random, DOWN, ["maths", "code"]) ** 2)
        on_basis.append(float((random @ protected).norm() / (weight @ protected).norm()) ** 2)
    assert report["layers"][layer]["random_equal_norm"] == pytest.approx(math.sqrt(sum(on_inputs) / 400), rel=0.05)
    assert report["layers"][layer]["random_basis"] == pytest.approx(math.sqrt(sum(on_basis) / 400), rel=0.05)


def test_a_constrained_update_is_certified(bases, tiny_model_dir, tuned, tmp_path):
    """Inside the null space: no leakage beyond rounding, nothing unprotected; the file holds it with its facts."""
    out = tmp_path / "certificate.json"
    found = write_certificate(out, tiny_model_dir, tuned(), bases, method="nspo", constrained=True)
    assert json.loads(out.read_text()) == found
    assert (found["method"], found["constrained"]) == ("nspo", True)
    assert 0 < found["summary"]["leakage_basis"]["max"] < 1e-6
    assert found["summary"]["relative_update"]["mean"] > 1e-3
    assert found["summary"]["unprotected_share"] == 0.0
    assert found["unconstrained"] == {}
    assert "leakage_validation" not in found["summary"]


def test_a_planted_leak_is_found(bases, tiny_model_dir, tuned):
    """One layer moved along one protected direction is named as the worst, the others stay clean."""
    leaky = SITES[QKV][1]

    def leak(weights):
        weights[f"{leaky}.weight"][0] += 0.01 * bases[QKV].basis[:, 0]

    found = verify(tiny_model_dir, tuned(leak), bases)
    worst = found["summary"]["leakage_basis"]
    assert worst["worst_layer"] == leaky
    assert worst["max"] > 1e-3
    assert all(row["leakage_basis"] < 1e-6 for layer, row in found["layers"].items() if layer != leaky)


def test_change_outside_the_layers_is_counted(bases, tiny_model_dir, tuned):
    """A moved norm weight shows by name, and as its share of the norm of all change."""
    name = "model.layers.1.input_layernorm.weight"
    found = verify(tiny_model_dir, tuned(lambda weights: weights[name].add_(0.5)), bases)
    assert list(found["unconstrained"]) == [name]
    outside = 0.5 * math.sqrt(32)
    assert found["unconstrained"][name]["update_norm"] == pytest.approx(outside, rel=1e-5)
    inside = math.sqrt(sum(row["update_norm"] ** 2 for row in found["layers"].values()))
    assert found["summary"]["unprotected_share"] == pytest.approx(outside / math.hypot(inside, outside))


def test_an_unchanged_model_is_all_zeros(bases, tiny_model_dir):
    """Base against itself: exact zeros, no division by zero."""
    summary = verify(tiny_model_dir, tiny_model_dir, bases)["summary"]
    assert summary["leakage_basis"]["max"] == summary["update_norm"] == summary["unprotected_share"] == 0.0


def test_sharded_and_tied_checkpoints_count_as_the_same(bases, tiny_model_dir, tuned, tmp_path):
    """Shards with an index, and a tied head stored or not, change no figure."""
    whole = tuned()
    sharded = tmp_path / "sharded"
    load_model(whole).save_pretrained(sharded, max_shard_size="20KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    head = tmp_path / "head"
    shutil.copytree(whole, head)
    weights = load_file(head / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, head / "model.safetensors", metadata={"format": "pt"})
    expected = verify(tiny_model_dir, whole, bases)
    for folder in (sharded, head):
        found = verify(tiny_model_dir, folder, bases)
        assert (found["layers"], found["summary"]) == (expected["layers"], expected["summary"])
    next(sharded.glob("*-00002-*")).unlink()
    with pytest.raises(UserError, match="copy the whole model"):
        verify(tiny_model_dir, sharded, bases)


def test_dtypes_may_differ(bases, tiny_model_dir, tuned, tmp_path):
    """A bf16 pair gives the figures of the same numbers in float32; a bf16 base and a float32 tuned model do too."""
    folders = {"base": tiny_model_dir, "tuned": tuned()}

    def cast(side, name, convert):
        folder = tmp_path / f"{side}-{name}"
        copy_model(folders[side], folder)
        weights = {key: convert(value) for key, value in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    narrow = {side: cast(side, "bf16", lambda value: value.bfloat16()) for side in folders}
    wide = {side: cast(side, "fp32", lambda value: value.bfloat16().float()) for side in folders}

    def figures(base, tuned):
        norms = bases.manifest["layer_norms"]
        found = verify(base, tuned, NullSpaceBases(bases.values(), norms, model=model_identity(base)))
        return found["layers"], found["unconstrained"], found["summary"]

    expected = figures(wide["base"], wide["tuned"])
    assert expected[2]["leakage_basis"]["max"] > 1e-5  # bf16 rounding leaks, which is what there is to see
    assert figures(narrow["base"], narrow["tuned"]) == figures(narrow["base"], wide["tuned"]) == expected


def test_conv1d_is_read_the_right_way_round(tmp_path):
    """GPT-2 keeps (input, output): a square matrix moved inside its null space has no leakage; held-out by hand."""
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    base, folder = tmp_path / "base", tmp_path / "tuned"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(base)
    weight = model.get_submodule(CONV1D).weight
    before = weight.detach().clone()
    rows = inputs(CONV1D, "maths")
    site = compute_basis(CONV1D, [CONV1D], rows.T @ rows / len(rows), len(rows), "rank", 5)
    bases = NullSpaceBases([site], {CONV1D: float(before.norm())}, model=fingerprint_model(base))
    with torch.no_grad():
        weight += project_(0.02 * torch.randn(16, 16), site.basis, site.kind).T
    model.save_pretrained(folder)
    found = verify(base, folder, bases, FakeStore(fingerprint_model(base)["weights"]))["layers"][CONV1D]
    assert found["leakage_basis"] < 1e-6
    expected = validation(before.T.double(), (weight.detach() - before).T.double(), CONV1D, ["code"])
    assert found["leakage_validation"]["code"] == pytest.approx(expected, rel=1e-6)


def test_what_does_not_belong_together_is_refused(bases, tiny_model_dir, tuned, tmp_path):
    """Other weights, tokenizer, architecture, tensors or shapes, and NaN: each ends in a line that names it."""
    folder = tuned()
    with pytest.raises(UserError, match=r"bases for the base .*: made with weights"):
        verify(folder, folder, bases)
    with pytest.raises(UserError, match=r"activations for the base .*: made with weights other"):
        verify(tiny_model_dir, folder, bases, FakeStore("other"))

    weights = load_file(folder / "model.safetensors")
    norm = "model.norm.weight"

    retokenized, relabelled = tmp_path / "retokenized", tmp_path / "relabelled"
    copy_model(tiny_model_dir, retokenized)
    tokenizer = load_tokenizer(retokenized)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(retokenized)
    with pytest.raises(UserError, match=r"bases for the base .*: made with tokenizer"):
        verify(retokenized, folder, bases)
    identity = model_identity(tiny_model_dir) | {"architecture": "OtherModel"}
    with pytest.raises(UserError, match=r"made with architecture OtherModel, expected LlamaForCausalLM"):
        verify(tiny_model_dir, folder, NullSpaceBases(bases.values(), bases.manifest["layer_norms"], model=identity))
    shutil.copytree(folder, relabelled)
    other = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    config = json.loads((relabelled / "config.json").read_text()) | other
    (relabelled / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is a LlamaForCausalLM, the tuned model .* a MistralForCausalLM"):
        verify(tiny_model_dir, relabelled, bases)

    def changed(name, value):
        other = tmp_path / name
        shutil.copytree(folder, other)
        kept = {key: tensor for key, tensor in {**weights, norm: value}.items() if tensor is not None}
        save_file(kept, other / "model.safetensors", metadata={"format": "pt"})
        return other

    with pytest.raises(UserError, match=f"1 tensors are in one model only, first {norm} .in the base model"):
        verify(tiny_model_dir, changed("lacking", None), bases)
    with pytest.raises(UserError, match=rf"{norm} is \[32\] in the base model and \[31\]"):
        verify(tiny_model_dir, changed("shape", torch.ones(31)), bases)
    with pytest.raises(UserError, match=f"{norm} of the tuned model holds NaN"):
        verify(tiny_model_dir, changed("nan", torch.full((32,), math.nan)), bases)


def test_an_interrupted_certificate_goes_on(bases, tiny_model_dir, tuned, monkeypatch, tmp_path, capsys):
    """Sites that are done are not measured again, the result is the same, and nothing is left behind."""
    folder, store = tuned(), FakeStore(fingerprint_model(tiny_model_dir)["weights"])
    quiet = verify(tiny_model_dir, folder, bases, store)
    measured, answers = [], certificate.validation_answers

    def counted(layers, site, store):
        measured.append(site.site)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return answers(layers, site, store)

    monkeypatch.setattr(certificate, "validation_answers", counted)
    with pytest.raises(KeyboardInterrupt):
        verify(tiny_model_dir, folder, bases, store, tmp_path / "work")
    assert json.dumps(verify(tiny_model_dir, folder, bases, store, tmp_path / "work"), sort_keys=True) == json.dumps(
        quiet, sort_keys=True
    )
    assert sorted(measured) == sorted([QKV, DOWN, DOWN])
    assert "continuing after 1 sites" in capsys.readouterr().err
    assert not list((tmp_path / "work").iterdir())

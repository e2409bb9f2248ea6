"""bases.py: spectra and selection rules on matrices with a known answer, the file, and the check against a model."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nspo import constrain
from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_basis
from nspo.errors import UserError
from nspo.files.manifest import make_manifest
from nspo.files.tensors import save_tensors
from nspo.models.structure.linears import canonical_name, layer_norms
from nspo.nullspace.spectra import complement, contrast_free, protected_rank, symmetric_eigh

TOKENS = 10_000


def rotation(d: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def gram_of(spectrum: list[float], seed: int = 0) -> torch.Tensor:
    q = rotation(len(spectrum), seed)
    return q @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ q.T


def share(directions: torch.Tensor, gram: torch.Tensor) -> float:
    return float((directions.T @ gram @ directions).trace() / gram.trace())


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 4))


@pytest.fixture
def bases(model) -> NullSpaceBases:
    sites = [
        compute_basis("in", ["0"], gram_of([8, 7, 6, 5, 4, 3, 2, 1]), TOKENS, "rank", 3),
        compute_basis("mid", ["1"], gram_of([8, 4, 2, 1, 0.5, 0.2]), TOKENS, "rank", 5),
    ]
    return NullSpaceBases(sites, layer_norms(model, ["0", "1"]), model={"weights": "abc"}, seed=1)


# ------------------------------------------------------------------------------------------- eigendecomposition


def test_eigh_is_descending_and_rebuilds_the_matrix():
    gram = gram_of([3, 1, 2])
    values, vectors = symmetric_eigh(gram.float())
    torch.testing.assert_close(values, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, gram, atol=1e-6, rtol=0)


def test_eigh_symmetrises_and_clips_rounding_below_zero():
    gram = gram_of([1, 1e-18, 0])
    gram[0, 1] += 1e-9
    values, _ = symmetric_eigh(gram)
    assert (values >= 0).all()


def test_eigh_refuses_nan_and_non_square():
    with pytest.raises(UserError, match="1 NaN or Inf"):
        symmetric_eigh(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))
    with pytest.raises(UserError, match=r"\(2, 3\), expected a square"):
        symmetric_eigh(torch.zeros(2, 3))


# ------------------------------------------------------------------------------------------- rules

SPECTRUM = torch.tensor([100.0, 10.0, 1.0, 0.1, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("rule", "threshold", "rank"),
    [
        ("relative", 0.1, 2),
        ("relative", 0.05, 2),
        ("relative", 1.0, 1),
        ("relative", 0.0, 5),
        ("absolute", 1.0, 3),
        ("absolute", 1e3, 0),
        ("absolute", 0.0, 5),
        ("energy", 0.0, 0),
        ("energy", 0.9, 1),
        ("energy", 0.95, 2),
        ("energy", 1.0, 4),  # the fifth direction holds nothing
        ("rank", 0, 0),
        ("rank", 3, 3),
        ("rank", 99, 5),
        ("fraction", 0.0, 0),
        ("fraction", 0.4, 2),
        ("fraction", 1.0, 5),
    ],
)
def test_rule_on_a_known_spectrum(rule, threshold, rank):
    assert protected_rank(SPECTRUM, rule, threshold) == rank


def test_energy_meets_a_share_that_lies_exactly_on_an_edge():
    assert protected_rank(torch.tensor([9.0, 1.0], dtype=torch.float64), "energy", 0.9) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.0, 1.0))
def test_leakage_rule_equals_brute_force(seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    kept, validation = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    values, vectors = symmetric_eigh(kept @ kept.T)
    norms = [(validation - vectors[:, :r] @ vectors[:, :r].T @ validation).norm() / validation.norm() for r in range(7)]
    expected = next(r for r, norm in enumerate(norms) if norm <= threshold + 1e-9)
    gram = validation @ validation.T
    assert protected_rank(values, "leakage", threshold, vectors=vectors, validation_gram=gram) == expected


@pytest.mark.parametrize(
    ("rule", "threshold", "message"),
    [
        ("magic", 0.5, "'magic', expected one of relative"),
        ("energy", 1.5, "1.5 for rule 'energy', expected a number from 0 to 1"),
        ("rank", 2.5, "2.5 for rule 'rank', expected a whole number"),
        ("fraction", math.nan, "nan for rule 'fraction'"),
        ("leakage", 0.1, "found no validation inputs"),
        ("contrast", 2.0, "use contrast_free"),  # a selectivity above 1 is no error
        ("contrast", -1.0, "-1.0 for rule 'contrast', expected a number from 0"),
    ],
)
def test_rule_refusals(rule, threshold, message):
    with pytest.raises(UserError, match=message):
        protected_rank(SPECTRUM, rule, threshold)


# ------------------------------------------------------------------------------------------- contrast


def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """General and harmful second moments in d = 24; harmful inputs use directions 4, 5, 6 eleven times as much."""
    q = rotation(24)
    general = torch.tensor([1.0] * 4 + [0.05] * 3 + [0.045 * 0.99**i for i in range(17)], dtype=torch.float64)
    harmful = general.clone()
    harmful[4:7] += 0.5
    return q @ general.diag() @ q.T, q @ harmful.diag() @ q.T, q[:, 4:7]


def mixed() -> tuple[torch.Tensor, torch.Tensor]:
    """General and harmful second moments in d = 16 with decaying spectra that share no eigenvector."""
    return gram_of([1.5**-i for i in range(16)], 1), gram_of([1.4**-i for i in range(16)], 2)


def test_contrast_frees_planted_directions_and_beats_the_plain_null_space():
    """Exactly the three planted directions are freed, and the plain null space of equal cost holds far less harm."""
    general, harmful, directions = planted()
    free = contrast_free(general, harmful, 2.0)
    assert free.shape == (24, 3)
    assert torch.linalg.matrix_norm(free.T @ directions) ** 2 == pytest.approx(3, abs=1e-6)  # all three are inside
    both = torch.cat([complement(free), free], 1)
    torch.testing.assert_close(both.T @ both, torch.eye(24).double())
    plain = compute_basis("s", ["a"], general, TOKENS, "energy", 1 - share(free, general), harmful_gram=harmful)
    ours = compute_basis("s", ["a"], general, TOKENS, "contrast", 2.0, harmful_gram=harmful)
    assert ours.null_dim == 3
    assert ours.harmful_energy > 5 * plain.harmful_energy
    assert ours.ratio > 5 * plain.ratio


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_contrast_ignores_the_scale_of_either_sample(scale):
    """Second moments are compared as shares of their trace."""
    general, harmful = mixed()
    free = contrast_free(general, harmful, 1.0)
    for scaled in (contrast_free(general, harmful * scale, 1.0), contrast_free(general * scale, harmful, 1.0)):
        torch.testing.assert_close(free @ free.T, scaled @ scaled.T, atol=1e-8, rtol=0)


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0])
def test_contrast_no_rotated_split_of_equal_cost_holds_more_harmful_energy(size):
    """Optimality against slight and large rotations of the split, at no more general energy than it frees."""
    general, harmful = mixed()
    free = contrast_free(general, harmful, 1.0)
    assert 0 < free.shape[1] < 16
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for _ in range(50):
        noise = torch.randn(16, 16, generator=generator, dtype=torch.float64)
        rotated = torch.matrix_exp(size * (noise - noise.T)) @ torch.cat([free, complement(free)], 1)
        for count in range(1, 17):
            if share(rotated[:, :count], general) <= share(free, general):
                assert share(rotated[:, :count], harmful) < share(free, harmful)
                compared += 1
    assert compared > 50


def test_contrast_beats_the_ratio_form():
    """The eigenvectors of H u = lambda G u hold less harmful energy at equal cost, as the docstring says."""
    general, harmful = mixed()
    free = contrast_free(general, harmful, 1.0)
    ridge = general + 1e-3 * general.trace() / 16 * torch.eye(16, dtype=torch.float64)
    whiten = torch.linalg.inv(torch.linalg.cholesky(ridge))
    ratio = torch.linalg.qr(whiten.T @ torch.linalg.eigh(whiten @ harmful @ whiten.T)[1].flip(1))[0]
    count = max(k for k in range(17) if share(ratio[:, :k], general) <= share(free, general))
    assert share(free, harmful) > share(ratio[:, :count], harmful)


def test_contrast_frees_less_the_more_selective_it_is():
    """Directions, general and harmful share all fall as mu grows, and harm stays at least mu times the cost."""
    general, harmful = mixed()
    freed = []
    for selectivity in (0.0, 0.5, 1.0, 2.0, 4.0, 1e6):
        free = contrast_free(general, harmful, selectivity)
        freed.append((free.shape[1], share(free, general), share(free, harmful)))
        assert freed[-1][2] >= selectivity * freed[-1][1]
    for column in zip(*freed, strict=True):
        assert list(column) == sorted(column, reverse=True)
        assert column[0] > column[2] > column[4]
    assert freed[0][0] == 16  # mu = 0 frees whatever harmful inputs use at all
    assert freed[-1] == (0, 0, 0)


@pytest.mark.parametrize("selectivity", [1.0, 3.0])
def test_contrast_protects_everything_when_nothing_is_selective(selectivity):
    """H = G up to scale: no direction is more harmful than general."""
    general = gram_of([4, 3, 2, 1])
    free = contrast_free(general, 2 * general, selectivity)
    assert free.shape == (4, 0)


def test_contrast_keeps_unused_directions_protected():
    """A direction that neither sample uses is not freed, however low mu is."""
    general, harmful = torch.diag(torch.tensor([1.0, 0.1, 0])), torch.diag(torch.tensor([1.0, 1.0, 0]))
    free = contrast_free(general, harmful, 1.0)
    torch.testing.assert_close(free.abs(), torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64))


# ------------------------------------------------------------------------------------------- one site


@pytest.mark.parametrize(
    ("rank", "kind", "columns"), [(0, "range", 0), (2, "range", 2), (3, "null", 2), (5, "null", 0)]
)
def test_the_thinner_side_is_kept(rank, kind, columns):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        site = compute_basis("s", ["a"], gram_of([5, 4, 3, 2, 1]), TOKENS, "rank", rank)
    assert (site.kind, site.basis.shape, site.basis.dtype) == (kind, (5, columns), torch.float32)
    assert site.null_dim == 5 - rank
    assert site.energy_kept == pytest.approx(sum([5, 4, 3, 2, 1][:rank]) / 15)


def test_heldout_leakage_and_harmful_energy_are_measured():
    general, validation, harmful = (
        torch.diag(torch.tensor([4.0, 1, 0])),
        torch.diag(torch.tensor([3.0, 0, 1])),
        torch.eye(3),
    )
    site = compute_basis("s", ["a"], general, TOKENS, "rank", 1, validation, harmful)
    assert site.leakage == pytest.approx(0.5)
    assert site.harmful_energy == pytest.approx(2 / 3)
    assert site.ratio == pytest.approx((2 / 3) / 0.25)


def test_warns_of_too_few_tokens_and_of_no_free_direction():
    with pytest.warns(UserWarning, match="s: 19 tokens for width 5, at least 20 are needed"):
        compute_basis("s", ["a"], torch.eye(5), 19, "rank", 2)
    with pytest.warns(UserWarning, match="protects all 5 directions"):
        compute_basis("s", ["a"], torch.eye(5), 20, "rank", 5)


def test_compute_basis_refuses_unusable_moments():
    with pytest.raises(UserError, match=r"s: the general second moment is \(4, 4\) with trace 0"):
        compute_basis("s", ["a"], torch.zeros(4, 4), TOKENS, "rank", 2)
    with pytest.raises(UserError, match=r"the harmful second moment is \(3, 3\).*expected \(4, 4\)"):
        compute_basis("s", ["a"], torch.eye(4), TOKENS, "rank", 2, harmful_gram=torch.eye(3))
    with pytest.raises(UserError, match="found no harmful inputs"):
        compute_basis("s", ["a"], torch.eye(4), TOKENS, "contrast", 0.1)


# ------------------------------------------------------------------------------------------- the file


def test_round_trip_and_equal_bytes(bases, tmp_path):
    bases.save(tmp_path / "a.safetensors")
    loaded = NullSpaceBases.load(tmp_path / "a.safetensors")
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert loaded.manifest == bases.manifest
    assert loaded.manifest["model"] == {"weights": "abc"}
    assert loaded.manifest == bases.manifest
    assert torch.equal(loaded.for_layer("module.0").basis, bases["in"].basis)
    assert loaded.for_layer("1").kind == "null"


def test_load_refuses_truncated_other_kind_and_missing(bases, tmp_path):
    path = tmp_path / "bases.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        NullSpaceBases.load(path)
    bases.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"bases\.safetensors is not a whole safetensors file"):
        NullSpaceBases.load(path)
    save_tensors(path, {"x": torch.zeros(1)}, make_manifest("reward"))
    with pytest.raises(UserError, match="holds 'reward', expected 'bases'"):
        NullSpaceBases.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"in/basis": t["in/basis"] * 1.01}), "site in is not orthonormal"),
        (
            lambda t: t.update({"in/basis": t["in/basis"][:, :2]}),
            r"site in holds .* shape \(8, 2\), expected \(8, 3\)",
        ),
        (lambda t: t["in/basis"].fill_(math.nan), "site in holds NaN"),
        (lambda t: t.update({"in/eigenvalues": t["in/eigenvalues"][:5]}), "site in holds 5 eigenvalues, expected 8"),
        (lambda t: t.pop("mid/eigenvalues"), "lacks 'mid/eigenvalues'"),
        (lambda t: t.update({"in/basis": t["in/basis"].half() * 1.01}), "site in is not orthonormal"),
        (lambda t: t.update({"in/basis": torch.zeros(8, 3).half()}), "site in is not orthonormal"),
    ],
)
def test_load_refuses_a_damaged_basis(bases, tmp_path, change, message):
    tensors = {f"{n}/{k}": getattr(s, k).clone() for n, s in bases.items() for k in ("basis", "eigenvalues")}
    change(tensors)
    save_tensors(tmp_path / "bases.safetensors", tensors, bases.manifest)
    with pytest.raises(UserError, match=message):
        NullSpaceBases.load(tmp_path / "bases.safetensors")


def test_a_flipped_bit_in_the_tensors_is_noticed(bases, tmp_path):
    """Any bit of any value, however small the change it makes, is found by the fingerprint in the manifest."""
    path = tmp_path / "bases.safetensors"
    bases.save(path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"bases\.safetensors was damaged after it was written"):
            NullSpaceBases.load(path)


def test_bases_are_stored_in_half_the_bytes(tmp_path):
    """Loaded they are orthonormal again, within 3e-4 rad of what was saved, and training leaks rounding only."""
    torch.manual_seed(0)
    model = nn.Linear(256, 32, bias=False)
    whole = NullSpaceBases(
        [compute_basis("in", ["0"], gram_of(list(torch.logspace(2, -2, 256).tolist())), TOKENS, "rank", 128)],
        layer_norms(nn.Sequential(model), ["0"]),
    )
    paths = [tmp_path / name for name in ("whole.safetensors", "half.safetensors")]
    whole.save(paths[0])
    whole.save(paths[1], half=True)
    sizes = [path.stat().st_size for path in paths]
    assert sizes[1] < 0.52 * sizes[0]
    half = NullSpaceBases.load(paths[1])
    q, turned = whole["in"].basis.double(), half["in"].basis.double()
    assert (turned.T @ turned - torch.eye(128)).abs().max() < 1e-6
    assert 1e-5 < torch.linalg.matrix_norm(turned - q @ (q.T @ turned), 2) < 3e-4
    assert half.manifest == {**whole.manifest, "rounded": "float16"}
    model = nn.Sequential(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    constraint = constrain(model, optimizer, half)
    model(torch.randn(8, 256)).square().mean().backward()
    optimizer.step()
    assert max(constraint.leakage().values()) < 1e-6


def test_bases_refuse_all_empty_duplicate_layers_and_missing_norms():
    with pytest.warns(UserWarning, match="cannot move"):
        full = compute_basis("s", ["a"], torch.eye(4), TOKENS, "rank", 4)
    half = [compute_basis(name, ["a"], torch.eye(4), TOKENS, "rank", 2) for name in "st"]
    with pytest.raises(UserError, match="no free direction at any of 1 sites"):
        NullSpaceBases([full], {"a": 1.0}).check_free()
    with pytest.raises(UserError, match="listed under two sites"):
        NullSpaceBases(half, {"a": 1.0})
    with pytest.raises(UserError, match="no base weight norm for a"):
        NullSpaceBases(half[:1], {})


# ------------------------------------------------------------------------------------------- the model


def test_check_model_accepts_its_model_through_wrappers(bases, model):
    bases.check_model(model)
    bases.check_model(torch.compile(model, backend="eager"))


def test_check_model_reads_conv1d_transposed():
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"c": Conv1D(6, 4)})  # reads 4, writes 6
    site = compute_basis("s", ["c"], torch.eye(4), TOKENS, "rank", 2)
    NullSpaceBases([site], layer_norms(model, ["c"])).check_model(model)


def test_check_model_refuses_another_model(bases, model):
    with pytest.raises(UserError, match="layer 0 reads width 7, the bases were computed for width 8"):
        bases.check_model(nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 4)))
    with pytest.raises(UserError, match="the model has no layer 1"):
        bases.check_model(model[:1])
    with pytest.raises(UserError, match="layer 1 is a ReLU"):
        bases.check_model(nn.Sequential(model[0], nn.ReLU()))
    with torch.no_grad():
        model[1].weight.mul_(1.02)
    with pytest.raises(
        UserError, match=r"layer 1 has weight norm [\d.]+, the bases were computed on a model where it is"
    ):
        bases.check_model(model)
    with pytest.raises(UserError, match=r"hold no layer 9, expected one of 0, 1"):
        bases.for_layer("9")


def test_check_model_refuses_another_architecture(tiny_model_dir):
    """The class counts, whatever wraps the model: compiled, adapted, or given a class of FSDP2's in front."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from nspo.models.loading import load_model

    layer = "model.layers.0.self_attn.o_proj"
    llama = load_model(tiny_model_dir)
    site = compute_basis(layer, [layer], torch.eye(32), TOKENS, "rank", 2)
    bases = NullSpaceBases([site], layer_norms(llama, [layer]), model={"architecture": "LlamaForCausalLM"})
    bases.check_model(llama)
    qwen = Qwen2ForCausalLM(Qwen2Config(**{**llama.config.to_dict(), "layer_types": None}))
    adapted = get_peft_model(qwen, LoraConfig(target_modules=["q_proj"]))
    sharded = load_model(tiny_model_dir)
    sharded.__class__ = type("FSDPLlamaForCausalLM", (type(sharded),), {})
    for other in (qwen, torch.compile(qwen, backend="eager"), nn.ModuleDict({"module": qwen}), adapted):
        with pytest.raises(UserError, match="bases are of a LlamaForCausalLM, the model is a Qwen2ForCausalLM: use"):
            bases.check_layers(other)
    for same in (sharded, torch.compile(llama, backend="eager")):
        bases.check_model(same)
    NullSpaceBases([site], layer_norms(qwen, [layer])).check_model(qwen)  # an unknown architecture is not refused


def test_check_folder_names_what_differs(tiny_model_dir, tmp_path):
    """Other weights, another tokenizer and another chat template are refused by name, with both fingerprints."""
    import shutil

    from nspo.models.loading import model_identity

    site = compute_basis("s", ["a"], torch.eye(4), TOKENS, "rank", 2)
    made_for = model_identity(tiny_model_dir)
    bases = NullSpaceBases([site], {"a": 1.0}, model=made_for)
    bases.check_folder(tiny_model_dir)
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match=f"model: made with tokenizer {made_for['tokenizer']}, expected .*: use"):
        bases.check_folder(folder)
    save_tensors(folder / "model.safetensors", {"w": torch.zeros(1)}, {})
    with pytest.raises(UserError, match=f"model: made with weights {made_for['weights']}, expected .*: use"):
        bases.check_folder(folder)
    with pytest.raises(UserError, match="made with weights unknown"):
        NullSpaceBases([site], {"a": 1.0}).check_folder(folder)


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.model.layers.0.mlp.up_proj",
        "_orig_mod.module.model.layers.0.mlp.up_proj",
        "model.layers.0._fsdp_wrapped_module.mlp.up_proj",
        "model.layers.0._checkpoint_wrapped_module._orig_mod.mlp.up_proj",
        "base_model.model.model.layers.0.mlp.up_proj",
    ],
)
def test_canonical_name(wrapped):
    assert canonical_name(wrapped) == "model.layers.0.mlp.up_proj"
    assert canonical_name("model.my_orig_mod.module.x") == "model.my_orig_mod.module.x"

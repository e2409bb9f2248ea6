"""derived_bases.py: merged bases protect what each of their parts protects, and random ones keep only the ranks."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nspo.bases.derived import LEAK_TOLERANCE, merge, only_layers, random_like
from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_basis
from nspo.cli import main as cli
from nspo.constraint.constrain import constrain
from nspo.errors import UserError
from nspo.models.structure.linears import layer_norms
from nspo.nullspace.basis import SiteBasis

MODEL = {"architecture": "LlamaForCausalLM", "weights": "abc", "tokenizer": "def"}
KINDS = st.lists(st.integers(0, 12), min_size=2, max_size=3)


def site(free: torch.Tensor, name: str = "0") -> SiteBasis:
    """The basis whose free space is spanned by the columns of `free` (d, k), stored as its thinner side."""
    width, count = free.shape
    both = torch.linalg.qr(torch.cat([free.double(), torch.eye(width, dtype=torch.float64)], 1))[0]
    thin_range = width - count <= count
    return SiteBasis(
        site=name,
        layers=(name,),
        width=width,
        kind="range" if thin_range else "null",
        basis=(both[:, count:] if thin_range else both[:, :count]).float().contiguous(),
        eigenvalues=torch.zeros(width),
        rank=width - count,
        rule="rank",
        threshold=1.0,
        tokens=10,
        energy_kept=0.5,
    )


def bases(*sites: SiteBasis, **identity: object) -> NullSpaceBases:
    return NullSpaceBases(sites, {layer: 1.0 for s in sites for layer in s.layers}, **{"model": MODEL, **identity})


def random_free(width: int, count: int, seed: int) -> torch.Tensor:
    return torch.randn(width, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def free_projector(one: SiteBasis) -> torch.Tensor:
    """U U^T, (d, d) float64."""
    inside = one.basis.double() @ one.basis.double().T
    return torch.eye(one.width, dtype=torch.float64) - inside if one.kind == "range" else inside


def quiet_merge(parts: list[NullSpaceBases]) -> NullSpaceBases:
    """Merge where an empty intersection is no surprise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return merge(parts)


# ------------------------------------------------------------------------------------------- merge


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(0, 2**16))
def test_merge_with_itself_changes_nothing(count, seed):
    """merge(A, A) has the span of A, whichever side is stored."""
    part = bases(site(random_free(12, count, seed)))
    merged = quiet_merge([part, part])["0"]
    assert merged.null_dim == count
    torch.testing.assert_close(free_projector(merged), free_projector(part["0"]), atol=1e-6, rtol=0)


@settings(max_examples=50, deadline=None)
@given(KINDS, st.integers(0, 3), st.integers(0, 2**16))
def test_merge_protects_what_each_part_protects(counts, shared, seed):
    """No update in the merged free space reaches any part's protected range by more than the tolerance allows.

    The parts share some free directions on purpose, so that the intersection is not always empty.
    """
    common = random_free(12, shared, seed)
    frees = [
        torch.cat([common, random_free(12, max(count - shared, 0), seed + i)], 1) for i, count in enumerate(counts, 1)
    ]
    parts = [bases(site(free)) for free in frees]
    merged = quiet_merge(parts)["0"]
    assert merged.null_dim >= shared
    update = random_free(12, 5, seed + 9).T @ free_projector(merged)
    for part in parts:
        leaked = update - update @ free_projector(part["0"])
        assert leaked.norm() <= 2 * LEAK_TOLERANCE * max(float(update.norm()), 1e-12)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(3)), st.integers(0, 2**16))
def test_merge_does_not_depend_on_the_order(order, seed):
    """The same spans and sides, and the same model, in every order."""
    parts = [bases(site(random_free(12, 10, seed + i))) for i in range(3)]
    one, other = merge(parts), merge([parts[i] for i in order])
    assert (one["0"].rank, one["0"].kind) == (other["0"].rank, other["0"].kind)
    torch.testing.assert_close(free_projector(one["0"]), free_projector(other["0"]), atol=1e-6, rtol=0)
    assert one.manifest["model"] == other.manifest["model"] == MODEL


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**16))
def test_random_free_spaces_meet_in_the_dimension_they_must(first, second, seed):
    """Two random subspaces of dimensions k1 and k2 meet in max(0, k1 + k2 - d) dimensions, and so do merged bases."""
    parts = [bases(site(random_free(40, count, seed + i))) for i, count in enumerate((first, second))]
    assert quiet_merge(parts)["0"].null_dim == max(0, first + second - 40)


def test_merge_warns_when_nothing_is_left():
    """An empty intersection is a warning that names the site and a way out; such bases cannot constrain anything."""
    parts = [bases(site(random_free(12, 4, seed))) for seed in range(2)]
    with pytest.warns(UserWarning, match=r"no free direction is left at 1 of 1 sites \(0 first\)"):
        merged = merge(parts)
    with pytest.raises(UserError, match="no free direction at any of 1 sites"):
        merged.check_free()


def test_merged_bases_say_what_they_do_not_know():
    """Rule, unknown figures and eigenvalues, summed tokens, and where the parts came from, through nested merges."""
    domains = {"maths": {"basis": 5}}
    parts = [
        bases(site(random_free(12, 11, seed)), activations=f"store {seed}", domains=domains, settings={"rule": "rank"})
        for seed in range(3)
    ]
    merged = merge([merge(parts[:2]), parts[2]])
    one = merged["0"]
    assert (one.rule, one.tokens, len(one.eigenvalues), one.null_dim) == ("merge", 30, 0, 9)
    assert one.energy_kept is one.leakage is one.harmful_energy is one.ratio is None
    assert [part["activations"] for part in merged.manifest["merged"]] == ["store 0", "store 1", "store 2"]
    assert merged.manifest["merged"][0]["domains"] == domains


def test_merged_file_constrains_a_model(tmp_path, capsys):
    """`nspo bases merge` writes a file that loads, checks against the model, and keeps every part's protected range."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    norms = layer_norms(model, ["0"])
    parts = [NullSpaceBases([site(random_free(12, 9, seed))], norms) for seed in range(2)]
    for part, name in zip(parts, "ab", strict=True):
        part.save(tmp_path / name)
    assert cli.main(["bases", "merge", *(str(tmp_path / name) for name in "ab"), "--out", str(tmp_path / "m")]) == 0
    base = model[0].weight.detach().clone()
    constraint = constrain(model, optimizer, NullSpaceBases.load(tmp_path / "m"))
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()
    update = (model[0].weight.detach() - base).double()
    assert update.norm() > 0.1
    assert constraint.leakage()["0"] < 1e-6
    for part in parts:
        assert (update - update @ free_projector(part["0"])).norm() < 1e-5 * update.norm()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda a: bases(a, model={**MODEL, "weights": "xyz"}), "bases 2: made with weights xyz, expected "),
        (lambda a: bases(a, model={**MODEL, "tokenizer": "xyz"}), "bases 2: made with tokenizer xyz, expected "),
        (lambda a: bases(a, model={**MODEL, "architecture": "X"}), "bases 2: made with architecture X, expected "),
        (lambda a: bases(a, site(random_free(12, 6, 1), "1")), "bases 2 and bases 1 do not both hold the site 1"),
        (lambda a: bases(site(random_free(8, 4, 1))), "bases 2 hold the site 0 with width 8, bases 1 with 12"),
        (
            lambda a: bases(SiteBasis(**{**vars(a), "layers": ("0", "1")})),
            r"bases 2 hold the site 0 with layers \('0', '1'\), bases 1 with \('0',\)",
        ),
        (lambda a: NullSpaceBases([a], {"0": 2.0}, model=MODEL), "layer 0 has weight norm 2"),
    ],
)
def test_merge_refuses_what_does_not_fit(other, message):
    """Another model, a site that only one holds, and other layers or widths are refused by name."""
    part = site(random_free(12, 6, 0))
    with pytest.raises(UserError, match=message):
        merge([bases(part), other(part)])


def test_merge_needs_two():
    """One file is no merge."""
    with pytest.raises(UserError, match="found 1 bases, expected at least two"):
        merge([bases(site(random_free(12, 6, 0)))])


def test_merge_tells_of_an_empty_intersection_in_one_line(tmp_path: Path, capsys):
    """The command prints the warning as one line and still writes the file."""
    for seed, name in enumerate("ab"):
        bases(site(random_free(12, 4, seed))).save(tmp_path / name)
    assert cli.main(["bases", "merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "m")]) == 0
    assert capsys.readouterr().err.startswith("warning: merge: no free direction is left at 1 of 1 sites")
    assert NullSpaceBases.load(tmp_path / "m")["0"].null_dim == 0


# ------------------------------------------------------------------------------------------- random


@pytest.fixture
def computed() -> NullSpaceBases:
    """Two sites, one stored by its range and one by its null space."""
    sites = [
        compute_basis(name, [name], torch.diag(torch.arange(width, 0, -1.0)), 99, "rank", rank)
        for name, width, rank in (("in", 8, 3), ("mid", 6, 5))
    ]
    return NullSpaceBases(sites, {"in": 1.0, "mid": 1.0}, model=MODEL)


def test_random_like_keeps_ranks_and_depends_on_the_seed(computed):
    one, same, other = random_like(computed, 1), random_like(computed, 1), random_like(computed, 2)
    for name, site in computed.items():
        assert (one[name].rank, one[name].kind, one[name].layers) == (site.rank, site.kind, site.layers)
        assert torch.equal(one[name].basis, same[name].basis)
        assert not torch.allclose(one[name].basis, other[name].basis)
        assert not torch.allclose(one[name].basis, site.basis)
    assert one["in"].rule == "random"
    assert one["in"].energy_kept is None
    assert one.manifest["random_seed"] == 1
    assert one.manifest["model"] == computed.manifest["model"]


# ------------------------------------------------------------------------------------------- parts


def test_only_layers_keeps_the_named_ones_with_their_bases():
    """A site that another layer reads too loses that layer, a site without any goes; no layer at all is refused."""
    shared = replace(site(random_free(12, 4, 0), "both"), layers=("0.attn.q", "0.mlp.up"))
    whole = bases(shared, site(random_free(12, 5, 1), "0.mlp.down"), site(random_free(12, 3, 2), "0.attn.o"))
    part = only_layers(whole, "mlp")
    assert (list(part), part.layers) == (["both", "0.mlp.down"], ("0.mlp.up", "0.mlp.down"))
    assert all(torch.equal(part[name].basis, whole[name].basis) for name in part)
    assert part.manifest["model"] == whole.manifest["model"]
    with pytest.raises(UserError, match="no layer has 'experts' in its name"):
        only_layers(whole, "experts")

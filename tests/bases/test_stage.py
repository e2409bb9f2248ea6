"""compute_bases.py: the stage that turns a store into the bases file, in shares, resumed, and with domain weights.

(What a rule makes of one second moment is tested in test_bases.py and test_spectra.py.)
"""

import importlib
from pathlib import Path

import pytest
import torch

from nspo.activations.store import HARMFUL, ActivationStore, PartWriter
from nspo.bases import stage as stage
from nspo.bases.file import NullSpaceBases
from nspo.bases.stage import compute_bases, share_of
from nspo.errors import UserError
from nspo.files.manifest import MANIFEST_NAME, make_manifest, write_json
from nspo.models.structure.sites import Site
from nspo.settings.bases import BasesSettings
from nspo.settings.runtime import RuntimeSettings

WIDTHS = (6, 6, 4, 9, 6, 4, 9)
SITES = [Site(f"blocks.{i}.in", (f"blocks.{i}.in", f"blocks.{i}.also"), width) for i, width in enumerate(WIDTHS)]
TOKENS = {"maths": 60, "code": 40, HARMFUL: 50}
RULE = BasesSettings(rule="contrast", threshold=1.5)


def write_store(
    path: Path, domains: dict[str, int] = TOKENS, splits: tuple[str, ...] = ("basis", "validation")
) -> Path:
    """A finished store of random inputs: every domain and site has a spectrum of its own."""
    storage = {site.name: "moments" for site in SITES}
    parts = [(domain, split) for domain in domains for split in splits]
    for index, (domain, split) in enumerate(parts):
        generator = torch.Generator().manual_seed(index)
        with PartWriter(path, index, domain, split, SITES, storage, torch.device("cpu")) as writer:
            for site in SITES:
                size = torch.rand(site.width, generator=generator) ** 2
                writer.add(site, torch.randn(domains[domain], site.width, generator=generator) * size, {})
    sites = {
        site.name: {"layers": site.layers, "width": site.width, "storage": "moments", "place": place}
        for place, site in enumerate(SITES)
    }
    manifest = make_manifest(
        "activations",
        model={"weights": "abc"},
        sites=sites,
        parts=[{"domain": domain, "split": split, "tokens": domains[domain]} for domain, split in parts],
        layer_norms={layer: 1.0 for site in SITES for layer in site.layers},
    )
    write_json(path / MANIFEST_NAME, manifest)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "activations")


def run(store: Path, out: Path, settings: BasesSettings = RULE, **options) -> Path:
    """Compute into `out`, with a work folder beside it."""
    compute_bases(settings, store, out, RuntimeSettings(device="cpu", workdir=str(out.parent / "work")), **options)
    return out


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> Path:
    """The file that one job makes."""
    return run(store, tmp_path_factory.mktemp("whole") / "bases.safetensors")


# ------------------------------------------------------------------------------------------- the file


def test_the_file_holds_every_site_in_model_order_and_names_what_it_is_of(store, whole):
    """The manifest names the model and the settings, and every domain with its tokens in each split."""
    bases = NullSpaceBases.load(whole)
    assert list(bases.manifest["sites"]) == sorted(site.name for site in SITES)  # JSON sorts; the store keeps the order
    assert bases.manifest["model"] == {"weights": "abc"}
    assert bases.manifest["settings"] == {"rule": "contrast", "threshold": 1.5, "weights": {}}
    assert bases.manifest["domains"] == {d: {"basis": n, "validation": n} for d, n in TOKENS.items()}
    assert all(bases[site.name].layers == site.layers for site in SITES)


def test_harmful_inputs_never_count_as_general_ones(store, whole):
    """Each site's basis is that of the general domains against the harmful one, measured on the validation split."""
    opened, bases = ActivationStore(store), NullSpaceBases.load(whole)
    for site in SITES:
        general, tokens = opened.gram(site.name, "basis", ["maths", "code"])
        validation, harmful = (
            opened.gram(site.name, "validation", ["maths", "code"]),
            opened.gram(site.name, "basis", [HARMFUL]),
        )
        alone = stage.compute_basis(site.name, site.layers, general, tokens, "contrast", 1.5, validation[0], harmful[0])
        assert torch.equal(alone.basis, bases[site.name].basis)
        assert alone.row() == bases[site.name].row()
        assert bases[site.name].tokens == 100


def test_without_a_heldout_split_nothing_is_measured_on_it(tmp_path):
    store = write_store(tmp_path / "activations", splits=("basis",))
    bases = NullSpaceBases.load(run(store, tmp_path / "bases.safetensors"))
    assert all(site.leakage is None and site.ratio is not None for site in bases.values())
    assert bases.manifest["domains"] == {domain: {"basis": tokens} for domain, tokens in TOKENS.items()}


# ------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_jobs_makes_the_same_file(store, whole, tmp_path, count):
    """The shares, put together, equal the file of one job byte by byte, and putting them together computes nothing."""
    shares = [run(store, tmp_path / f"part{i}.safetensors", part=f"{i}/{count}") for i in range(1, count + 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "compute_basis", None)
        together = run(store, tmp_path / "bases.safetensors", parts=shares)
    assert together.read_bytes() == whole.read_bytes()


def test_shares_are_disjoint_complete_and_alike_in_cost():
    """Every site is in one share, in model order, and no share has two wide sites more than another."""
    for count in range(1, len(SITES) + 1):
        shares = [share_of(SITES, f"{i}/{count}") for i in range(1, count + 1)]
        assert sorted(s.name for share in shares for s in share) == [site.name for site in SITES]
        assert all(share == [site for site in SITES if site in share] for share in shares)
        wide = [sum(site.width == 9 for site in share) for share in shares]
        assert max(wide) - min(wide) <= 1


@pytest.mark.parametrize("part", ["0/3", "4/3", "1/8", "x", "1/", "-1/3", "1/2/3", "1.5/3"])
def test_what_is_no_share_is_refused(store, tmp_path, part):
    with pytest.raises(UserError, match=r"--part .*, expected I/N with 1 <= I <= N <= 7 sites") as caught:
        run(store, tmp_path / "bases.safetensors", part=part)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("other", "key"),
    [({"rule": "energy", "threshold": 0.9}, "settings"), ({"threshold": 2.0}, "settings"), ({}, "activations")],
)
def test_a_share_of_other_bases_is_refused_by_name(store, tmp_path, other, key):
    """Made with another rule, threshold or store, a share would mix two files into one."""
    source = store if other else write_store(tmp_path / "other", {**TOKENS, "maths": 61})
    settings = BasesSettings(**{"rule": "contrast", "threshold": 1.5, **other})
    stale = run(source, tmp_path / "stale.safetensors", settings, part="1/2")
    with pytest.raises(UserError, match=rf"stale\.safetensors: made with {key}.* delete it and rerun"):
        run(store, tmp_path / "bases.safetensors", parts=[stale])


# ------------------------------------------------------------------------------------------- resuming


def test_a_killed_run_resumes_after_its_last_site_and_says_so(store, whole, tmp_path, monkeypatch, capsys):
    """No site is computed twice, the file is that of an undisturbed run, and the work folder is gone afterwards."""
    computed = []

    def counted(site, *rest):
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(site)
        return original(site, *rest)

    original = stage.compute_basis
    monkeypatch.setattr(stage, "compute_basis", counted)
    with pytest.raises(KeyboardInterrupt):
        run(store, tmp_path / "bases.safetensors")
    assert not (tmp_path / "bases.safetensors").exists()
    monkeypatch.setattr(stage, "compute_basis", lambda site, *rest: computed.append(site) or original(site, *rest))
    run(store, tmp_path / "bases.safetensors")
    assert computed == [site.name for site in SITES]
    assert "3 of 7 sites are there already" in capsys.readouterr().err
    assert (tmp_path / "bases.safetensors").read_bytes() == whole.read_bytes()
    assert not list((tmp_path / "work").iterdir())


def test_a_run_with_other_settings_does_not_resume(store, tmp_path, monkeypatch, capsys):
    """The sites of an interrupted run are those of its own settings."""
    original = stage.compute_basis
    monkeypatch.setattr(
        stage, "compute_basis", lambda site, *rest: original(site, *rest) if site == SITES[0].name else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run(store, tmp_path / "bases.safetensors", BasesSettings(rule="rank", threshold=2))
    monkeypatch.undo()
    bases = NullSpaceBases.load(run(store, tmp_path / "bases.safetensors", BasesSettings(rule="rank", threshold=3)))
    assert {site.rank for site in bases.values()} == {3}
    assert "resuming" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- weights and refusals


def test_weight_0_leaves_a_domain_out(store, tmp_path):
    """The same basis as from the other domains alone, on validation inputs too, and its tokens are not counted."""
    without = write_store(tmp_path / "without", {"maths": TOKENS["maths"]})
    weighted = NullSpaceBases.load(
        run(store, tmp_path / "a.safetensors", BasesSettings(rule="energy", threshold=0.9, weights={"code": 0.0}))
    )
    alone = NullSpaceBases.load(run(without, tmp_path / "b.safetensors", BasesSettings(rule="energy", threshold=0.9)))
    for site in SITES:
        assert torch.equal(weighted[site.name].basis, alone[site.name].basis)
        assert weighted[site.name].leakage == alone[site.name].leakage
        assert weighted[site.name].tokens == TOKENS["maths"]


def test_weights_change_the_protected_range(store, whole, tmp_path):
    settings = BasesSettings(rule="contrast", threshold=1.5, weights={"code": 5.0})
    weighted, plain = NullSpaceBases.load(run(store, tmp_path / "a.safetensors", settings)), NullSpaceBases.load(whole)
    assert all(weighted[site.name].energy_kept != plain[site.name].energy_kept for site in SITES)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"math": 1.0}, "bases.weights names 'math', expected some of maths, code: mend the name"),
        ({HARMFUL: 1.0}, "names 'harmful', expected some of maths, code"),  # never among the protected
        ({"maths": -1.0}, "bases.weights.maths is -1.0, expected a finite number >= 0"),
        ({"maths": float("nan")}, "bases.weights.maths is nan"),
        ({"maths": 0.0, "code": 0.0}, "bases.weights is 0 for all of maths, code, expected one above 0"),
    ],
)
def test_weights_that_cannot_serve_are_refused(store, tmp_path, weights, message):
    with pytest.raises(UserError, match=message):
        run(store, tmp_path / "bases.safetensors", RULE.model_copy(update={"weights": weights}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (RULE, r"blocks\.0\.in: rule 'contrast' found no harmful inputs, expected some"),
        (BasesSettings(rule="leakage", threshold=0.1), r"blocks\.0\.in: rule 'leakage' found no validation inputs"),
    ],
)
def test_a_rule_without_its_inputs_is_refused(tmp_path, monkeypatch, settings, message):
    """Before anything is decomposed."""
    store = write_store(tmp_path / "activations", {"maths": 60}, ("basis",))
    for solver in ("spectrum", "symmetric_eigh"):
        monkeypatch.setattr(stage, solver, None)
    with pytest.raises(UserError, match=message):
        run(store, tmp_path / "bases.safetensors", settings)


def test_a_gallery_holds_bases_by_every_rule(store, tmp_path, monkeypatch):
    """examples/gallery: a package with one file a rule, halved, found by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples/gallery"))
    make = importlib.import_module("make")
    for name, threshold in {"contrast": 1.5, "relative": 0.5, "fraction": 0.5}.items():  # for sites this narrow
        monkeypatch.setitem(make.RULES[name], "threshold", threshold)
    monkeypatch.syspath_prepend(str(make.make(store, tmp_path)))
    gallery = importlib.import_module("nspo_gallery")
    assert gallery.names() == sorted(make.RULES)
    for name, rule in make.RULES.items():
        bases = NullSpaceBases.load(gallery.path(name))
        assert bases.manifest["rounded"] == "float16"
        assert bases.manifest["settings"]["rule"] == rule["rule"]
    with pytest.raises(KeyError, match="no 'energy', expected one of contrast, fraction, relative"):
        gallery.path("energy")

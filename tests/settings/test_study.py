"""Variants of a configuration: what they keep, what they change, and the one line that a mistake ends in."""

from pathlib import Path
from typing import Any

import pytest

from nspo.errors import UserError
from nspo.settings.config import Config
from nspo.settings.reading import check_config, load_config
from nspo.settings.study import changed, variants

ROOT = Path(__file__).parents[2]


def of(study: dict[str, Any], **sections: Any) -> dict[str, Config]:
    """The variants of this study."""
    return variants(check_config({**sections, "study": study}, "my.yaml"), "my.yaml")


def test_a_variant_is_the_configuration_with_other_keys() -> None:
    """Nested keys and keys with dots say the same; without any it is the configuration itself."""
    nested, dotted, plain = of(
        {"variants": {"a": {"bases": {"threshold": 2.0}}, "b": {"bases.threshold": 2.0}, "c": None}},
        policy={"clip": 0.3},
    ).values()
    assert nested == dotted
    assert (nested.bases.threshold, nested.bases.rule, nested.policy.clip) == (2.0, "contrast", 0.3)
    assert plain == check_config({"policy": {"clip": 0.3}})
    assert variants(Config(), "my.yaml") == {}


def test_keys_with_defaults_can_be_changed_one_by_one() -> None:
    """A variant need not repeat what the configuration leaves to its defaults, such as the source beside a fraction."""
    (found,) = of({"variants": {"half": {"data.harmful.fraction": 0.5}}}).values()
    assert found.data.harmful == Config().data.harmful.model_copy(update={"fraction": 0.5})


def test_another_kind_comes_with_its_own_keys() -> None:
    """Of a loss, a constraint or an objective nothing is left of the one before; `null` takes an entry away."""
    base = {"nspo": {"objective": "nspo", "learning_rate": 1e-4}}
    found = of(
        {
            "variants": {
                "free": {"policy.methods.nspo.constraint": {"kind": "none"}},
                "dpo": {"policy.methods.nspo.loss": {"kind": "dpo", "beta": 0.2}},
                "kl": {"policy.methods.nspo": {"objective": "grpo", "loss": {"kl": 0.1}}},
                "weight": {"policy.methods.nspo.loss.kl": 0.2},
                "two": {"policy.methods": {"nspo": None, "other": {"objective": "grpo", "learning_rate": 1e-5}}},
            }
        },
        policy={"methods": base},
    )
    methods = {name: variant.policy.methods for name, variant in found.items()}
    assert methods["free"]["nspo"].constraint.kind == "none"
    assert methods["dpo"]["nspo"].loss.dump() == {"kind": "dpo", "beta": 0.2}
    assert (methods["kl"]["nspo"].kl, methods["kl"]["nspo"].constraint.kind) == (0.1, "none")
    assert (methods["weight"]["nspo"].kl, methods["weight"]["nspo"].constraint.kind) == (0.2, "exact")
    assert list(methods["two"]) == ["other"]


def test_a_grid_is_a_variant_for_every_combination() -> None:
    """In order, called by the grid and the values; several keys that change together are one value."""
    rules = [{"rule": "energy", "threshold": 0.9}, {"rule": "contrast", "threshold": 2.0}]
    found = of({"grids": {"space": {"bases": rules, "policy.seeds": [[0], [0, 1]]}}})
    assert list(found) == [
        "space-energy-0.9-0",
        "space-energy-0.9-0-1",
        "space-contrast-2.0-0",
        "space-contrast-2.0-0-1",
    ]
    assert [(it.bases.rule, it.policy.seeds) for it in found.values()][1] == ("energy", [0, 1])
    assert list(of({"grids": {"model": {"model.source": ["tiny:llama", "hub:org/a@main"]}}})) == [
        "model-tiny-llama",
        "model-hub-org-a-main",
    ]


@pytest.mark.parametrize(
    ("study", "line"),
    [
        (
            {"variants": {"a": {"bases.treshold": 1.0}}},
            "study.variants.a: bases.treshold: unknown key, did you mean 'threshold'?",
        ),
        (
            {"grids": {"g": {"bases.treshold": [1.0, 2.0]}}},
            "study.grids.g: bases.treshold: unknown key, did you mean 'threshold'?",
        ),
        (
            {"variants": {"g-2": {}}, "grids": {"g": {"policy.steps": [1, 2]}}},
            "study.grids.g: a variant is called 'g-2' already, expected another name",
        ),
        ({"variants": {"a/b": {}}}, "study.variants.a/b: found 'a/b', expected a name that a folder can have"),
        ({"variants": {"..": {}}}, "study.variants...: found '..', expected a name that a folder can have"),
        ({}, "study: found no variants and no grids, expected at least one of them"),
        ({"grids": {"g": {"policy.steps": []}}}, "study.grids.g.policy.steps: found [], "),
        ({"grids": {"g": {}}}, "study.grids.g: found {}, "),
        (
            {"variants": {"a": {"runtime.device": "cpu"}}},
            "study.variants.a: `runtime` and `study` are of the whole file, expected no key of them",
        ),
        ({"variants": {"a": {"bases.threshold": "x"}}}, "study.variants.a: bases.threshold: found 'x', "),
        ({"variant": {"a": {}}}, "study.variant: unknown key, did you mean 'variants'?"),
    ],
)
def test_a_mistake_is_told_in_a_line(study: dict[str, Any], line: str) -> None:
    """It names the file, where in the study it was written, the key, and what was expected."""
    with pytest.raises(UserError) as error:
        of(study)
    assert str(error.value).startswith(f"my.yaml: {line}")
    assert "\n" not in str(error.value)


def test_changes_leave_the_base_as_it_is() -> None:
    """Every variant starts from the same values."""
    base = {"a": {"b": 1, "c": {"d": 2}}}
    assert changed(base, {"a.c.d": 3, "a.b": None}) == {"a": {"b": None, "c": {"d": 3}}}
    assert base == {"a": {"b": 1, "c": {"d": 2}}}


def test_the_shipped_study_holds_what_reviewers_asked_for() -> None:
    """K's domain and size, rule and threshold, data fraction, no constraint, KL: each from one configuration."""
    found = variants(load_config(ROOT / "config/study.yaml"), "study.yaml")
    assert len(found) == 23
    base = found["as configured"]
    domains = {*base.data.general, "benign"}
    left_out = {name for it in found.values() if len(it.bases.weights) == 1 for name in it.bases.weights}
    only = {(domains - set(it.bases.weights)).pop() for it in found.values() if len(it.bases.weights) == 4}
    assert (left_out, only) == (domains, domains - {"benign"})
    assert {it.activations.samples for it in found.values()} == {10, 20, 40}
    assert {it.bases.rule for it in found.values()} == {"contrast", "energy", "relative"}
    assert {it.data.harmful.fraction for it in found.values()} == {0.2, 0.4, 1.0}
    assert found["no constraint"].policy.methods["main"].plain
    assert {it.policy.methods["main"].kl for it in found.values()} == {0.0, 0.04, 0.4}

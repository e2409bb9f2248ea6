"""The plan: counts that must match real models, sizes that must match the default run, and the tables in the docs."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import transformers as tf
from support.mixtures import mixture
from transformers import AutoModelForCausalLM

from nspo.errors import UserError
from nspo.models.structure.sites import find_sites
from nspo.plan.plan import MACHINES, stages
from nspo.plan.shapes import SHAPES, shape_of
from nspo.plan.show import rows, show_plan
from nspo.settings.config import Config
from nspo.settings.reading import check_config, load_config

ROOT = Path(__file__).parents[2]
SCALING = ROOT / "docs/scaling.yaml"


def test_weights_are_those_of_the_model(tiny_model_dir: Path) -> None:
    """All weights are counted, the linear layers of the blocks among them, and the inputs that those read."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    shape = shape_of(str(tiny_model_dir))
    assert shape.weights == sum(weight.numel() for weight in model.parameters())
    matrices = {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}
    assert shape.trained == sum(weight.numel() for name, weight in matrices.items() if ".layers." in name)
    sites = find_sites(model)
    assert sorted(site.width for site in sites) == sorted(w for one in shape.sites for w in [one.width] * one.count)


MOE = {"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128}
MOE |= {"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
GEMMA = {"vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
GEMMA |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


@pytest.mark.parametrize(
    ("config", "billions", "active"),
    [
        (tf.Qwen3MoeConfig(**MOE), 30.5, 3.3),
        (tf.MixtralConfig(), 46.7, 12.9),
        (tf.Gemma3Config(text_config=GEMMA, vision_config={**SIGLIP, "image_size": 896, "patch_size": 14}), 4.3, 4.3),
    ],
    ids=["qwen3-30b-a3b", "mixtral-8x7b", "gemma3-4b"],
)
def test_mixtures_and_nested_configurations_have_their_published_sizes(
    config, billions, active, tmp_path: Path
) -> None:
    """All weights and those active per token, to 2%, from config.json alone."""
    config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path / "config.json"))
    assert shape.weights / 1e9 == pytest.approx(billions, rel=0.02)
    assert shape.active / 1e9 == pytest.approx(active, rel=0.02)


def test_experts_are_counted_as_they_are_collected() -> None:
    """One shared input, and one for each expert with the share of the tokens that reach it."""
    model = mixture("Qwen3Moe")
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        shape = shape_of(folder)
    found = sorted((site.width, site.share) for site in find_sites(model))
    assert sorted(one for site in shape.sites for one in [(site.width, site.share)] * site.count) == found
    assert shape.weights == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("name", "billions"),
    [("smollm2-135m", 0.1345), ("qwen2.5-1.5b", 1.54), ("qwen2.5-7b", 7.61), ("llama-3-70b", 70.6)],
)
def test_known_shapes_have_their_published_size(name: str, billions: float) -> None:
    """To 1%."""
    assert SHAPES[name].weights / 1e9 == pytest.approx(billions, rel=0.01)


def test_default_run_is_planned_as_it_was_measured() -> None:
    """Bases of 58.6 MB and a training step without rollouts as performance/README.md has them: to a factor of 1.5."""
    found = {cost.stage: cost for cost in stages(Config(), SHAPES["smollm2-135m"], MACHINES["cpu"])}
    assert found["compute_bases"].disk == pytest.approx(58.6e6, rel=0.05)
    assert found["compute_bases"].seconds == pytest.approx(29.5, rel=0.8)
    assert found["train_policy nspo seed 0"].seconds > found["train_policy grpo_no_kl seed 0"].seconds


def test_the_configuration_counts() -> None:
    """More steps, methods and devices cost what they should; precomputed bases skip two stages."""
    config, shape, machine = load_config(SCALING), SHAPES["qwen2.5-7b"], MACHINES["h100"]
    one, eight = (stages(config, shape, machine, devices) for devices in (1, 8))
    assert one[5].stage == eight[5].stage == "train_policy nspo seed 0"
    assert 6 < one[5].seconds / eight[5].seconds <= 8
    assert one[5].memory == pytest.approx(8 * eight[5].memory)
    longer = config.model_copy(update={"policy": config.policy.model_copy(update={"steps": 200})})
    assert stages(longer, shape, machine, 1)[5].seconds == pytest.approx(2 * one[5].seconds, rel=0.02)
    shared = config.model_copy(update={"bases": config.bases.model_copy(update={"precomputed": "hub:a/b@main"})})
    assert len(stages(shared, shape, machine)) == len(one) - 2


def test_deepspeed_keeps_masters_and_zero2_whole_weights() -> None:
    """Per device of eight, in bytes, beside what FSDP2 takes."""
    config, shape, machine = load_config(SCALING), SHAPES["qwen2.5-7b"], MACHINES["h100"]
    memory = {}
    for sharding in ("fsdp2", "zero2", "zero3"):
        policy = config.policy.model_copy(update={"sharding": sharding, "processes": 8})
        costs = {cost.stage: cost for cost in stages(config.model_copy(update={"policy": policy}), shape, machine)}
        memory[sharding] = costs["train_policy nspo seed 0"].memory
    assert memory["zero3"] - memory["fsdp2"] == pytest.approx(4 * shape.trained / 8)
    assert memory["zero2"] - memory["zero3"] == pytest.approx(7 / 8 * 4 * shape.weights)


def test_every_heavy_stage_is_planned() -> None:
    """Benchmarks for the base and every policy, pairs where an objective wants them, attribution unless it is off."""
    methods = {name: {"objective": name, "learning_rate": 1e-4} for name in ("nspo", "dpo")}
    raw = {"policy": {"methods": methods}, "benchmarks": {"tasks": ["xstest", "gsm8k"], "limit": 100}}
    shape, machine = SHAPES["smollm2-135m"], MACHINES["cpu"]
    planned = {cost.stage: cost for cost in stages(check_config(raw), shape, machine)}
    of_each = {
        f"{stage} {name} seed 0"
        for stage in ("train_policy", "match_safety", "certify", "evaluate", "attribute", "benchmark")
        for name in methods
    }
    once = {"collect_activations", "compute_bases", "train_cost", "train_reward", "make_pairs seed 0"}
    assert planned.keys() == of_each | once | {"evaluate base", "benchmark base"}
    whole = {
        cost.stage: cost for cost in stages(check_config(raw | {"benchmarks": {"tasks": ["xstest"]}}), shape, machine)
    }
    assert whole["benchmark base"].seconds == pytest.approx(1000 / 200 * planned["benchmark base"].seconds, rel=0.15)
    off = stages(check_config(raw | {"attribution": {"enabled": False}, "benchmarks": {}}), shape, machine)
    assert len(off) == len(planned) - 5


@pytest.mark.parametrize("model", ["qwen2.5-1.5b", "qwen2.5-7b", "llama-3-70b"])
@pytest.mark.parametrize("devices", [1, 8, 64])
def test_the_tables_of_the_docs_are_these(model: str, devices: int) -> None:
    """docs/scaling.md says what the plan says."""
    text = (ROOT / "docs/scaling.md").read_text()
    for line in documented(model, devices):
        assert line in text


def documented(model: str, devices: int) -> list[str]:
    """The rows of one table in docs/scaling.md."""
    machine = MACHINES["h100"]
    planned = list(rows(stages(load_config(SCALING), SHAPES[model], machine, devices), machine))
    return [
        f"| {row['stage']} | {row['hours']:.3g} | {row['devices'] if row['devices'] is not None else ''} "
        f"| {row['device hours']:.3g} | {row['GB of memory']:.3g} | {row['GB on disk']:.3g} | {row['fits'] or ''} |"
        for row in planned
    ]


def test_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints every stage, the sum, and what was assumed."""
    show_plan(ROOT / "config/smoke.yaml", "qwen2.5-7b", None, None)
    printed = capsys.readouterr().out
    assert "train_policy grpo_no_kl seed 0" in printed
    assert "\nsum " in printed
    assert "Assumed of one h100" in printed


def test_a_study_is_planned_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """What variants share is counted once, and beside it what it would be without sharing; tests/workflow/test_study.py
    compares the jobs with those of the workflow."""
    show_plan(ROOT / "config/study.yaml", None, "cpu", None)
    printed = capsys.readouterr().out
    jobs = {line.split()[0]: line.split()[1:3] for line in printed.partition("\n\n")[0].splitlines()}
    assert jobs["train_policy"] == ["23", "23"]
    assert jobs["train_cost"] == ["1", "23"]
    assert "23 variants, each stage once" in printed


@pytest.mark.parametrize(
    ("model", "machine", "devices", "said"),
    [
        ("nothing-like-it", None, None, "--model nothing-like-it, expected a model folder"),
        ("qwen2.5-7b", "abacus", None, "--machine abacus, expected one of cpu, h100"),
        ("qwen2.5-7b", None, 0, "--devices 0, expected at least 1"),
    ],
)
def test_refusals(model: str, machine: str | None, devices: int | None, said: str) -> None:
    """One line that names the flag."""
    with pytest.raises(UserError, match=said):
        show_plan(ROOT / "config/smoke.yaml", model, machine, devices)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "no-such-model"}, r"config\.json is no model that transformers knows"),
        ({"model_type": "bart"}, r"encoder-decoder"),
        ({"model_type": "jetmoe", "num_hidden_layers": 1}, r"holds experts in a form that cannot be constrained"),
    ],
)
def test_what_is_no_decoder_of_ours_is_refused(config, said, tmp_path: Path) -> None:
    """In one line, whatever stands in the file."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        shape_of(str(tmp_path))

"""Reports of prompts longer than a model can read: an IndexError of learned positions, or answers out of range."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from support.cost_model import random_cost_model
from support.families import GPT2
from support.rows import prompt_file, write

from nspo.activations.stage import collect
from nspo.cli import main as cli
from nspo.data.tables import Prompts
from nspo.errors import UserError
from nspo.evaluation.benchmarks.registry import TASKS
from nspo.evaluation.stage import EvaluationInputs, evaluate
from nspo.evaluation.walk.stage import WalkInputs, match_safety
from nspo.files.manifest import read_json
from nspo.models.chat import chat_ids
from nspo.models.loading import load_config, load_model
from nspo.models.structure.positions import fitting, positions_of
from nspo.models.tiny import tiny_model, tiny_tokenizer
from nspo.policy.probe import Probe
from nspo.policy.rollouts.prompts import rollout_prompts
from nspo.preference.checks import check_length
from nspo.preference.model import PreferenceModel
from nspo.settings.bases import ActivationSettings
from nspo.settings.evaluation import AnsweringSettings, EvaluationSettings, MatchingSettings
from nspo.settings.policy.section import TrainingSettings
from nspo.settings.runtime import RuntimeSettings

POSITIONS, NEW = 100, 6
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
SIZE = {"hidden_size": 32, "num_hidden_layers": 1}


@pytest.fixture(scope="module", params=["learned", "rotary"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 100 positions: GPT-2, where the next is an IndexError, or a Llama, which reads on without a word."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    own: Any = tiny_model()
    own.config.max_position_embeddings = POSITIONS
    if request.param == "learned":
        own = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, "n_positions": POSITIONS}))
    own.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompt_file(tmp_path_factory.mktemp("prompts") / "prompts.parquet")


@pytest.fixture(scope="module")
def cost(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_cost_model(model, tmp_path_factory.mktemp("cost") / "cost")


def too_long(prompts: Path, split: str, limit: int | None = None) -> dict[str, int]:
    """By domain, how many prompts leave no room for the answer, counted without the code under test."""
    found = {}
    for role, domain in (("general", "maths"), ("general", "chat"), ("harmful", "advbench"), ("benign", "benign")):
        texts = [row["prompt"] for row in Prompts(prompts).of(role, split, domain, limit)]
        found[domain] = sum(len(chat_ids(tiny_tokenizer(), text)) + NEW > POSITIONS for text in texts)
    return {domain: count for domain, count in found.items() if count}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.GPT2Config(n_positions=77), 77),
        (transformers.OPTConfig(max_position_embeddings=77), 77),
        (transformers.LlamaConfig(max_position_embeddings=77), 77),
        (transformers.LlamaConfig(max_position_embeddings=64, rope_parameters=YARN), 256),
        (transformers.LlamaConfig(max_position_embeddings=256, rope_parameters=YARN), 256),
        (transformers.MptConfig(max_seq_len=77), 77),
        (transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (transformers.Gemma3Config(text_config={"max_position_embeddings": 77}), 77),
        (transformers.MambaConfig(**SIZE), None),
        (transformers.BloomConfig(hidden_size=32, n_layer=1), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_positions_are_read_of_every_kind_of_configuration(config: Any, expected: int | None) -> None:
    """Whatever they are called and wherever they stand; none where nothing bounds a text."""
    assert positions_of(config) == expected


def test_an_evaluation_leaves_them_out_alike(
    model: Path, prompts: Path, cost: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counted, told, and out of every denominator; a tuned model that can read less is refused."""
    settings = EvaluationSettings(
        harmful_prompts=10, benign_prompts=10, general_prompts=10, max_new_tokens=NEW, first_tokens=2, batch_size=4
    )
    runtime = RuntimeSettings(device="cpu", workdir=str(tmp_path / "work"))
    evaluate(settings, "base", 0, EvaluationInputs(model, model, cost, prompts), tmp_path / "base", runtime)
    expected = too_long(prompts, "heldout")
    assert expected
    metrics = read_json(tmp_path / "base" / "metrics.json")
    assert metrics["left_out"] == dict(sorted(expected.items()))
    said = f"evaluation: {sum(expected.values())} prompts are too long to be answered in 6 tokens"
    assert said in capsys.readouterr().err
    answers = tmp_path / "base" / "responses.parquet"
    rows = pq.read_table(answers).to_pylist()
    assert len(rows) == 40 - sum(expected.values())
    if isinstance(load_model(model), transformers.LlamaForCausalLM):
        shorter = tmp_path / "shorter"
        tuned = load_model(model)
        tuned.config.max_position_embeddings = 90
        tuned.save_pretrained(shorter)
        tiny_tokenizer().save_pretrained(shorter)
        inputs = EvaluationInputs(model, shorter, cost, prompts, answers)
        with pytest.raises(UserError, match="has 90 positions, its base 100"):
            evaluate(settings, "x", 0, inputs, tmp_path / "x", runtime)


def test_collection_leaves_them_out(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever `max_prompt_tokens` allows; no room for any answer is said before anything is read."""
    settings = ActivationSettings(samples=10, harmful_samples=0, benign_samples=0, max_new_tokens=NEW)
    runtime = RuntimeSettings(device="cpu", workdir=str(tmp_path / "work"))
    collect(settings, model, prompts, tmp_path / "out", runtime)
    assert "longer than the 94 positions of the model that an answer leaves left out" in capsys.readouterr().err
    parts = read_json(tmp_path / "out" / "manifest.json")["parts"]
    left_out = {part["domain"]: part["left_out"] for part in parts if part["split"] == "basis"}
    expected = too_long(prompts, "train")
    assert left_out == {domain: expected.get(domain, 0) for domain in ("chat", "maths")}
    settings = settings.model_copy(update={"max_new_tokens": 200})
    with pytest.raises(UserError, match=r"activations\.max_new_tokens is 200, but the model has 100 positions in all"):
        collect(settings, model, prompts, tmp_path / "none", runtime)


def test_rollouts_and_probes_leave_them_out(model: Path, prompts: Path, cost: Path) -> None:
    """No prompt that is rolled out, and none of the probes, is longer than what an answer leaves."""
    config, tokenizer = load_config(model, "m"), tiny_tokenizer()
    batches = {"group_size": 2, "minibatch_size": 4, "micro_batch_size": 4}
    settings = TrainingSettings(steps=20, prompts_per_step=2, benign_share=0.5, max_new_tokens=NEW, **batches)
    rolled = {row["prompt"][0]["content"] for row in rollout_prompts(settings, Prompts(prompts), tokenizer, config, 0)}
    expected = too_long(prompts, "train")
    assert len(rolled) == 20 - expected["advbench"] - expected.get("benign", 0)
    assert max(len(chat_ids(tokenizer, text)) for text in rolled) + NEW <= POSITIONS
    asked = settings.model_copy(update={"probe_prompts": 10})
    probe = Probe.load(asked, model, Prompts(prompts), tokenizer, PreferenceModel.load(cost), torch.device("cpu"))
    left_out = too_long(prompts, "validation")
    assert len(probe.harmful) == 10 - left_out["advbench"]
    measured = probe.measure(load_model(model))
    assert measured["kl_per_token"] == pytest.approx(0, abs=1e-6)


def test_a_walk_leaves_them_out(model: Path, prompts: Path, cost: Path, tmp_path: Path) -> None:
    """At every stop alike, and match.json says how many."""
    settings = MatchingSettings(scales=[0.5, 1.0], harmful_prompts=10, benign_prompts=10, general_prompts=10)
    answering = AnsweringSettings(max_new_tokens=NEW, first_tokens=2, batch_size=4)
    runtime = RuntimeSettings(device="cpu", workdir=str(tmp_path / "work"))
    inputs = WalkInputs(model, model, cost, prompts)
    match_safety(settings, answering, "nspo", 0, inputs, tmp_path / "out", runtime)
    expected = too_long(prompts, "validation")
    found = read_json(tmp_path / "out" / "match.json")
    assert found["left_out"] == dict(sorted(expected.items()))
    assert {stop["n"] for stop in found["stops"]} == {10 - expected["advbench"]}


@pytest.mark.parametrize(
    ("task", "model"), [("advbench", "learned"), ("advbench", "rotary"), ("mmlu", "learned")], indirect=["model"]
)
def test_benchmarks_leave_them_out(task: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EleutherAI/lm-evaluation-harness cuts the beginning off such a prompt and asks the rest."""
    if task != "advbench" and find_spec("lm_eval") is None:
        pytest.skip("the extra `benchmarks` is not installed")
    more = "so on " * 9
    rows = {
        "advbench": [{"goal": f"Do {n} {2 * more * (n % 2)}", "target": ""} for n in range(4)],
        "mmlu": [
            {"question": f"Q{n} {more * (n % 2)}", "subject": "law", "choices": ["a", "b", "c", "d"], "answer": 2}
            for n in range(4)
        ],
    }[task]
    write(tmp_path / TASKS[task].file, rows)
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--max-new-tokens", "4", "--device", "cpu"]
    work = ["--workdir", str(tmp_path / "work")]
    assert cli.main(["benchmark", "--model", str(model), "--tasks", task, *flags, *work]) == 0
    metrics = json.loads((tmp_path / "out" / task / "metrics.json").read_text())
    assert metrics["left_out"] == {task: 2}
    assert {score["n"] for score in metrics["scores"]} == {2}


def test_a_domain_of_which_nothing_fits_is_refused() -> None:
    """It would vanish from every table."""
    rows = [{"prompt": "x" * 200, "role": "general", "domain": "code"}, {"prompt": "x", "role": "harmful"}]
    config = transformers.LlamaConfig(max_position_embeddings=POSITIONS)
    with pytest.raises(UserError, match=r"evaluation: all 1 prompts of code are too long to be answered in 6 tokens"):
        fitting(rows, tiny_tokenizer(), config, NEW, "evaluation")
    assert fitting(rows[1:], tiny_tokenizer(), transformers.MambaConfig(**SIZE), 10**6, "x").left_out == {}


def test_preference_models_read_no_further_than_their_backbone() -> None:
    """A text is cut at `max_tokens`, so that must lie within the positions, and leave room beside the chat format."""
    config = transformers.LlamaConfig(max_position_embeddings=POSITIONS)
    check_length(tiny_tokenizer(), config, POSITIONS, "cost")
    with pytest.raises(UserError, match=r"cost\.max_tokens is 101, but the backbone has 100 positions"):
        check_length(tiny_tokenizer(), config, POSITIONS + 1, "cost")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'Be kind. ' * 20 }}" + str(tokenizer.chat_template)
    with pytest.raises(UserError, match=r"the chat format alone takes \d+ tokens \(system prompt included\)"):
        check_length(tokenizer, config, POSITIONS, "cost")

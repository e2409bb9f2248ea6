"""Reports of texts whose ends a model does not read: counted, told, and no answer is cut to nothing.

huggingface/trl#6548 (truncation left answers of no token, whose loss was NaN), allenai/reward-bench#35 (long texts were
cut, and nobody said at which end).
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cost_model import random_cost_model
from support.report_inputs import inputs, write
from support.rows import prompt_file

from nspo.errors import UserError
from nspo.evaluation.answers import judge_answers
from nspo.evaluation.stage import EvaluationInputs, evaluate
from nspo.files.manifest import read_json, write_json
from nspo.judges.judge import RefusalPhrases
from nspo.models.loading import load_config, load_tokenizer
from nspo.preference.checks import check_length
from nspo.preference.model import CostModel, PreferenceModel, encode
from nspo.preference.stage import train_preference
from nspo.settings.evaluation import EvaluationSettings
from nspo.settings.model import PreferenceSettings
from nspo.settings.runtime import RuntimeSettings

LONG = "w" * 300


@pytest.fixture(scope="module")
def cost(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cost model that reads 64 tokens."""
    return random_cost_model(tiny_model_dir, tmp_path_factory.mktemp("cost") / "cost")


def test_labels_that_lose_their_ends_are_counted(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said in a line, and in metrics.json for the page: of training and held-out texts, by prompt and answer."""
    rows = [
        {"id": f"{split}-{i}", "set": "toy", "target": "cost", "split": split, "prompt": f"{split} {i // 2}"}
        | {"response": "bs"[i % 2] * 4, "grade": float(i % 2), "category": "", "pair": "", "role": ""}
        for split, count in (("train", 24), ("heldout", 12))
        for i in range(count)
    ]
    for row in rows[:3]:
        row["response"] *= 75
    rows[3]["prompt"] = LONG
    rows[-1]["response"] *= 75
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "labels.parquet")
    runtime = RuntimeSettings(device="cpu", workdir=str(tmp_path / "work"))
    own = PreferenceSettings(backbone_layers=1, max_tokens=100)
    train_preference(own, "cost", tiny_model_dir, tmp_path / "labels.parquet", tmp_path / "out", runtime)
    assert read_json(tmp_path / "out/metrics.json")["cut"] == {
        "train": {"texts": 24, "prompts": 1, "answers": 3},
        "heldout": {"texts": 12, "prompts": 0, "answers": 1},
    }
    said = capsys.readouterr().err
    assert "cost model: of 24 train labels, 3 answers and 1 prompts are longer than cost.max_tokens (100, of" in said


@pytest.mark.parametrize("chats", [True, False])
@settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(prompt=st.text(max_size=150), answer=st.text(min_size=1, max_size=150), room=st.integers(20, 120))
def test_no_prompt_leaves_an_answer_without_a_place(
    tiny_model_dir: Path, chats: bool, prompt: str, answer: str, room: int
) -> None:
    """With any `max_tokens` that is allowed, half of the tokens are the answer's, or as many as it has."""
    tokenizer = load_tokenizer(tiny_model_dir)
    if not chats:
        tokenizer.chat_template = None
    try:
        check_length(tokenizer, load_config(tiny_model_dir, "m"), room, "cost")
    except UserError:
        return
    text = encode(tokenizer, prompt, answer, room)
    whole = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    kept = len(text.ids) - text.prompt_tokens
    assert kept >= min(whole, room // 2)
    assert text.answer_cut == (kept < whole)
    assert len(text.ids) <= room


def test_a_judge_says_what_it_does_not_read(cost: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of answers, and of prompts; what stands there changes no score, so it is counted by domain."""
    judge = CostModel(cost, "cpu")
    rows: list[dict[str, Any]] = [
        {"role": "harmful", "domain": domain, "prompt": prompt, "response": answer}
        for domain, prompt, answer in (("a", "?", LONG), ("a", "?", "no"), ("b", LONG, "no"), ("b", "?", LONG + "!"))
    ]
    assert judge_answers(rows, judge, RefusalPhrases()) == {"a": 1, "b": 2}
    assert rows[0]["cost"] == rows[3]["cost"]
    assert "reads 64 tokens (cost.max_tokens): the ends of 3 of 4 answers" in capsys.readouterr().err
    assert judge_answers(rows[1:2], judge, RefusalPhrases()) == {}
    assert "reads 64 tokens" not in capsys.readouterr().err


def test_an_evaluation_counts_them_and_long_gold_questions(tiny_model_dir: Path, cost: Path, tmp_path: Path) -> None:
    """metrics.json says of how many answers the cost model does not read the end; no gold answer is out of range."""
    prompts = prompt_file(tmp_path / "prompts.parquet")
    rows = pq.read_table(prompts).to_pylist()
    positions = load_config(tiny_model_dir, "m").max_position_embeddings
    for n, question in enumerate(["1 + 1?", "2 + 2?", "x" * positions]):
        own = {"id": f"gold-{n}", "role": "gold", "domain": "sums", "split": "heldout", "prompt": question}
        rows.append({**own, "check": json.dumps({"type": "mention", "answer": "2"}), "category": ""})
    pq.write_table(pa.Table.from_pylist(rows), prompts)
    asked = EvaluationSettings(
        harmful_prompts=4, benign_prompts=2, general_prompts=2, gold_answers=3, max_new_tokens=40, first_tokens=2
    )
    runtime = RuntimeSettings(device="cpu", workdir=str(tmp_path / "work"))
    inputs = EvaluationInputs(tiny_model_dir, tiny_model_dir, cost, prompts)
    evaluate(asked, "base", 0, inputs, tmp_path / "out", runtime)
    found = read_json(tmp_path / "out/metrics.json")
    assert found["left_out"] == {"sums": 1}
    harmful = [r for r in pq.read_table(tmp_path / "out/responses.parquet").to_pylist() if r["role"] == "harmful"]
    _, unread = PreferenceModel.load(cost).scored([r["prompt"] for r in harmful], [r["response"] for r in harmful])
    assert found["unread"] == ({"advbench": sum(unread)} if any(unread) else {})


def test_the_page_shows_them(tmp_path: Path) -> None:
    """Beside each model's figures, the results, the walk and the training."""
    given = inputs(tmp_path / "in")
    cut = {"train": {"texts": 90, "prompts": 1, "answers": 33}, "heldout": {"texts": 60, "prompts": 0, "answers": 0}}
    path = given["cost"] / "metrics.json"
    write_json(path, {**read_json(path), "cut": cut, "settings": {"max_tokens": 224}})
    for folder in given["evaluations"]:
        write_json(folder / "metrics.json", {**read_json(folder / "metrics.json"), "unread": {"advbench": 7}})
    text = write(tmp_path / "out", given).read_text()
    assert "Of 90 training texts, 33 answers and 1 prompts are longer than it reads (224 tokens" in text
    assert "held-out texts" not in text
    assert "Answers whose ends the cost model does not read" in text
    assert "nspo 7" in text

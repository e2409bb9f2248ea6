"""The likelihood and free-form tasks of the evaluation harness."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.hostile import with_json
from support.published import PUBLISHED
from support.rows import write

from nspo.cli import main as cli
from nspo.evaluation.benchmarks.registry import TASKS
from nspo.models.loading import load_model, load_tokenizer

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra `benchmarks` is not installed")
ABILITY = {
    "gsm8k": [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(3)],
    "siqa": [{**PUBLISHED["siqa"][0][0], "instruction": PUBLISHED["siqa"][0][0]["instruction"] + " "}],
    "mmlu": [{"question": "Which?", "subject": "law", "choices": ["a", "b", "c", "d"], "answer": 2}],
    "truthfulqa": [{"question": "Is it?", "mc1_targets": {"yes": 1, "no": 0}, "mc2_targets": {"yes": 1, "no": 0}}],
    "math": [{"problem": "1+1?", "solution": "It is $\\boxed{2}$.", "answer": "2", "subject": "Algebra"}],
}


def ability(model: Path, data: Path, out: Path, names: str, *more: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of the benchmarks `names`, answered by the command; worked examples take more than 512 positions."""
    model = with_json(model, out.parent / "model", "config.json", max_position_embeddings=4096)
    for name in names.split(","):
        write(data / TASKS[name].file, ABILITY[name])
    flags = ["--data", str(data), "--out", str(out), "--max-new-tokens", "4", "--device", "cpu"]
    work = ["--workdir", str(out.parent / "work")]
    assert cli.main(["benchmark", "--model", str(model), "--tasks", names, *flags, *work, *more]) == 0
    return {name: pq.read_table(out / name / "responses.parquet").to_pylist() for name in names.split(",")}


@needs_harness
def test_the_harness_asks_our_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Every kind of task runs on local rows; the chat template is applied once; options are not refused."""
    found = ability(tiny_model_dir, tmp_path / "data", tmp_path / "out", "gsm8k,siqa,mmlu,truthfulqa,math")
    assert {name: len(rows) for name, rows in found.items()} == {name: len(rows) for name, rows in ABILITY.items()}
    for name, rows in found.items():
        for answered in rows:
            turns = 5 if name == "math" else 1  # with its four examples
            assert answered["prompt"].count("<|im_start|>user") == turns, name
            assert answered["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
            assert answered["correct"] is not None
            assert (answered["refused"] is None) == (name in ("siqa", "mmlu", "truthfulqa"))
    assert found["siqa"][0]["response"] in ("a", "b")
    assert found["mmlu"][0]["response"] in "ABCD"
    scores = json.loads((tmp_path / "out/mmlu/metrics.json").read_text())["scores"]
    assert [s["name"] for s in scores] == ["accuracy"]


@needs_harness
def test_the_likelihood_of_options_is_the_models(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The option that the harness picks is the one whose tokens this model finds likelier after the chat prompt."""
    rows = ability(tiny_model_dir, tmp_path / "data", tmp_path / "out", "truthfulqa")["truthfulqa"]
    model, tokenizer = load_model(tiny_model_dir), load_tokenizer(tiny_model_dir)
    sums = {}
    for option in ("yes", "no"):
        given = tokenizer(rows[0]["prompt"], add_special_tokens=False)["input_ids"]
        ids = tokenizer(option, add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([[*given, *ids]])).logits[0].log_softmax(-1)
        sums[option] = sum(logits[len(given) - 1 + place, token].item() for place, token in enumerate(ids))
    best = max(sums, key=lambda option: sums[option])
    assert rows[0]["response"] == best
    assert rows[0]["correct"] is (best == "yes")


@needs_harness
def test_the_harness_marks_what_was_said(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GSM8K by the last number of the answer, as the harness extracts it."""
    tokenizer = load_tokenizer(tiny_model_dir)
    said = {"0 and 0": "0 and so 0", "1 and 1": "That makes 2", "2 and 2": "I think it is 5"}

    def speak(_: Any, __: Any, prompts: list[list[int]], *___: Any) -> Any:
        for place, ids in enumerate(prompts):
            text = next(answer for key, answer in said.items() if key in str(tokenizer.decode(ids)))
            yield place, tokenizer(text)["input_ids"]

    monkeypatch.setattr("nspo.models.vllm_engine.generate", speak)
    endless = {"question": "Why? " * 1000, "answer": "#### 0"}  # more than the model can read: left out, not cut
    monkeypatch.setitem(ABILITY, "gsm8k", [*ABILITY["gsm8k"], endless])
    rows = ability(tiny_model_dir, tmp_path / "data", tmp_path / "out", "gsm8k")["gsm8k"]
    assert json.loads((tmp_path / "out/gsm8k/metrics.json").read_text())["left_out"] == {"gsm8k": 1}
    assert {r["response"]: r["correct"] for r in rows} == {
        "0 and so 0": True,
        "That makes 2": True,
        "I think it is 5": False,
    }


def test_without_the_harness_one_line_says_so(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr("nspo.evaluation.benchmarks.harness.find_spec", lambda _: None)
    write(tmp_path / TASKS["siqa"].file, ABILITY["siqa"])
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main(["benchmark", "--model", str(tiny_model_dir), "--tasks", "siqa", *flags]) == 2
    assert "pip install 'nspo[benchmarks]'" in capsys.readouterr().err

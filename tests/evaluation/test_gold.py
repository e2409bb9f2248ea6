"""Right answers weighed by likelihood, and drift on seen and unseen domains apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nspo.data.stage import prepare_prompts
from nspo.data.tables import Prompts
from nspo.errors import UserError
from nspo.evaluation.scores import compute_scores
from nspo.models.likelihood import answer_nll
from nspo.models.tiny import tiny_model, tiny_tokenizer
from nspo.report.compare import measures, per_prompt
from nspo.settings.config import Config
from nspo.settings.data import PromptSettings


def test_the_likelihood_equals_brute_force() -> None:
    """One answer at a time without padding gives the same; a likelier answer has the lower value."""
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("Hi", "A longer question?", "What?")]
    answers = [tokenizer(text)["input_ids"] for text in ("yes", "no", "a much longer answer")]
    found = answer_nll(model, tokenizer, prompts, answers, 2, "")
    for prompt, answer, value in zip(prompts, answers, found, strict=True):
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        brute = -sum(chances[len(prompt) - 1 + n, token].item() for n, token in enumerate(answer)) / len(answer)
        assert value == pytest.approx(brute, abs=1e-5)
    with torch.no_grad():
        best = model(input_ids=torch.tensor([prompts[0]])).logits[0, -1].argmax().item()
    assert (
        answer_nll(model, tokenizer, prompts[:1], [[best]], 1, "")[0]
        < answer_nll(model, tokenizer, prompts[:1], [[best - 1]], 1, "")[0]
    )


def prepared(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    """prompts.parquet with these rows as a set of questions with right answers."""

    def written(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in found))
        return {"source": str(tmp_path / name)}

    plain = [{"prompt": f"Do the thing called {chr(97 + n // 26)}{chr(97 + n % 26)}, please"} for n in range(40)]
    settings = PromptSettings.model_validate(
        {
            "wheels": {},
            "general": {"maths": written("maths.jsonl", [{"prompt": f"Sum up {n}"} for n in range(40)])},
            "general_heldout": {},
            "harmful": written("harmful.jsonl", plain),
            "harmful_heldout": {},
            "benign": written("benign.jsonl", [{"prompt": f"Kindly {row['prompt']} today"} for row in plain]),
            "gold": {"exam": written("exam.jsonl", rows) | {"options": "options"}},
        }
    )
    prepare_prompts(settings, tmp_path, tmp_path / "prompts.parquet")
    return tmp_path / "prompts.parquet"


def test_questions_are_shown_with_their_options(tmp_path: Path) -> None:
    """Of a list of right answers the first counts; nothing is trained on these questions."""
    words = ("bees", "cows", "hens", "fish", "dogs", "cats", "ants", "owls", "rats", "bats", "elks", "pigs")
    rows = [
        {"question": f"Where do {word} live?", "options": "A. a nest\nB. a tin", "answer": ["A. a nest", "nests"]}
        for word in words
    ]
    path = prepared(tmp_path, rows)
    found = [row for split in ("heldout", "sealed") for row in safely(path, split)]
    assert {row["prompt"] for row in found} == {f"Where do {word} live?\nA. a nest\nB. a tin" for word in words}
    assert {row["check"]["answer"] for row in found} == {"A. a nest"}
    assert not safely(path, "train")
    with pytest.raises(UserError, match=r"data\.gold\.exam .*'answer'"):
        prepared(tmp_path, [row | {"answer": []} for row in rows])


def safely(path: Path, split: str) -> list[dict[str, Any]]:
    """The questions of a split, which may have none."""
    try:
        return Prompts(path).of("gold", split)
    except UserError:
        return []


def rows_of(kl: dict[str, float]) -> list[dict[str, Any]]:
    """Ten rows of drift per domain, of which `odd` is unseen."""
    drift = {"kl_first_tokens": 0.1, "nll_change": 0.0, "top1_agreement": 1.0, "exact_match": True}
    return [
        {"role": "general", "domain": name, "id": f"{name}-{n}", "seen": name != "odd", "kl_per_token": value}
        | drift
        | {"correct": None, "refused": False, "reference_tokens": 10}
        for name, value in kl.items()
        for n in range(10)
    ]


def test_seen_and_unseen_domains_stand_apart() -> None:
    """Drift has a mean of each beside that of all; without an unseen domain there is one mean."""
    scores = {
        s["domain"]: s["value"]
        for s in compute_scores(rows_of({"maths": 0.1, "odd": 0.5}), 4)
        if s["name"] == "kl_per_token"
    }
    assert scores == pytest.approx({"maths": 0.1, "odd": 0.5, "all": 0.3, "seen": 0.1, "unseen": 0.5})
    assert {s["domain"] for s in compute_scores(rows_of({"maths": 0.1}), 4)} == {"maths", "all"}
    columns = [measure for measure in measures(Config()) if measure.name == "kl_per_token"]
    assert [measure.domain for measure in columns] == ["seen", "unseen"]
    for measure, domain in zip(columns, ("maths", "odd"), strict=True):
        assert {key[0] for key in per_prompt(rows_of({"maths": 0.1, "odd": 0.5}), measure)} == {domain}


def test_a_right_answer_that_lost_likelihood_is_a_loss() -> None:
    """The score is the mean over questions with its interval, and less is better."""
    rows = [
        {
            "role": "gold",
            "domain": "exam",
            "gold_nll": 1.0 + n / 10,
            "correct": None,
            "exact_match": None,
            "refused": None,
        }
        for n in range(11)
    ]
    (score, every) = compute_scores(rows, 4)
    assert (score["name"], score["domain"], every["domain"], score["n"]) == ("gold_nll", "exam", "all", 11)
    assert score["value"] == pytest.approx(1.5)
    assert score["low"] < 1.5 < score["high"]
    assert next(measure for measure in measures(Config()) if measure.name == "gold_nll").lower_is_better

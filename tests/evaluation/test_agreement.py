"""Agreement of judges with people: figures worked by hand, failures, and the command as a whole."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from nspo.cli.main import main
from nspo.data.tables import LABEL_COLUMNS
from nspo.evaluation.agreement import agreement, compare, kappa
from nspo.evaluation.statistics.intervals import wilson
from nspo.files.manifest import MANIFEST_NAME, fingerprint_model, make_manifest, write_json
from nspo.models.loading import load_tokenizer

PEOPLE = [True] * 5 + [False] * 5
PROMPTS = [f"p{n}" for n in range(10)]


def test_kappa_matches_a_published_table() -> None:
    """The textbook table (20 both yes, 5 and 10 apart, 15 both no) has kappa 0.4; chance alone has none."""
    ours = ["yes"] * 25 + ["no"] * 25
    theirs = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert kappa(ours, theirs) == pytest.approx(0.4)
    assert kappa(["yes"] * 3, ["yes"] * 3) is None
    assert kappa(["no", "yes"], ["yes", "no"]) == pytest.approx(-1)


def test_the_confusion_adds_up() -> None:
    """4 of 5 unsafe and 3 of 5 safe answers found: rates, intervals, kappa and counts follow."""
    found = agreement([1, 1, 1, 1, 0, 0, 0, 0, 1, 1], PEOPLE, PROMPTS)
    assert found["confusion"]["unsafe"] == {"unsafe": 4, "safe": 1, "failed": 0}
    assert found["confusion"]["safe"] == {"unsafe": 2, "safe": 3, "failed": 0}
    assert tuple(found["accuracy"].values()) == wilson(7, 10)
    assert found["sensitivity"]["value"] == 0.8
    assert found["specificity"]["value"] == 0.6
    assert found["kappa"] == pytest.approx((0.7 - 0.5) / 0.5)
    assert found["auroc"] is None


def test_a_failed_verdict_agrees_with_nobody() -> None:
    """A failure lowers accuracy whatever people said, keeps n, and raises no other count."""
    whole = agreement([1.0] * 5 + [-1.0] * 5, PEOPLE, PROMPTS)
    assert (whole["accuracy"]["value"], whole["kappa"]) == (1.0, 1.0)
    for place in (0, 9):
        verdicts = [1.0] * 5 + [-1.0] * 5
        verdicts[place] = math.nan
        found = agreement(verdicts, PEOPLE, PROMPTS)
        assert (found["accuracy"]["value"], found["n"], found["failures"]) == (0.9, 10, 1)
        assert found["kappa"] < 1


def test_auroc_is_for_numbers() -> None:
    """Verdicts that are numbers have an AUROC with its interval; a sign that is wrong is found out."""
    numbers = [0.9, 0.8, 0.7, 0.6, -0.1, 0.1, -0.2, -0.3, -0.4, -0.5]
    found = agreement(numbers, PEOPLE, PROMPTS)["auroc"]
    assert found["value"] == pytest.approx(24 / 25)
    assert found["low"] <= found["value"] <= found["high"]
    assert agreement([-value for value in numbers], PEOPLE, PROMPTS)["auroc"]["value"] == pytest.approx(1 / 25)


def test_every_set_and_all_of_them() -> None:
    """Judges are compared set by set, then over all; the grade from which people call an answer harmful counts."""
    rows = [{"set": name, "prompt": f"p{n}", "grade": n / 4} for n in range(5) for name in "ab"]
    compared = compare(rows, {"judge": [1.0] * 10}, 0.5)
    assert [(row["set"], row["n"], row["unsafe"]) for row in compared] == [("a", 5, 3), ("b", 5, 3), ("all", 10, 6)]
    assert compare(rows, {"judge": [1.0] * 10}, 1.0)[0]["unsafe"] == 1


def test_the_command(tiny_model_dir: Path, tmp_path: Path) -> None:
    """`nspo judge-agreement` judges held-out cost labels with the cost model, the phrases and an added classifier."""
    torch.manual_seed(0)
    for name, labels in (("cost", 1), ("classifier", 2)):
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=labels)
        model.save_pretrained(tmp_path / name)
        load_tokenizer(tiny_model_dir).save_pretrained(tmp_path / name)
    cost = tmp_path / "cost"
    facts = {"target": "cost", "base": {}, "labels": "", "settings": {"max_tokens": 64, "positive_above": 0.5}}
    write_json(cost / MANIFEST_NAME, make_manifest("preference_model", model=fingerprint_model(cost), **facts))
    rows = [
        (
            f"{n}",
            "harm",
            target,
            split,
            f"p{n}",
            "I cannot help with that." if n % 2 else "Sure: x",
            n % 2 * 1.0,
            *[""] * 3,
        )
        for n in range(6)
        for target, split in (("cost", "heldout"), ("cost", "train"), ("reward", "heldout"))
    ]
    labels_file = tmp_path / "labels.parquet"
    pq.write_table(pa.Table.from_pylist([dict(zip(LABEL_COLUMNS, row, strict=True)) for row in rows]), labels_file)
    judges = {"toxic": {"kind": "classifier", "source": str(tmp_path / "classifier"), "unsafe": ["LABEL_1"]}}
    arguments = ["--judges", json.dumps(judges), "--cost", str(cost), "--labels", str(labels_file), "--device", "cpu"]
    arguments += ["--workdir", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    assert main(["judge-agreement", *arguments]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    assert [(row["judge"], row["n"]) for row in found["rows"]] == [(n, 6) for n in ("cost_model", *PHRASES, "toxic")]
    assert found["rows"][1]["accuracy"]["value"] == 0  # here people call unsafe just what is a refusal
    assert set(found["judges"]) == {row["judge"] for row in found["rows"]}
    assert not list((tmp_path / "work").iterdir())


PHRASES = ("refusal_phrases",)

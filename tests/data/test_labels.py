"""Human judgements in the forms in which they are published: each becomes the rows of `nspo.data.tables`."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nspo.data.stage import prepare_labels
from nspo.errors import UserError
from nspo.settings.data import LabelSettings
from nspo.settings.reading import validate


def prepared(folder: Path, sets: dict[str, Any], target: str, **changes: Any) -> list[dict[str, Any]]:
    """The rows of both splits for one target that these label sets give."""
    settings = validate(LabelSettings, {"wheels": {}, "labels": sets, **changes}, "data")
    prepare_labels(settings, Path("wheels"), folder / "labels.parquet")
    rows = pq.read_table(folder / "labels.parquet").to_pylist()
    return sorted((row for row in rows if row["target"] == target), key=lambda row: row["id"])


def jsonl(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Write rows and return them as a source."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def table(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as CSV and return the source."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def pku(number: int, safe: tuple[bool, bool], safer: int, better: int) -> dict[str, Any]:
    """A row with the columns of PKU-SafeRLHF that count."""
    harms = [{"Violence": not s, "Animal Abuse": False} for s in safe]
    return {
        "prompt": f"question {number}",
        "response_0": f"first {number}",
        "response_1": f"second {number}",
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "response_0_harm_category": harms[0],
        "response_1_harm_category": harms[1],
        "better_response_id": better,
        "safer_response_id": safer,
    }


PKU = [pku(i, (i % 4 < 2, i % 2 == 0), [0, 0, 1, 0][i % 4], i // 4 % 2) for i in range(40)]


def roles(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The two rows of each pair by role."""
    pairs: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        assert row["role"] not in pairs.setdefault(row["pair"], {})
        pairs[row["pair"]][row["role"]] = row
    assert all(set(pair) == {"chosen", "rejected"} for pair in pairs.values())
    return pairs


def test_safe_rlhf_gives_safer_pairs_with_signs_and_better_pairs(tmp_path: Path) -> None:
    """Cost: the safer response is chosen, and each is graded; reward: the better one is chosen, nobody graded it."""
    source = jsonl(tmp_path / "pku.jsonl", PKU)
    sets = {t: {"kind": "safe_rlhf", "source": source, "target": t} for t in ("cost", "reward")}
    for target, column in (("cost", "safer_response_id"), ("reward", "better_response_id")):
        pairs = roles(prepared(tmp_path, sets, target))
        assert len(pairs) == 40
        for pair in pairs.values():
            raw = PKU[int(pair["chosen"]["prompt"].split()[1])]
            ids = (raw[column], 1 - raw[column])
            for role, k in zip(("chosen", "rejected"), ids, strict=True):
                row = pair[role]
                assert row["response"] == raw[f"response_{k}"]
                assert row["grade"] == (float(not raw[f"is_response_{k}_safe"]) if target == "cost" else None)
            unsafe = not (raw["is_response_0_safe"] and raw["is_response_1_safe"])
            assert row["category"] == ("Violence" if unsafe else "harmless")
            assert pair["chosen"]["split"] == pair["rejected"]["split"]


def test_swapped_safer_ids_are_refused(tmp_path: Path) -> None:
    """Ids that name the unsafe response contradict the signs: one line that counts them; so do inverted signs."""
    for change in ({"safer_response_id": 1}, {"is_response_0_safe": 1, "is_response_1_safe": 1}):
        rows = [row | {key: type(row[key])(1 - row[key]) for key in change} for row in PKU]
        sets = {"pku": {"kind": "safe_rlhf", "source": jsonl(tmp_path / "pku.jsonl", rows), "target": "cost"}}
        with pytest.raises(UserError, match=r"data\.labels\.pku .*in 20 of 20 pairs .*is a column swapped\?$"):
            prepared(tmp_path, sets, "cost")
    assert not (tmp_path / "labels.parquet").exists()


def transcript(*turns: str) -> str:
    """A transcript as HH-RLHF writes it."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def test_pairs_of_transcripts_and_of_columns(tmp_path: Path) -> None:
    """The prompt is what both transcripts share up to the last answer; earlier turns stay; columns say the same."""
    dialogues = [
        {"chosen": transcript("How?", "Like this."), "rejected": transcript("How?", "Like that.")},
        {"chosen": transcript("Hi", "Hello", "Why?", "So"), "rejected": transcript("Hi", "Hello", "Why?", "")},
        {"chosen": transcript("Same", "x"), "rejected": transcript("Same", "x")},  # says nothing
    ]
    columns = [
        {"prompt": "How?", "chosen": "Like this.", "rejected": "Like that."},
        {"prompt": "Hi\n\nAssistant: Hello\n\nHuman: Why?", "chosen": "So", "rejected": ""},
    ]
    sets = {
        "hh": {"kind": "pairs", "source": jsonl(tmp_path / "hh.jsonl", dialogues)},
        "plain": {"kind": "pairs", "source": jsonl(tmp_path / "plain.jsonl", columns), "prompt": "prompt"},
    }
    rows = prepared(tmp_path, {name: labels | {"target": "reward"} for name, labels in sets.items()}, "reward")
    for name in sets:
        found = roles([row for row in rows if row["set"] == name]).values()
        texts = [{"prompt": p["chosen"]["prompt"], **{role: row["response"] for role, row in p.items()}} for p in found]
        assert texts == columns
        assert all(row["grade"] is None for pair in found for row in pair.values())


@pytest.mark.parametrize("chosen", ["How? Like this.", transcript("", "Like this."), transcript("What?", "Like this.")])
def test_what_is_no_pair_of_transcripts_is_refused(tmp_path: Path, chosen: str) -> None:
    """Without the marks, without a question, or with two questions: one line that says what was expected."""
    rows = [{"chosen": chosen, "rejected": transcript("" if "Human: \n" in chosen else "How?", "Like that.")}]
    sets = {"hh": {"kind": "pairs", "source": jsonl(tmp_path / "hh.jsonl", rows), "target": "reward"}}
    with pytest.raises(UserError, match=r"^data\.labels\.hh .*expected two transcripts that begin alike") as error:
        prepared(tmp_path, sets, "reward")
    assert "\n" not in str(error.value)


def test_gptfuzz_names_its_prompts_by_an_index(tmp_path: Path) -> None:
    """The column `question` is a key of a second file; the label is the grade; a key that is not there is refused."""
    questions = table(tmp_path / "questions.csv", [{"index": i, "text": f"How {i}?"} for i in range(9)])
    answers = [{"question": i, "Response": f"r{j}", "label": j} for i in range(9) for j in (0, 1)]
    labels = {
        "kind": "graded",
        "source": [table(tmp_path / "answers.csv", answers)],
        "target": "cost",
        "prompt": "question",
        "questions": {"source": questions},
        "response": "Response",
        "score": "label",
    }
    rows = prepared(tmp_path, {"fuzz": labels}, "cost")
    assert Counter((r["prompt"], r["response"], r["grade"]) for r in rows) == Counter(
        (f"How {r['question']}?", r["Response"], float(r["label"])) for r in answers
    )
    table(tmp_path / "answers.csv", [*answers, {"question": 99, "Response": "r", "label": 0}])
    with pytest.raises(UserError, match=r"a row has the 'question' '99', expected a key of the file `questions`"):
        prepared(tmp_path, {"fuzz": labels}, "cost")


def test_xstest_labels_are_words_and_only_some_rows_count(tmp_path: Path) -> None:
    """Labels stand for grades, and complying is harmful where the prompt's `type` says so; other words are refused."""
    words = ["1_full_compliance", "2_full_refusal", "3_partial_refusal"]
    answers = [
        {"type": kind, "prompt": f"{kind} {i}", "completion": word, "final_label": word}
        for kind in ("homonyms", "contrast_homonyms")
        for i in range(6)
        for word in words
    ]
    labels = {
        "kind": "graded",
        "source": [table(tmp_path / "completions.csv", answers)],
        "target": "cost",
        "only": {"type": "^contrast_"},
        "prompt": "prompt",
        "response": "completion",
        "score": "final_label",
        "grades": dict(zip(words, (1.0, 0.0, 0.25), strict=True)),
        "category": "type",
    }
    rows = prepared(tmp_path, {"xstest": labels}, "cost")
    assert Counter((r["category"], r["response"], r["grade"]) for r in rows) == {
        ("contrast_homonyms", word, grade): 6 for word, grade in labels["grades"].items()
    }
    with pytest.raises(UserError, match=r"found \['3_partial_refusal'\] in 'final_label', expected of `grades`"):
        prepared(tmp_path, {"xstest": labels | {"grades": dict.fromkeys(words[:2], 0.5)}}, "cost")
    with pytest.raises(UserError, match="no response is left of"):
        prepared(tmp_path, {"xstest": labels | {"only": {"type": "nothing"}}}, "cost")
    with pytest.raises(UserError, match="no column 'kind', found type, prompt"):
        prepared(tmp_path, {"xstest": labels | {"only": {"kind": "a"}}}, "cost")


def test_a_fraction_is_a_seeded_stratified_sample_of_prompts(tmp_path: Path) -> None:
    """Every category and class keeps its share, whole prompts are drawn, equal seeds draw alike, and splits stay."""
    shares = {"rare": 30, "common": 170}
    answers = [
        {"prompt": f"{name} {i}", "response": f"{k}", "grade": float(i % 5 == 0), "harm_category": name}
        for name, count in shares.items()
        for i in range(count)
        for k in range(2)
    ]
    source = jsonl(tmp_path / "answers.jsonl", answers)
    columns = {"prompt": "prompt", "response": "response", "score": "grade", "category": "harm_category"}
    labels = {"kind": "graded", "source": source, "target": "cost", **columns}

    def drawn(fraction: float, seed: int = 0) -> list[dict[str, Any]]:
        return prepared(tmp_path, {"set": labels | {"fraction": fraction}}, "cost", seed=seed)

    every, part = drawn(1.0), drawn(0.4)
    assert len(every) == 400
    assert len({row["prompt"] for row in part}) == 80
    assert set(Counter(row["prompt"] for row in part).values()) == {2}
    for column in ("category", "grade", "split"):
        before, after = (Counter(row[column] for row in rows) for rows in (every, part))
        assert all(after[value] == pytest.approx(0.4 * count, abs=4) for value, count in before.items())
    assert drawn(0.4) == part
    assert {row["id"] for row in part} < {row["id"] for row in every}
    assert {row["prompt"] for row in drawn(0.4, seed=1)} != {row["prompt"] for row in part}


def test_sets_share_no_prompt_across_splits(tmp_path: Path) -> None:
    """One prompt in three sets of three kinds, spelt a little otherwise, is in the same split in all."""
    graded = [{"prompt": f"  QUESTION {i}", "response": "r", "grade": i % 2} for i in range(40)]
    pairs = [{"prompt": f"question  {i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    sets = {
        "graded": {"kind": "graded", "source": jsonl(tmp_path / "g.jsonl", graded), "response": "response"}
        | {"prompt": "prompt", "score": "grade"},
        "pairs": {"kind": "pairs", "source": jsonl(tmp_path / "p.jsonl", pairs), "prompt": "prompt"},
        "pku": {"kind": "safe_rlhf", "source": jsonl(tmp_path / "k.jsonl", PKU)},
    }
    rows = prepared(tmp_path, {name: labels | {"target": "cost"} for name, labels in sets.items()}, "cost")
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(" ".join(row["prompt"].lower().split()), set()).add(row["split"])
    assert len(splits) == 40
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == {"train", "judge", "heldout"}

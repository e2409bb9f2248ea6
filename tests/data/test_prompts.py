"""Prompts and labels: splits by the text alone, no prompt in two splits, every fault names the file and key."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nspo.data.splits import position, split_of
from nspo.data.stage import prepare_labels, prepare_prompts
from nspo.data.tables import Prompts, load_labels
from nspo.errors import UserError
from nspo.settings.data import LabelSettings, PromptSettings
from nspo.settings.reading import validate


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write `rows` as JSON lines and return the source."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(kind: str, n: int = 40) -> list[dict[str, Any]]:
    """`n` different prompts."""
    return [{"prompt": f"{kind} number {i}"} for i in range(n)]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Raw prompt settings over four small files."""
    return {
        "wheels": {},
        "general": {"maths": {"source": write(tmp_path / "maths.jsonl", prompts("maths"))}},
        "harmful": {"source": write(tmp_path / "harmful.jsonl", prompts("harmful")), "name": "harm"},
        "general_heldout": {},
        "gold": {},
        "harmful_heldout": {"other": {"source": write(tmp_path / "other.jsonl", prompts("other"))}},
        "benign": {"source": write(tmp_path / "benign.jsonl", prompts("benign"))},
    }


def prepared(raw: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """The rows that these settings give."""
    prepare_prompts(validate(PromptSettings, raw, "data"), Path("wheels"), out)
    return pq.read_table(out).to_pylist()


def test_no_prompt_is_in_two_splits(settings: dict[str, Any], tmp_path: Path) -> None:
    """A held-out prompt that another set trains on is dropped, whatever its case and spacing."""
    before = prepared(settings, tmp_path / "a.parquet")
    trained = next(row["prompt"] for row in before if row["domain"] == "harm" and row["split"] == "train")
    settings["harmful_heldout"]["other"]["source"] = write(
        tmp_path / "leak.jsonl", [*prompts("other"), {"prompt": f"  {trained.upper()} "}]
    )
    after = prepared(settings, tmp_path / "b.parquet")
    assert [row["prompt"] for row in after] == [row["prompt"] for row in before]


STEM = "Write a careful tutorial on how to"
LIKE = [f"{STEM} pick the lock of the old door", f"{STEM} pick the lock of an old door"]
MASKED = [f"{name} buys {n} apples and eats {n + 1} of them, how many are left?" for n, name in enumerate("AB" * 9)]


def test_near_duplicates_and_rows_of_a_template_share_a_split(settings: dict[str, Any], tmp_path: Path) -> None:
    """Whatever set they stand in: a family is trained on or tested on, never both; no other prompt moves."""
    before = {row["prompt"]: row["split"] for row in prepared(settings, tmp_path / "a.parquet")}
    rows = [{"prompt": text} for text in (LIKE[0], *MASKED[:9])]
    settings["general"]["maths"]["source"] = write(tmp_path / "m2.jsonl", [*prompts("maths"), *rows])
    rows = [{"prompt": text} for text in (LIKE[1], *MASKED[9:])]
    settings["benign"]["source"] = write(tmp_path / "b2.jsonl", [*prompts("benign"), *rows])
    after = {row["prompt"]: row["split"] for row in prepared(settings, tmp_path / "b.parquet")}
    assert before.items() <= after.items()
    for family in (LIKE, MASKED):
        assert len({after[text] for text in family}) == 1


def test_a_set_for_evaluation_only_loses_what_is_like_a_prompt_of_training(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Whichever split the near duplicate of the other set falls into, it is not both trained and tested on."""
    for word in ("door", "gate", "safe", "shed", "chest", "drawer", "car", "house"):
        ours, theirs = (f"{STEM} pick the lock of {article} {word}" for article in ("the old", "an old"))
        source = write(tmp_path / "h.jsonl", [*prompts("harmful"), {"prompt": ours}])
        other = write(tmp_path / "o.jsonl", [*prompts("other"), {"prompt": theirs}])
        raw = settings | {"harmful": {"source": source}, "harmful_heldout": {"other": {"source": other}}}
        found = {row["prompt"]: row["split"] for row in prepared(raw, tmp_path / "out.parquet")}
        assert (theirs in found) == (found[ours] in ("heldout", "sealed"))


def test_what_is_sealed_was_never_among_the_first_that_are_asked(settings: dict[str, Any], tmp_path: Path) -> None:
    """Half of the held-out prompts are sealed, and all of them stand behind the others in the order of asking."""
    settings["harmful"]["source"] = write(tmp_path / "h.jsonl", prompts("harmful", 400))
    rows = [row for row in prepared(settings, tmp_path / "a.parquet") if row["domain"] == "harm"]
    asked = [row["split"] for row in rows if row["split"] in ("heldout", "sealed")]
    assert asked == sorted(asked)
    assert 0.4 < asked.count("sealed") / len(asked) < 0.6


def test_prompts_are_chosen_by_column_and_fraction(settings: dict[str, Any], tmp_path: Path) -> None:
    """`only` keeps the rows that match; `fraction` draws evenly from every split."""
    rows = [{"prompt": f"harmful {i}", "input": "" if i % 2 else "a table"} for i in range(400)]
    settings["harmful"]["source"] = write(tmp_path / "h.jsonl", rows)

    def harmful(**keys: Any) -> dict[str, str]:
        raw = settings | {"harmful": settings["harmful"] | keys}
        found = prepared(raw, tmp_path / "out.parquet")
        return {row["prompt"]: row["split"] for row in found if row["domain"] == "harm"}

    bare = harmful(only={"input": "^$"})
    assert set(bare) == {row["prompt"] for row in rows if not row["input"]}
    part = harmful(only={"input": "^$"}, fraction=0.4)
    assert part.items() <= bare.items()
    assert len(part) == 80
    for split in ("train", "validation", "heldout", "sealed"):
        whole, drawn = (list(found.values()).count(split) for found in (bare, part))
        assert abs(drawn - 0.4 * whole) < 1
    with pytest.raises(UserError, match=r"data\.harmful: .* holds 4 different prompts, expected at least 8"):
        harmful(fraction=0.01)
    with pytest.raises(UserError, match=r"data\.harmful .*no column 'kind'"):
        harmful(only={"kind": "x"})


def test_splits_do_not_depend_on_order_or_neighbours(settings: dict[str, Any], tmp_path: Path) -> None:
    """Reversing a file, or adding prompts, moves no prompt to another split."""
    before = {row["prompt"]: row["split"] for row in prepared(settings, tmp_path / "a.parquet")}
    settings["harmful"]["source"] = write(tmp_path / "h2.jsonl", [*prompts("new", 10), *prompts("harmful")[::-1]])
    after = {row["prompt"]: row["split"] for row in prepared(settings, tmp_path / "b.parquet")}
    assert before.items() <= after.items()


def test_the_file_is_the_same_each_time(settings: dict[str, Any], tmp_path: Path) -> None:
    """Equal settings and data give equal bytes, so nothing downstream runs again."""
    prepared(settings, tmp_path / "a.parquet")
    prepared(settings, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_roles_and_domains(settings: dict[str, Any], tmp_path: Path) -> None:
    """Each set has its role; a set for evaluation only is wholly held out; limits take a prefix of the shuffle."""
    out = tmp_path / "a.parquet"
    rows = prepared(settings, out)
    assert {row["split"] for row in rows if row["domain"] == "other"} == {"heldout", "sealed"}
    prompts = Prompts(out)
    assert list(prompts.by_domain("harmful", "heldout")) == ["harm", "other"]
    assert list(prompts.by_domain("harmful", "train")) == ["harm"]
    every = prompts.of("general", "train", "maths")
    assert prompts.of("general", "train", "maths", limit=3) == every[:3]
    assert prompts.of_each_domain("harmful", "heldout", 2) == [
        *prompts.of("harmful", "heldout", "harm", 2),
        *prompts.of("harmful", "heldout", "other", 2),
    ]
    with pytest.raises(UserError, match="no general prompts in split 'train' of domain 'code'"):
        prompts.of("general", "train", "code")


def test_shares() -> None:
    """The three splits get about the shares asked for, and the seed changes who is in them."""
    places = [position(f"prompt {i}", 0) for i in range(4000)]
    found = [split_of(place, 0.4, 0.15) for place in places]
    assert found.count("heldout") / 4000 == pytest.approx(0.4, abs=0.03)
    assert found.count("validation") / 4000 == pytest.approx(0.15, abs=0.03)
    assert found != [split_of(position(f"prompt {i}", 1), 0.4, 0.15) for i in range(4000)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "x"}] * 9, "no column 'prompt', found text"),
        ([{"prompt": " "}] * 9, "a row has an empty 'prompt'"),
        (prompts("few", 3), "holds 3 different prompts, expected at least 8"),
    ],
)
def test_bad_prompts(rows: list[dict[str, Any]], said: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """A short or wrong file is refused in one line that names the key and the file."""
    settings["benign"]["source"] = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match=said) as error:
        prepared(settings, tmp_path / "a.parquet")
    assert str(error.value).startswith("data.benign")
    assert "bad.jsonl" in str(error.value)


def labelled(tmp_path: Path, rows: list[dict[str, Any]], **fields: Any) -> LabelSettings:
    """Label settings over one file."""
    columns = {"kind": "graded", "prompt": "prompt", "response": "response", "score": "grade", "target": "cost"}
    source = write(tmp_path / "labels.jsonl", rows)
    return validate(
        LabelSettings, {"wheels": {}, "labels": {"harm": {"source": [source], **columns, **fields}}}, "data"
    )


def graded(n: int = 30) -> list[dict[str, Any]]:
    """`n` prompts with two graded responses each, by two graders."""
    pairs = [(f"prompt {i}", response) for i in range(n) for response in ("yes", "no")]
    return [{"prompt": p, "response": r, "grade_1": float(r == "yes"), "grade_2": 0.5} for p, r in pairs]


def test_labels(tmp_path: Path) -> None:
    """Graders are averaged, all answers to a prompt share its split, and repeated rows count once."""
    prepare_labels(labelled(tmp_path, graded() * 2), Path("wheels"), tmp_path / "l.parquet")
    splits = [load_labels(tmp_path / "l.parquet", "cost", split) for split in ("train", "judge", "heldout")]
    assert sum(map(len, splits)) == 60
    assert {row["grade"] for row in splits[0]} == {0.25, 0.75}
    assert len({row["prompt"] for rows in splits for row in rows}) == sum(len({r["prompt"] for r in s}) for s in splits)
    with pytest.raises(UserError, match="no labels for the reward model in split 'train'"):
        load_labels(tmp_path / "l.parquet", "reward", "train")


def test_inverted_labels(tmp_path: Path) -> None:
    """With `inverted`, a high grade becomes a low one."""
    settings = labelled(tmp_path, graded(), target="reward", inverted=True)
    prepare_labels(settings, Path("wheels"), tmp_path / "l.parquet")
    rows = load_labels(tmp_path / "l.parquet", "reward", "train")
    assert all((row["grade"] == 0.25) == (row["response"] == "yes") for row in rows)


def test_columns_of_humaneval_become_a_check(settings: dict[str, Any], tmp_path: Path) -> None:
    """Rows with an entry point and tests get a check of type `program`, with the prompt's own spaces; others none."""
    task = {"entry_point": "f", "test": "def check(candidate): pass"}
    rows = [{"prompt": f"\ndef f(x{i}):\n    ", **(task if i % 2 else {"test": 1})} for i in range(10)]
    settings["general"]["code"] = {"source": write(tmp_path / "code.jsonl", rows)}
    checks = {r["prompt"]: r["check"] for r in prepared(settings, tmp_path / "a.parquet") if r["domain"] == "code"}
    for row in rows:
        found = checks[row["prompt"].strip()]
        assert (json.loads(found) if found else None) == ({"type": "program", **row} if "entry_point" in row else None)


@pytest.mark.parametrize("grade", [1.5, "high", None])
def test_bad_grades(grade: Any, tmp_path: Path) -> None:
    """A grade outside 0 to 1 is refused, naming the set and the columns."""
    rows = [{"prompt": "p", "response": "r", "grade": grade}]
    with pytest.raises(UserError, match=r"^data\.labels\.harm .*expected numbers from 0 to 1"):
        prepare_labels(labelled(tmp_path, rows), Path("wheels"), tmp_path / "l.parquet")

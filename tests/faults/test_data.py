"""Reports of data that was read as something else, or whose fault was not told where it is."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.rows import write

from nspo.data.columns import matches, optional, text
from nspo.data.labels import read_set
from nspo.data.readers import read_file, read_rows
from nspo.data.stage import prepare_prompts
from nspo.errors import UserError
from nspo.files.sources import Source
from nspo.files.tables import read_table, write_table
from nspo.judges.replies import described, unreadable
from nspo.settings.data import DataSet, GradedSet, PromptSettings

LABEL = {"objective": "How?", "assistant_response": "So.", "human_score": "1"}


def graded(tmp_path: Path, rows: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """A set of graded responses, read."""
    write(tmp_path / "labels.csv", rows)
    labels = GradedSet(kind="graded", target="cost", source=[str(tmp_path / "labels.csv")], **fields)
    return read_set("own", labels, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1}\n\n{"a": }\n', r"line 3, column 7: Expecting value"),
        ('{"a": 1}\r\n{"a": 1}{"a": 2}\r\n', r"line 2, column 9: Extra data"),
        ('{"a": 1}\n{"a": "b', r"line 2, column 7: Unterminated string"),
        ("{'a': 1}\n", r"line 1, column 2: Expecting property name"),
    ],
)
def test_a_fault_of_jsonl_names_its_line(content: str, said: str, tmp_path: Path) -> None:
    """huggingface/datasets users look for the line: json.loads calls every line the first."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode())
    with pytest.raises(UserError, match=said):
        read_file(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".yaml"])
def test_marks_and_line_ends_of_other_systems_change_nothing(suffix: str, tmp_path: Path) -> None:
    """A byte order mark and CRLF are no part of a column's name or of a prompt."""
    content = {
        ".jsonl": '{"prompt": "a"}\n{"prompt": "b"}\n',
        ".json": '[{"prompt": "a"},\n{"prompt": "b"}]\n',
        ".csv": "prompt\na\nb\n",
        ".txt": "a\nb\n",
        ".yaml": "- prompt: a\n- prompt: b\n",
    }[suffix]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    assert read_rows(Source.parse(str(path)), tmp_path) == [{"prompt": "a"}, {"prompt": "b"}]
    path.write_bytes(content.encode("utf-16"))
    with pytest.raises(UserError, match=f"cannot be read as {suffix}"):
        read_file(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"grade": 0}\n{"grade": 0, "grade": 1}\n', "line 2: the key 'grade' stands twice"),
        ("a.json", '[{"grade": 0, "grade": 1}]', "the key 'grade' stands twice"),
        ("a.yaml", "- {grade: 0, grade: 1}\n", "the key 'grade' twice"),
    ],
)
def test_a_key_that_stands_twice_is_refused(name: str, content: str, said: str, tmp_path: Path) -> None:
    """The last one counted, in silence; of a CSV file's header this was told already."""
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a\0b", "with a NUL character"),
        ("\u200b\ufeff", "an empty 'prompt'"),
        (None, "an empty 'prompt'"),
        (True, "True"),
    ],
)
def test_a_prompt_that_says_nothing_is_refused(prompt: Any, said: str, tmp_path: Path) -> None:
    """Marks of no width alone are no prompt, and a NUL ends a text for whoever reads it in C."""
    with pytest.raises(UserError, match=said):
        text({"prompt": prompt}, "prompt", "row 1")


def test_what_counts_as_false_is_not_missing() -> None:
    """The category 0 became none, that of pandas' NaN "nan"; and `only: N` took rows in which nothing stands (None)."""
    values = {"zero": 0, "none": None, "nan": float("nan"), "no": False}
    assert [optional(values, key, "row 1") for key in values] == ["0", "", "", "False"]
    assert not matches(values, {"none": "N"}, "row 1")
    assert matches(values, {"zero": "^0$"}, "row 1")


def test_an_empty_response_names_its_row(tmp_path: Path) -> None:
    """Of a hundred thousand rows it could not be found."""
    with pytest.raises(UserError, match=r"labels\.csv\), row 2: a row has an empty 'assistant_response'"):
        graded(tmp_path, [LABEL, {**LABEL, "assistant_response": " "}])


@pytest.mark.parametrize("grade", ["nan", "NaN", "inf", "-inf", "1e400", "2", "0_1", "-0.1", "yes", ""])
def test_no_grade_but_from_0_to_1(grade: str, tmp_path: Path) -> None:
    """NaN compares false with everything, and would be neither harmful nor safe."""
    with pytest.raises(UserError, match=r"row 2: found the grade .* expected numbers from 0 to 1"):
        graded(tmp_path, [LABEL, {**LABEL, "human_score": grade}])


def test_only_graders_are_averaged(tmp_path: Path) -> None:
    """`score: grade` took grade_std for a second grader; numbered columns are graders."""
    several = {
        "objective": "a",
        "assistant_response": "b",
        "grade_1": 1,
        "grade_2": 0.5,
        "grade_std": 0.25,
        "gradex": 9,
    }
    assert [row["grade"] for row in graded(tmp_path, [several], score="grade")] == [0.75]
    with pytest.raises(UserError, match=r"found the grade \[\] in 'grad'"):
        graded(tmp_path, [several], score="grad")


def test_a_response_with_two_grades_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first counts, as it did, but not in silence."""
    rows = graded(tmp_path, [LABEL, LABEL, {**LABEL, "human_score": "0"}])
    assert [row["grade"] for row in rows] == [1.0]
    assert "1 responses stand there again with another grade; the first one counts" in capsys.readouterr().err


def test_a_prompt_with_two_checks_is_refused(tmp_path: Path) -> None:
    """The last one counted; equal rows are one prompt."""
    rows = [{"prompt": f"{n}?", "check": {"type": "number", "answer": n}} for n in range(9)]
    sets = {role: DataSet(source=str(tmp_path / f"{role}.jsonl"), name=role) for role in ("harmful", "benign")}
    for role in sets:
        write(tmp_path / f"{role}.jsonl", [{"prompt": f"{role} {word}"} for word in "abcdefghijklmnop"])
    general = {"maths": DataSet(source=str(tmp_path / "maths.jsonl"))}
    settings = PromptSettings(general=general, general_heldout={}, harmful_heldout={}, gold={}, **sets)
    write(tmp_path / "maths.jsonl", [*rows, rows[0]])
    prepare_prompts(settings, tmp_path, tmp_path / "prompts.parquet")
    write(tmp_path / "maths.jsonl", [*rows, {**rows[0], "check": {"type": "number", "answer": 9}}])
    with pytest.raises(UserError, match=r"row 10: its prompt stands above with another check"):
        prepare_prompts(settings, tmp_path, tmp_path / "prompts.parquet")


@pytest.mark.parametrize(
    ("reply", "cut", "said"),
    [
        ("", True, "the first is nothing, cut off; expected 'safe' (1 were cut off at max_tokens 16"),
        ("", False, "the first is ''; expected"),
        ("Let me think", True, "the first is 'Let me think', cut off; expected"),
        ("**Unsafe**", False, "the first is '**Unsafe**'; expected"),
    ],
)
def test_a_reply_that_was_cut_off_is_shown_as_that(reply: str, cut: bool, said: str) -> None:
    """A model that thinks aloud has said nothing when its tokens end: it was shown as ''."""
    assert said in unreadable("judge", "'safe'", [described(reply, cut)], int(cut), 16)


def test_no_flipped_bit_is_read_as_something_else(tmp_path: Path) -> None:
    """Parquet's checksums leave out the footer: a flip there renamed a column or changed its type (4 of 3981 tried)."""
    path = tmp_path / "table.parquet"
    columns = {"id": pa.string(), "ok": pa.bool_(), "n": pa.int32(), "ids": pa.list_(pa.int32())}
    rows = [{"id": f"a{n}", "ok": bool(n % 2), "n": n, "ids": [n]} for n in range(3)]
    write_table(rows, path, columns, {"kind": "responses"})
    whole = path.read_bytes()
    assert read_table(path) == rows
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    read = []
    for bit in range(8 * footer, 8 * len(whole), 7):
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        try:
            read.append(read_table(path))
        except UserError:
            continue
    assert all(found == rows for found in read)

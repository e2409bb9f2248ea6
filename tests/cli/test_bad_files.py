"""Damaged and foreign prompts, labels, tensors and manifests: one clear line, never a traceback."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.told import check_lines, outcome

from nspo.data.readers import read_rows
from nspo.data.stage import prepare_labels, prepare_prompts
from nspo.data.tables import Prompts, load_labels
from nspo.errors import UserError
from nspo.files.manifest import make_manifest, read_json
from nspo.files.sources import Source
from nspo.files.tensors import read_tensor_manifest, save_tensors
from nspo.settings.data import LabelSettings, PromptSettings
from nspo.settings.reading import validate

ROWS = "".join(json.dumps({"prompt": f"prompt {i}", "response": "r", "grade": 0.5}) + "\n" for i in range(20))


CSV = "prompt,response,grade\n" + "".join(f"prompt {i},r,0.5\n" for i in range(20))


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def twice_named() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), sink)
    return sink.getvalue()


BAD_FILES = {
    "empty.jsonl": (b"", "holds no rows"),
    "blank.csv": (b"\n\n", "holds no rows"),
    "header.csv": (b"prompt,response,grade\n", "holds no rows"),
    "empty.gz": (b"", "unknown suffix ''"),
    "empty.jsonl.gz": (b"", "holds no rows"),
    "cut.jsonl.gz": (gzip.compress(ROWS.encode())[:-20], "cannot be read as .jsonl"),
    "altered.jsonl.gz": (gzip.compress(ROWS.encode())[:-8] + b"\0" * 8, "CRC check failed"),
    "plain.jsonl.gz": (ROWS.encode(), "Not a gzipped file"),
    "latin.csv": (CSV.replace("prompt 3", "caf\xe9").encode("latin-1"), "invalid continuation byte"),
    "utf16.csv": (CSV.encode("utf-16-le"), "found a NUL byte, expected text in UTF-8"),
    "nul.jsonl": (ROWS.encode() + b"\0\0", "found a NUL byte"),
    "binary.txt": (b"\x80\x81", "cannot be read as .txt"),
    "huge.csv": (CSV.encode() + b"x" * 200_000 + b",r,0.5\n", "field larger than field limit"),
    "short.csv": (CSV.encode() + b"only a prompt\n", "line 22 has not as many fields as the header"),
    "long.csv": (CSV.encode() + b"a,b,0.5,d\n", "line 22 has not as many fields as the header"),
    "quote.csv": (CSV.encode() + b'"open,r,0.5\n', "unexpected end of data"),
    "twice.csv": (
        CSV.replace("response", "prompt", 1).encode(),
        "a column name stands twice in the header prompt, prompt, grade",
    ),
    "columns.csv": (CSV.replace("prompt,", "text,", 1).encode(), "no column 'prompt', found text"),
    "cut.jsonl": (ROWS.encode()[:-9], "cannot be read as .jsonl"),
    "array.jsonl": (b"[]\n" * 9, "expected a list of rows"),
    "numbers.jsonl": (b"1\n" * 9, "expected a list of rows"),
    "deep.jsonl": (b"[" * 100_000, "cannot be read as .jsonl"),
    "digits.jsonl": (b'{"prompt": ' + b"9" * 5000 + b"}", "cannot be read as .jsonl"),
    "object.json": (b'{"prompt": "a"}', "expected a list of rows"),
    "text.json": (b'"prompt"', "expected a list of rows"),
    "text.yaml": (b"prompt", "expected a list of rows"),
    "tag.yaml": (b"- !!python/object/apply:os.system [id]", "could not determine a constructor"),
    "tab.prompt": (b"seeds:\n\t- a", "cannot be read as .prompt"),
    "timestamp.prompt": (b"seeds: [!!timestamp x]", "cannot be read as .prompt"),
    "cut.parquet": (parquet([{"prompt": "a"}])[:-9], "cannot be read as .parquet"),
    "text.parquet": (b"prompt\na\n", "cannot be read as .parquet"),
    "twice.parquet": (twice_named(), "Multiple matches"),
    "list.parquet": (parquet([{"prompt": ["a"]}] * 9), "a row has the 'prompt' ['a'], expected text"),
    "number.jsonl": (b'{"prompt": 7}\n' * 9, "a row has the 'prompt' 7, expected text"),
    "object.jsonl": (b'{"prompt": {"text": "a"}}\n' * 9, "expected text"),
    "null.jsonl": (b'{"prompt": null}\n' * 9, "a row has an empty 'prompt'"),
    "half.jsonl": (b'{"prompt": "\\ud800"}\n' * 9, "a row has a 'prompt' that is no Unicode text"),
}
BAD_PROMPTS = {
    "ids.jsonl": (b"".join(b'{"prompt": "p%d", "id": "x"}\n' % i for i in range(9)), "different prompts have the id"),
    "check.jsonl": (b'{"prompt": "a", "check": "number"}\n', "a row has the 'check' 'number'"),
    "nan.jsonl": (b'{"prompt": "a", "check": {"type": "number", "answer": NaN}}\n', "a 'check' that is no JSON"),
}
BAD_LABELS = {
    "grade.csv": (CSV.replace("0.5", "high").encode(), "found the grade ['high'], expected numbers from 0 to 1"),
    "none.csv": (CSV.replace("grade", "mark").encode(), "found the grade [] in 'grade'"),
    "nan.jsonl": (ROWS.replace("0.5", "NaN").encode(), "found the grade [nan]"),
    "list.jsonl": (ROWS.replace("0.5", "[1]").encode(), "found the grade [[1]]"),
    "huge.jsonl": (ROWS.replace("0.5", "1" + "0" * 400).encode(), "found the grade [1000"),
    "response.jsonl": (ROWS.replace('"r"', "1").encode(), "a row has the 'response' 1, expected text"),
}


def only_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    """The message is one line and holds `parts`."""
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("name", BAD_FILES | BAD_PROMPTS)
def test_bad_prompt_files(name: str, tmp_path: Path) -> None:
    """A prompt file with any fault is refused in one line that names it, and nothing is written."""
    content, said = (BAD_FILES | BAD_PROMPTS)[name]
    (tmp_path / name).write_bytes(content)
    raw = {
        "wheels": {},
        "general": {"maths": {"source": str(tmp_path / name)}},
        "harmful_heldout": {},
        "general_heldout": {},
        "gold": {},
    }
    section = validate(PromptSettings, raw | {"harmful": {"source": "builtin:benign.jsonl"}}, "data")
    with pytest.raises(UserError) as error:
        prepare_prompts(section, tmp_path, tmp_path / "prompts.parquet")
    only_line(error, name, said)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", BAD_FILES | BAD_LABELS)
def test_bad_label_files(name: str, tmp_path: Path) -> None:
    """A label file with any fault is refused in one line that names it, and nothing is written."""
    content, said = (BAD_FILES | BAD_LABELS)[name]
    (tmp_path / name).write_bytes(content)
    columns = {"prompt": "prompt", "response": "response" if name in BAD_LABELS else "prompt", "score": "grade"}
    raw = {
        "wheels": {},
        "labels": {"harm": {"kind": "graded", "source": [str(tmp_path / name)], "target": "cost", **columns}},
    }
    with pytest.raises(UserError) as error:
        prepare_labels(validate(LabelSettings, raw, "data"), tmp_path, tmp_path / "labels.parquet")
    only_line(error, name, said)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_line_separators_inside_strings_are_text(tmp_path: Path) -> None:
    """JSON strings may hold U+2028 and U+0085 as they are: they do not end a row."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert read_rows(Source.parse(str(tmp_path / "a.jsonl")), tmp_path) == [{"prompt": "one\u2028two\x85three"}]


def damaged(content: bytes, tries: int) -> Iterator[bytes]:
    """`content` cut off at, and with a bit flipped at, `tries` places spread evenly over it."""
    for index in range(tries):
        place = index * len(content) // tries
        yield content[:place]
        flipped = bytearray(content)
        flipped[place] ^= 1 << index % 8
        yield bytes(flipped)


def test_damaged_prompts_and_labels_are_refused(tmp_path: Path) -> None:
    """A cut file is refused; a flipped bit in the rows is refused or harmless, by the checksums of the pages."""
    rows = [json.loads(line) for line in ROWS.splitlines()]
    (tmp_path / "a.jsonl").write_text(ROWS)
    source = str(tmp_path / "a.jsonl")
    prompts = {"wheels": {}, "general": {"a": {"source": source}}, "harmful": {"source": source}, "harmful_heldout": {}}
    prompts |= {"general_heldout": {}, "gold": {}}
    columns = {"prompt": "prompt", "response": "response", "score": "grade", "target": "cost"}
    labels = {"wheels": {}, "labels": {"harm": {"kind": "graded", "source": [source], **columns}}}
    whole, bad = tmp_path / "whole.parquet", tmp_path / "bad.parquet"
    prepare_prompts(validate(PromptSettings, prompts, "data"), tmp_path, whole)
    prompt_file = whole.read_bytes()
    prepare_labels(validate(LabelSettings, labels, "data"), tmp_path, whole)
    label_file = whole.read_bytes()
    for content, load in (
        (prompt_file, lambda: Prompts(bad).of("general", "train")),
        (label_file, lambda: load_labels(bad, "cost", "train")),
    ):
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        bad.write_bytes(content)
        expected = load()
        assert 0 < len(expected) < len(rows)
        for damage in damaged(content, 150):
            bad.write_bytes(damage)
            found, message = outcome(load)
            if message:
                check_lines(message, str(bad))
            else:
                assert len(damage) == len(content)
                assert damage[:footer] == content[:footer] or found == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a whole Parquet file"),
        (b"PAR1", "is not a whole Parquet file"),
        (parquet([{"prompt": "a"}]), "has no column 'category'"),
    ],
)
def test_wrong_prompt_tables(content: bytes, said: str, tmp_path: Path) -> None:
    """What is no table of prompts is refused by name."""
    (tmp_path / "prompts.parquet").write_bytes(content)
    with pytest.raises(UserError, match=said):
        Prompts(tmp_path / "prompts.parquet")
    with pytest.raises(UserError, match=r"missing\.parquet does not exist"):
        load_labels(tmp_path / "missing.parquet", "cost", "train")


def test_damaged_tensor_headers_are_refused(tmp_path: Path) -> None:
    """A safetensors header with a flipped bit is refused in one line or still a manifest; a cut file is refused."""
    whole, bad = tmp_path / "whole.safetensors", tmp_path / "bad.safetensors"
    save_tensors(whole, {"x": torch.arange(8.0)}, make_manifest("bases", model={"weights": "abc"}))
    content = whole.read_bytes()
    for damage in damaged(content, len(content)):
        bad.write_bytes(damage)
        manifest, message = outcome(lambda: read_tensor_manifest(bad, "bases"))
        if message:
            assert message.startswith(str(bad))
            assert "\n" not in message
        else:
            assert len(damage) == len(content)
            assert manifest["kind"] == "bases"


@pytest.mark.parametrize("text", ["[1, 2]", "null", '"bases"', "{", "", "\x00"])
def test_a_manifest_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    """Any text may stand where the manifest belongs; only a manifest is accepted."""
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"nspo": text})
    with pytest.raises(UserError) as error:
        read_tensor_manifest(tmp_path / "a.safetensors", "bases")
    only_line(error, "a.safetensors")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\xfd", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_damaged_json_is_refused(content: bytes, tmp_path: Path) -> None:
    """A JSON file that is cut off, not text, or too deep is refused by name; a folder too."""
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "manifest.json")
    only_line(error, "manifest.json is not valid JSON")
    with pytest.raises(UserError, match="is a folder, expected a file"):
        read_json(tmp_path)

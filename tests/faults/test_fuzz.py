"""Fuzzing of everything that reads what others wrote: it is read right, or refused in one line; never a traceback.

Damaged forms of valid files (bits flipped, cut off, a piece doubled or taken away) and free inputs, for a bounded
number of examples from a fixed seed.
"""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nspo.data.readers import READERS, read_file
from nspo.errors import UserError
from nspo.evaluation.checks import chosen_letter, last_number, mark, mentions
from nspo.evaluation.sandbox.programs import whole_program
from nspo.files.journal import JsonLines
from nspo.files.manifest import INDEX, make_manifest, read_json
from nspo.files.tables import load_table, write_table
from nspo.files.tensors import load_tensors, save_tensors
from nspo.judges.replies import verdict
from nspo.models.folders.files import check_model_files, weight_files
from nspo.settings.judges import InWords
from nspo.settings.reading import load_config

EXAMPLES = 150
MARKS = ["```python\n", "```", "A", "(B)", "42", "-1.5e3", "{", "}", '"a": 1', "\n"]
CODE = [
    "```python\n",
    "```\n",
    "~~~",
    "def f(x):\n",
    "    return x\n",
    "import os\n",
    "class A:\n",
    "  - ",
    "\t",
    '"""',
    "(",
]
bounded = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=5000,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ROWS = [{"prompt": f"how do I {i}?", "label": "safe", "grade": i / 8} for i in range(8)]
INDEXED = b'{"metadata": {"total_size": 24}, "weight_map": {"x": "a.safetensors"}}'
CONFIG = b"model: {source: 'tiny:llama'}\nbases:\n  rule: energy\n  threshold: 0.9\nruntime: {results: out}\n"


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file that something happened to."""
    places = st.integers(0, len(content))
    start, stop = sorted((draw(places), draw(places)))
    how = draw(st.sampled_from(["flip", "cut", "remove", "double", "insert"]))
    if how == "flip":
        changed = bytearray(content)
        for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            changed[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if how == "cut":
        return content[:start]
    if how == "remove":
        return content[:start] + content[stop:]
    if how == "double":
        return content[:stop] + content[start:]
    return content[:start] + draw(st.binary(max_size=16)) + content[start:]


def read_or_refused(read: Callable[[], Any]) -> Any:
    """What was read; None where it was refused in one line."""
    found, said = None, "refused"
    try:
        found = read()
    except UserError as error:
        said = str(error)
    assert len(said.splitlines()) == 1, said
    return found


def valid(suffix: str) -> bytes:
    """The rows of a data file of this kind."""
    if suffix == ".csv":
        return ("prompt,label,grade\n" + "".join(f'"{r["prompt"]}",{r["label"]},{r["grade"]}\n' for r in ROWS)).encode()
    if suffix == ".txt":
        return "\n".join(row["prompt"] for row in ROWS).encode()
    lines = [json.dumps(row) for row in ROWS]
    return ("\n".join(lines) if suffix == ".jsonl" else f"[{', '.join(lines)}]").encode()


@pytest.mark.parametrize("suffix", sorted(set(READERS) - {".parquet"}))
@bounded
@given(data=st.data())
def test_prompt_and_label_files(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    """Damaged or arbitrary, plain or packed."""
    content = data.draw(damaged(valid(suffix)) | st.binary(max_size=200))
    packed = data.draw(st.booleans())
    path = tmp_path / f"data{suffix}{'.gz' if packed else ''}"
    path.write_bytes(data.draw(damaged(gzip.compress(content, mtime=0))) if packed else content)
    read_or_refused(lambda: read_file(path))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Valid artifacts."""
    folder = tmp_path_factory.mktemp("valid")
    save_tensors(folder / "a.safetensors", {"x": torch.arange(6.0)}, make_manifest("bases", model={"weights": "a"}))
    write_table(ROWS, folder / "a.parquet", manifest=make_manifest("rows", rows=len(ROWS)))
    JsonLines(folder / "a.jsonl").append(ROWS)
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@bounded
@given(data=st.data())
def test_safetensors(tmp_path: Path, originals: dict[str, bytes], data: st.DataObject) -> None:
    """What is read has the tensors that were written."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(data.draw(damaged(originals[".safetensors"])))
    found = read_or_refused(lambda: load_tensors(path, "bases"))
    if found is not None and "x" in found[1]:
        assert torch.equal(found[1]["x"], torch.arange(6.0))


@bounded
@given(content=damaged(INDEXED) | st.binary(max_size=64) | st.text(max_size=40).map(lambda text: text.encode()))
def test_indexes_of_models_in_several_files(tmp_path: Path, originals: dict[str, bytes], content: bytes) -> None:
    """Only files beside the index are weights, and every tensor that it names is in one of them."""
    (tmp_path / "a.safetensors").write_bytes(originals[".safetensors"])
    (tmp_path / INDEX).write_bytes(content)
    found = read_or_refused(lambda: weight_files(tmp_path, "it"))
    assert found in (None, {"x": tmp_path / "a.safetensors"})


@bounded
@given(data=st.data())
def test_parquet(tmp_path: Path, originals: dict[str, bytes], data: st.DataObject) -> None:
    """What is read has the rows that were written, in the columns that are asked for."""
    path = tmp_path / "a.parquet"
    path.write_bytes(data.draw(damaged(originals[".parquet"])))
    found = read_or_refused(lambda: load_table(path, "rows", ("prompt", "label", "grade")))
    assert found is None or isinstance(found[1], list)


@bounded
@given(data=st.data())
def test_manifests_and_journals(tmp_path: Path, originals: dict[str, bytes], data: st.DataObject) -> None:
    """JSON of ours, read whole or refused."""
    path = tmp_path / "a.json"
    path.write_bytes(data.draw(damaged(json.dumps(ROWS).encode()) | st.binary(max_size=64)))
    read_or_refused(lambda: read_json(path))
    path.write_bytes(data.draw(damaged(originals[".jsonl"])))
    read_or_refused(lambda: JsonLines(path).rows())


@bounded
@given(content=damaged(CONFIG) | st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode()))
def test_configurations(tmp_path: Path, content: bytes) -> None:
    """A configuration is typed settings, or lines that each name the file."""
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    said = ""
    try:
        load_config(path)
    except UserError as error:
        said = str(error)
    assert all(line.startswith(str(path)) for line in said.splitlines())


@bounded
@given(content=damaged(b"GGUF" + bytes([3, 0, 0, 0] + [0] * 16)) | st.binary(max_size=64))
def test_gguf_headers(tmp_path: Path, content: bytes) -> None:
    """The header of a GGUF file."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    read_or_refused(lambda: check_model_files(path, "model.source"))


@bounded
@given(reply=st.text(max_size=60) | st.sampled_from([" safe\n", "unsafe\nS1", "safe\nunsafe", "safe unsafe"]))
def test_judge_replies(reply: str) -> None:
    """Nothing but the words themselves is a verdict."""
    found = verdict(InWords(), reply)
    assert math.isnan(found) or found in (0.0, 1.0)
    assert found != 0.0 or reply.strip() == "safe"
    assert found != 1.0 or reply.strip().startswith("unsafe")


@bounded
@given(answer=st.text(max_size=120) | st.lists(st.sampled_from(MARKS)).map("".join))
def test_answers_are_marked(answer: str) -> None:
    """Whatever a model says is right or wrong."""
    for check in ({"type": "number", "answer": 42}, {"type": "json"}):
        assert mark(check, answer) in (True, False)
    number = last_number(answer)
    assert number is None or isinstance(number, float)
    letter = chosen_letter(answer)
    assert letter is None or len(letter) == 1
    assert mentions(answer, "a") in (True, False)


@bounded
@given(answer=st.lists(st.sampled_from(CODE) | st.text(max_size=20)).map("".join))
def test_code_is_extracted(answer: str) -> None:
    """Out of any answer comes a program that ends with the test."""
    check = {"type": "program", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f):\n    assert f(1)\n"}
    assert "check(f)" in whole_program(check, answer)


def test_a_digest_whose_name_is_damaged_is_missed(tmp_path: Path, originals: dict[str, bytes]) -> None:
    """Found by fuzzing: one flipped bit in the key and one in a tensor were read as whole."""
    spoilt = originals[".safetensors"].replace(b"content", b"bontent")
    (tmp_path / "a.safetensors").write_bytes(spoilt[:-1] + b"\x41")
    with pytest.raises(UserError, match="was damaged after it was written"):
        load_tensors(tmp_path / "a.safetensors", "bases")

"""Messages that reach users."""

import ast
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import nspo
from nspo.data.readers import read_file
from nspo.errors import UserError
from nspo.files.manifest import read_json
from nspo.models.chat import set_chat
from nspo.models.folders.files import check_model_files
from nspo.models.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "rank is 9"),
        ({"expected": "at most 8"}, "rank is 9, expected at most 8"),
        ({"change": "lower bases.threshold"}, "rank is 9: lower bases.threshold"),
        (
            {"expected": "at most 8", "change": "lower bases.threshold"},
            "rank is 9, expected at most 8: lower bases.thr",
        ),
    ],
)
def test_a_message_names_what_was_found_and_expected(parts: dict[str, str], message: str) -> None:
    """In one line, in this order; it survives the way out of another process."""
    error = UserError("rank is 9", **parts)
    assert str(error).startswith(message)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_what_was_expected_is_said_by_name() -> None:
    """No UserError spells "expected ..." in its first argument: `expected=` and `change=` keep the one form.

    Validators of the settings raise ValueError, as pydantic asks; `settings.reading` gives those texts the same form.
    """
    by_hand = [
        f"{path.name}:{call.lineno}"
        for path in Path(nspo.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "UserError"
        for part in ast.walk(call.args[0])
        if isinstance(part, ast.Constant) and "expected" in str(part.value)
    ]
    assert by_hand == []


READERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": read_file,
    "manifest.json": read_json,
    "model.gguf": lambda path: check_model_files(path, "model.source"),
    "model.safetensors": lambda path: check_model_files(path.parent, "model.source"),
    "generation_config.json": lambda path: check_model_files(path.parent, "model.source"),
    "template.jinja": lambda path: set_chat(tiny_tokenizer(), str(path), None, "model.source"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_named_pipe_is_refused_before_anybody_waits_for_it(name: str, tmp_path: Path) -> None:
    """Opening one for reading waits until somebody writes: a slip of a path must not stop a run without a word."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is a named pipe or a device, expected a file$"):
        READERS[name](tmp_path / name)


def test_a_folder_in_a_files_place_is_refused(tmp_path: Path) -> None:
    """It ended in a traceback after the weights were read."""
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(UserError, match="is a folder, expected a file"):
        check_model_files(tmp_path, "model.source")

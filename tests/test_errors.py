"""Messages that reach users."""

import ast
import pickle
from pathlib import Path

import pytest

import nspo
from nspo.errors import UserError


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

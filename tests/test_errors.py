"""Messages that reach users."""

import pickle

import pytest

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

"""Marking answers by rule: each prompt with a checkable task carries a `check`, and `mark` says whether it is met.

Functions of the check and the text alone, so a score never depends on a judge's mood. What each type of check means
is written in `nspo/data/README.md`; a set of your own may use the same types. Code is run in a sandbox, and only for
checks of type `program`, which the evaluation leaves out unless `evaluation.run_code` asks for them.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from nspo.errors import UserError
from nspo.evaluation.sandbox import run as sandbox
from nspo.evaluation.sandbox.programs import judged_programs, whole_program

# A sign counts only before a free-standing number (5-3 holds 5 and 3); digits inside H2O or after x^ do not count.
NUMBER = re.compile(r"(?<![\w.^])[-\u2212]?\d+(?:,\d{3})*(?:\.\d+)?")
BULLET = re.compile(r"^\s*(?:[-*]|\d+\.)\s", re.MULTILINE)
NAMED_LETTER = re.compile(r"\b(?i:answer|choice|option)(?i:\s+is)?\s*:?\s*[\"'*(]*([A-H])\b")
MARKED_LETTER = re.compile(r"^\W*([A-H])\W*$|^\W*([A-H])[).:*]|\(([A-H])\)|\b([A-H])\)|\b([A-H])\W*$", re.MULTILINE)


def mark(check: Mapping[str, Any], answer: str) -> bool:
    """Whether `answer` meets `check`.

    Raises:
        UserError: for an unknown type, or a type without its key; for code that the sandbox refuses to run.
    """
    rule = RULES.get(check.get("type", ""))
    if rule is None:
        raise UserError(
            f"check of type {check.get('type')!r}", expected=f"one of {', '.join(RULES)}", change="mend the prompt file"
        )
    try:
        return rule(check, answer.strip())
    except KeyError as error:
        raise UserError(
            f"check {dict(check)} has no key {error}", expected="one", change="mend the prompt file"
        ) from error


def last_number(text: str) -> float | None:
    """The last number in a text, thousands commas and a sign understood; None when there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


def chosen_letter(text: str) -> str | None:
    """The one option (A to H) that an answer picks: by name ("the answer is B"), else the only letter it marks as one.

    None when it picks none, or lists several: copying out the options is not a choice.
    """
    if named := NAMED_LETTER.findall(text):
        return str(named[-1])
    marked = {letter for groups in MARKED_LETTER.findall(text) for letter in groups if letter}
    return marked.pop() if len(marked) == 1 else None


def mentions(text: str, phrase: str) -> bool:
    """Whether `phrase` stands in `text` as whole words, upper or lower case alike, however the spaces fall."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    return re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE) is not None


def runs_code(check: Mapping[str, Any]) -> bool:
    """Whether marking an answer by this check runs it."""
    parts = check.get("checks")
    return check.get("type") in ("program", "judged_program") or (
        isinstance(parts, list) and any(map(runs_code, parts))
    )


def _judged_program(check: Mapping[str, Any], text: str) -> bool:
    return all(_passes(program) for program in judged_programs(check, text))


def _maths(check: Mapping[str, Any], text: str) -> bool:
    try:
        import math_verify
    except ImportError as error:
        raise UserError("answers in mathematics are compared by math-verify: pip install 'nspo[benchmarks]'") from error
    gold, found = (math_verify.parse(part, parsing_timeout=None) for part in (f"${check['answer']}$", text))
    return bool(math_verify.verify(gold, found, timeout_seconds=None))


def _program(check: Mapping[str, Any], text: str) -> bool:
    return _passes(whole_program(check, text))


def _passes(program: str) -> bool:
    verdict = sandbox.run(program)
    if verdict == "refused":
        raise UserError(
            "the sandbox could not be set up again", expected="it to work as before", change="run the same command"
        )
    return verdict == "passed"


def _number(check: Mapping[str, Any], text: str) -> bool:
    found = last_number(text)
    return found is not None and math.isclose(found, check["answer"], rel_tol=1e-9)


def _json(_: Mapping[str, Any], text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _all(check: Mapping[str, Any], text: str) -> bool:
    marks = [mark(part, text) for part in check["checks"]]  # every one, so that a broken check is always found
    return all(marks)


RULES: dict[str, Callable[[Mapping[str, Any], str], bool]] = {
    "number": _number,
    "contains_any": lambda check, text: any(mentions(text, phrase) for phrase in check["answers"]),
    "choice": lambda check, text: chosen_letter(text) == check["answer"],
    "max_words": lambda check, text: len(text.split()) <= check["n"],
    "min_words": lambda check, text: len(text.split()) >= check["n"],
    "starts_with": lambda check, text: text.startswith(check["text"]),
    "ends_with": lambda check, text: text.endswith(check["text"]),
    "includes": lambda check, text: all(phrase.casefold() in text.casefold() for phrase in check["texts"]),
    "excludes": lambda check, text: not any(mentions(text, phrase) for phrase in check["texts"]),
    "bullets": lambda check, text: len(BULLET.findall(text)) == check["n"],
    "lowercase": lambda _, text: text == text.lower(),
    "uppercase": lambda _, text: text == text.upper(),
    "json": _json,
    "maths": _maths,
    "program": _program,
    "judged_program": _judged_program,
    "all": _all,
}

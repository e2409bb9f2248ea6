"""The forms in which people's judgements of responses are published, read into one.

Graded or labelled responses (PyRIT, GPTFuzz, XSTest), plain preference pairs (HH-RLHF's transcripts, or columns prompt,
chosen, rejected), and PKU-SafeRLHF. What a row means stands in `nspo/data/tables.py`, how a set is described in
`nspo/settings/data.py`; config/README.md shows one of each kind.

A transcript "\\n\\nHuman: ...\\n\\nAssistant: ..." is cut at the last "Assistant:" that both sides of the pair share.
Of an earlier conversation the turns stay in the prompt, with their marks, as one text.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nspo.data.columns import Row, cell, encodable, flag, matches, optional, text, which
from nspo.data.readers import read_rows
from nspo.errors import UserError
from nspo.files.sources import Source
from nspo.run.progress import say
from nspo.settings.data import AnyLabelSet, GradedSet, PairSet, Questions, SafeRLHFSet

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
Rows = Sequence[tuple[str, Row]]  # where a row stands, by file and number, and the row
Judged = tuple[dict[str, Any], ...]  # rows that belong together: one response, or the two of a pair


def read_set(name: str, labels: AnyLabelSet, wheels_dir: Path) -> list[dict[str, Any]]:
    """The rows of one set, with set, target, prompt, response, grade, pair, role and category; doublets once.

    Raises:
        UserError: a missing column, or a cell that holds no text, no grade, no number of a response, naming the file
            and the key; safety labels that contradict each other; or nothing left.
    """
    found: dict[tuple[str, ...], Judged] = {}
    equal = disputed = 0
    for source in labels.source:
        where = f"data.labels.{name} ({source})"
        rows = [(f"{where}, row {n}", raw) for n, raw in enumerate(read_rows(Source.parse(source), wheels_dir), 1)]
        rows = [(place, raw) for place, raw in rows if matches(raw, labels.only, place)]
        for judged in _read(rows, labels, where, name, wheels_dir):
            responses = [row["response"] for row in judged]
            if len(judged) == 2 and responses[0] == responses[1]:
                equal += 1
                continue
            first = found.setdefault((judged[0]["prompt"], *responses), judged)
            disputed += any(ours["grade"] != theirs["grade"] for ours, theirs in zip(first, judged, strict=True))
    if not found:
        raise UserError(f"data.labels.{name}: no response is left of {', '.join(labels.source)}: change its `only`")
    if equal:
        say(f"data.labels.{name}: {equal} pairs of two equal responses are left out")
    if disputed:
        say(f"data.labels.{name}: {disputed} responses stand there again with another grade; the first one counts")
    common = {"set": name, "target": labels.target}
    return [
        common | row | {"pair": f"{name}-{number:06d}" if len(judged) == 2 else "", "category": row["category"] or name}
        for number, judged in enumerate(found.values())
        for row in judged
    ]


def _read(rows: Rows, labels: AnyLabelSet, where: str, name: str, wheels_dir: Path) -> Iterator[Judged]:
    match labels:
        case GradedSet():
            return _graded(rows, labels, _prompts_by_key(labels.questions, name, wheels_dir))
        case PairSet():
            return _pairs(rows, labels)
        case SafeRLHFSet():
            return _safe_rlhf(rows, labels, where)


def _prompts_by_key(questions: Questions | None, name: str, wheels_dir: Path) -> dict[str, str] | None:
    """The prompts of a second file by their key."""
    if questions is None:
        return None
    where = f"data.labels.{name}.questions ({questions.source})"
    rows = read_rows(Source.parse(questions.source), wheels_dir)
    return {str(cell(row, questions.key, where)): text(row, questions.prompt, where) for row in rows}


def _graded(rows: Rows, labels: GradedSet, prompts: dict[str, str] | None) -> Iterator[tuple[dict[str, Any]]]:
    for where, raw in rows:
        prompt = text(raw, labels.prompt, where) if prompts is None else _asked(raw, labels, where, prompts)
        grade = _grade(raw, labels, where)
        yield (
            {
                "prompt": prompt,
                "response": text(raw, labels.response, where),
                "grade": 1.0 - grade if labels.inverted else grade,
                "role": "",
                "category": _category(raw, labels.category, where),
            },
        )


def _asked(raw: Row, labels: GradedSet, where: str, prompts: dict[str, str]) -> str:
    key = str(cell(raw, labels.prompt, where))
    if key not in prompts:
        raise UserError(
            f"{where}: a row has the {labels.prompt!r} {key!r:.60}", expected="a key of the file `questions`"
        )
    return prompts[key]


def _grade(raw: Row, labels: GradedSet, where: str) -> float:
    graders = re.compile(re.escape(labels.score) + r"[ _-]?\d*")  # such as human_score_2, and no grade_std
    found = [raw[c] for c in raw if graders.fullmatch(str(c)) and raw[c] not in (None, "")]
    if labels.grades:
        if not found or any(str(value) not in labels.grades for value in found):
            known = ", ".join(labels.grades)
            raise UserError(
                f"{where}: found {found!r:.80} in {labels.score!r}", expected="of `grades`", change=f"{known}"
            )
        found = [labels.grades[str(value)] for value in found]
    try:
        grades = [_number(value) for value in found]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{where}: found the grade {found!r:.80}", expected="numbers from 0 to 1, or `grades`"
        ) from error
    if not grades or not all(0 <= grade <= 1 for grade in grades):
        raise UserError(f"{where}: found the grade {found!r:.80} in {labels.score!r}", expected="numbers from 0 to 1")
    return sum(grades) / len(grades)


def _number(value: Any) -> float:
    """What a cell says; `float` alone would read 0_5 as 5."""
    if "_" in str(value):
        raise ValueError(value)
    return float(value)


def _category(raw: Row, column: str, where: str) -> str:
    if column:
        cell(raw, column, where)
    return optional(raw, column, where)


def _pairs(rows: Rows, labels: PairSet) -> Iterator[Judged]:
    for where, raw in rows:
        if labels.prompt:
            prompt = text(raw, labels.prompt, where)
            answers = [text(raw, column, where, empty=True) for column in (labels.chosen, labels.rejected)]
        else:
            prompt, *answers = _transcripts(raw, labels, where)
        category = _category(raw, labels.category, where)
        yield tuple(
            {"prompt": prompt, "response": answer, "grade": None, "role": role, "category": category}
            for role, answer in zip(("chosen", "rejected"), answers, strict=True)
        )


def _transcripts(raw: Row, labels: PairSet, where: str) -> tuple[str, str, str]:
    """Prompt, chosen and rejected answer of two transcripts."""
    sides = [encodable(str(cell(raw, column, where)), column, where) for column in (labels.chosen, labels.rejected)]
    shared, mark, _ = os.path.commonprefix(sides).rpartition(ASSISTANT)  # noqa: RUF071  # of text, not of a path
    prompt = shared.removeprefix(HUMAN).strip()
    if not mark or not shared.startswith(HUMAN) or not prompt:
        raise UserError(
            f"{where}: a row has the {labels.chosen!r} {sides[0]!r:.60}",
            expected='two transcripts that begin alike, "\\n\\nHuman: ...\\n\\nAssistant: ...", '
            "or the name of a column in `prompt`",
        )
    chosen, rejected = (side[len(shared) + len(mark) :].strip() for side in sides)
    return prompt, chosen, rejected


def _safe_rlhf(rows: Rows, labels: SafeRLHFSet, file: str) -> Iterator[Judged]:
    if labels.target == "cost":
        _refuse_contradictions(rows, file)
    for where, raw in rows:
        chosen = which(raw, "safer_response_id" if labels.target == "cost" else "better_response_id", where)
        yield tuple(
            {
                "prompt": text(raw, "prompt", where),
                "response": text(raw, f"response_{k}", where, empty=True),
                "grade": float(not flag(raw, f"is_response_{k}_safe", where)) if labels.target == "cost" else None,
                "role": role,
                "category": _harm(raw),
            }
            for role, k in (("chosen", chosen), ("rejected", 1 - chosen))
        )


def _refuse_contradictions(rows: Rows, file: str) -> None:
    """Refuse a file in which the safer response is mostly the unsafe one: a column is swapped."""
    safe = [[flag(raw, f"is_response_{k}_safe", where) for k in (0, 1)] for where, raw in rows]
    chosen = [which(raw, "safer_response_id", where) for where, raw in rows]
    mixed = [flags[k] for flags, k in zip(safe, chosen, strict=True) if flags[0] != flags[1]]
    if 2 * sum(mixed) < len(mixed):
        raise UserError(
            f"{file}: in {len(mixed) - sum(mixed)} of {len(mixed)} pairs of a safe and an unsafe response, "
            "safer_response_id names the unsafe one",
            expected="the safe one",
            change="is a column swapped?",
        )


def _harm(raw: Row) -> str:
    """The first kind of harm that people saw in a response of the pair; empty where the file does not say."""
    kinds = [raw.get(f"response_{k}_harm_category") for k in (0, 1)]
    seen = {name for kind in kinds if isinstance(kind, dict) for name, there in kind.items() if there}
    return min(seen, default="" if None in kinds else "harmless")

"""The section with answers: a few chosen by rule, and a browser of all, base and methods side by side.

The browser is data (JSON on the page) that its one script shows as text, never as HTML. An answer that equals the base
model's stands there once.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from nspo.evaluation.scores import JUDGED
from nspo.judges.second.judge import NAME as SECOND
from nspo.report.runs import BASE, Run

ANSWER_CHARACTERS = 420
BROWSER_CHARACTERS = 2000
BROWSER_CASES = 200  # prompts of one set: the first ones, a random sample
HARMFUL_EXAMPLES = 3


def answers(runs: Sequence[Run], main: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Five prompts with the answers of base, constrained method and twin side by side.

    The first three harmful prompts (round robin over sets) on which the base model was unsafe and the constrained
    method was not, the first benign one that the base model answered, the first general one. Nothing is picked by hand.
    """
    shown = [next(run for run in runs if run.method == name) for name in _shown(runs, main)]
    cases = _cases(shown)
    improved = [c for c in cases if c[0]["role"] == "harmful" and c[0]["unsafe"] and not (c[1:] and c[1]["unsafe"])]
    domains = {domain: [c for c in improved if c[0]["domain"] == domain] for domain in _unique(improved)}
    turns = sorted(
        ((turn, place, case) for place, group in enumerate(domains.values()) for turn, case in enumerate(group)),
        key=lambda item: item[:2],
    )
    chosen = [case for _, _, case in turns[:HARMFUL_EXAMPLES]]
    chosen += [c for c in cases if c[0]["role"] == "benign" and not c[0]["refused"]][:1]
    chosen += [c for c in cases if c[0]["role"] == "general"][:1]
    return [
        {
            "kind": f"{case[0]['role']} prompt, {case[0]['domain']}",
            "harmful": case[0]["role"] == "harmful",
            "prompt": _cut(case[0]["prompt"], ANSWER_CHARACTERS),
            "answers": [
                {"run": run, "parts": _marked(case[0]["response"], row["response"]), "notes": _notes(row)}
                for run, row in zip(shown, case, strict=True)
            ],
        }
        for case in chosen
    ]


def browser(runs: Sequence[Run], main: Mapping[str, Any] | None) -> dict[str, Any]:
    """All answers for the page's browser: `models` (label, colour), which of them to `start` with, and `cases`.

    A case has `set`, `role`, `category`, `id`, `prompt`, and per model `[text, notes, unsafe, refused, correct]`, where
    a text of 0 is the base model's again.
    """
    counts: dict[str, int] = {}
    cases = []
    for case in _cases(runs):
        first = case[0]
        counts[first["domain"]] = counts.get(first["domain"], 0) + 1
        if counts[first["domain"]] > BROWSER_CASES:
            continue
        cases.append(
            {
                "set": first["domain"],
                "role": first["role"],
                "category": first.get("category") or "",
                "id": first["id"],
                "prompt": _cut(first["prompt"], BROWSER_CHARACTERS),
                "answers": [
                    [
                        0
                        if place and row["response"] == first["response"]
                        else _cut(row["response"], BROWSER_CHARACTERS),
                        ", ".join(_notes(row)),
                        row["unsafe"],
                        row["refused"],
                        row["correct"],
                    ]
                    for place, row in enumerate(case)
                ],
            }
        )
    names = _shown(runs, main)
    start = [next(i for i, run in enumerate(runs) if run.method == name) for name in names]
    return {"models": [{"label": run.label, "colour": run.colour} for run in runs], "start": start, "cases": cases}


def _shown(runs: Sequence[Run], main: Mapping[str, Any] | None) -> list[str]:
    """The base model and the two methods that the verdict is about; without a verdict the first three."""
    return [BASE, main["ours"], main["theirs"]] if main else list(dict.fromkeys(run.method for run in runs))[:3]


def _cases(runs: Sequence[Run]) -> list[list[dict[str, Any]]]:
    """The rows of all runs, prompt by prompt, benchmarks last; prompts that some run was not asked are left out."""
    tables = [{(row["domain"], row["id"]): row for row in run.responses + run.benchmark_responses} for run in runs]
    keys = [key for key, row in tables[0].items() if row["role"] != "gold"]  # right answers, which no model gave
    return [[table[key] for table in tables] for key in keys if all(key in table for table in tables)]


def _notes(row: Mapping[str, Any]) -> list[str]:
    """What the judges said about one answer."""
    notes = []
    if row["role"] == "harmful":
        cost = f" (cost {row['cost']:+.2f})" if row.get("cost") is not None else ""
        notes.append({True: "unsafe", False: "safe", None: "not judged"}[row["unsafe"]] + cost)
        if row.get(JUDGED + SECOND) is not None:
            notes.append(f"second judge: {'unsafe' if row[JUDGED + SECOND] > 0 else 'safe'}")
    if row.get("kind"):
        notes.append(row["kind"])
    elif row["refused"]:
        notes.append("refusal")
    if row.get("correct") is not None:
        notes.append("correct" if row["correct"] else "wrong")
    if row.get("exact_match"):
        notes.append("same as base")
    return notes


def _marked(before: str, after: str) -> list[tuple[str, bool]]:
    """`after` in parts, each with whether its words are missing from `before` there; no parts for an empty answer."""
    old, new = (re.split(r"(\s+)", _cut(text, ANSWER_CHARACTERS)) for text in (before, after))
    steps = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    parts = [("".join(new[start:stop]), kind != "equal") for kind, _, _, start, stop in steps]
    return [(text, changed) for text, changed in parts if text]


def _unique(cases: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(case[0]["domain"] for case in cases))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most].rstrip() + " […]"

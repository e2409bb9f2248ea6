"""The section with answers: what base and methods say to the same prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from nspo import plots
from nspo.report.data import BASE, Run

ANSWER_CHARACTERS = 420
HARMFUL_EXAMPLES = 3


def answers(runs: Sequence[Run], main: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Five prompts with the answers of base, constrained method and twin side by side.

    The first three harmful prompts (round robin over sets) on which the base model was unsafe and the constrained
    method was not, the first benign one that the base model answered, the first general one: no choice but the rule.
    """
    names = [BASE, main["ours"], main["theirs"]] if main else list(dict.fromkeys(run.method for run in runs))[:3]
    colour = plots.colours(names)
    shown = [next(run for run in runs if run.method == name) for name in names]
    tables = [{(row["domain"], row["id"]): row for row in run.responses} for run in shown]
    cases = [
        [table[key] for table in tables]
        for key in ((row["domain"], row["id"]) for row in shown[0].responses)
        if all(key in table for table in tables)
    ]
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
            "prompt": _cut(case[0]["prompt"]),
            "answers": [
                {"label": run.label, "colour": colour[run.method], "text": _cut(row["response"]), "notes": _notes(row)}
                for run, row in zip(shown, case, strict=True)
            ],
        }
        for case in chosen
    ]


def _notes(row: Mapping[str, Any]) -> list[str]:
    """What the judges said about one answer."""
    notes = []
    if row["role"] == "harmful":
        cost = f" (cost {row['cost']:+.2f})" if row.get("cost") is not None else ""
        notes.append(("unsafe" if row["unsafe"] else "safe") + cost)
    if row["refused"]:
        notes.append("refusal")
    if row.get("correct") is not None:
        notes.append("correct" if row["correct"] else "wrong")
    if row.get("exact_match"):
        notes.append("same as base")
    return notes


def _unique(cases: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(case[0]["domain"] for case in cases))


def _cut(text: str) -> str:
    return text if len(text) <= ANSWER_CHARACTERS else text[:ANSWER_CHARACTERS].rstrip() + " […]"

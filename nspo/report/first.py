"""The page's first screen, in plain words: is it safer, what did it cost, can it be trusted, and what to do next.

Nothing is claimed here that the tests of `nspo.report.compare` do not show; the verdict says the same in their terms.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nspo.report.compare import AT_FLOOR, BETTER, EQUAL, WORSE
from nspo.report.runs import Run

Row = Mapping[str, Any]


def first_screen(results: Mapping[str, Any], runs: Sequence[Run], judge: Mapping[str, Any]) -> dict[str, Any] | None:
    """None without a constrained and an unconstrained method to compare.

    Args:
        results: of `nspo.report.sections.results`, with the comparisons with the base model.
        runs: of all methods.
        judge: the section on the cost model.

    Returns:
        `sentence`, all of it in one; `questions`, each with `question`, `answer` and `sentences`; `next`, what to do
        now, each `text` with a `command` or nothing.
    """
    main = results["main"]
    if main is None:
        return None
    ours = [run for run in runs if run.method == main["ours"]]
    base = results["against_base"][0]
    safer, cost = _safer(main["ours"], base), _cost(main, base)
    questions = [
        {"question": "Is it safer?", **safer},
        {"question": "What did it cost?", **cost},
        {"question": "Can I trust it?", **_trust(main, ours, judge)},
    ]
    sentence = f"{main['ours']}: {_lower(safer['answer'])}; {_lower(cost['answer'])}."
    return {"sentence": sentence, "questions": questions, "next": _next(main, ours)}


def _safer(ours: str, base: Mapping[str, Any]) -> dict[str, Any]:
    unsafe = _rows(base, "unsafe_rate")
    readings = [row["reading"] for row in unsafe]
    if not unsafe:
        return {"answer": "Not measured", "sentences": []}
    if set(readings) == {BETTER}:
        answer = "Safer than before"
    elif WORSE in readings:
        answer = "Less safe than before on at least one set"
    elif BETTER in readings:
        answer = "Safer than before on some sets, not shown on all"
    else:
        answer = "Not shown to be safer than before"
    said = [
        f"{_percent(row['difference']['ours'])} of its answers to the harmful requests of {_set(row)} are unsafe, "
        f"{_percent(row['difference']['theirs'])} were before training."
        for row in unsafe
    ]
    return {"answer": answer, "sentences": said}


def _cost(main: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    theirs = main["theirs"]
    kl = next(iter(_rows(main, "kl_per_token")), None)
    ratio = kl["difference"]["ratio"] if kl else None
    if main["equal_safety"]:
        times, at = "{:.1f} times ", ", at equal safety"
        level = "The two are equally safe, so this is a fair comparison."
    elif main["safety_no_worse"]:
        times, at = "{:.1f} times ", ""
        level = f"{main['ours']} is shown to be no less safe than it."
    else:
        times, at = "", ", at safety not shown to be equal"  # where a ratio would say too much
        level = "The two are not shown to be equally safe, so part of the difference may be safety that one lacks."
    if ratio is None:
        answer = "drift not measured"
    elif ratio["high"] < 1:
        answer = f"{times.format(1 / ratio['value'])}less drift than {theirs}"
    elif ratio["low"] > 1:
        answer = f"{times.format(ratio['value'])}more drift than {theirs}"
    else:
        answer = f"drift not clearly different from {theirs}'s"
    said = [f"{theirs} is trained without the constraint: the hardest such rival in this run. {level}"]
    if kl:
        a, b = kl["difference"]["ours"], kl["difference"]["theirs"]
        said.append(f"Drift is how far answers to general questions move: {a:.2g} against {b:.2g} nats per token.")
    for name, subject in (("refusal_rate", "Harmless requests refused"), ("accuracy", "General tasks solved")):
        for row, rival in zip(_rows(base, name), _rows(main, name), strict=True):
            of = row["difference"]
            said.append(
                f"{subject}: {_percent(of['ours'])}, before {_percent(of['theirs'])}, {theirs} "
                f"{_percent(rival['difference']['theirs'])}{_against_base(row)}."
            )
    return {"answer": answer[0].upper() + answer[1:] + at, "sentences": said}


def _floor(row: Row) -> str:
    """Why the axis could not show a loss: see `could_show_loss`."""
    return "neither refuses anything" if row["measure"].axis == "over_refusal" else "at the floor"


def _against_base(row: Row) -> str:
    """What the tests show of a change since before training."""
    return {
        EQUAL: f"; unchanged, within {100 * (row['measure'].margin or 0):.3g} points",
        AT_FLOOR: f"; {_floor(row)}, so a loss could not show",
        BETTER: "; better than before",
        WORSE: "; worse than before",
    }.get(row["reading"], "; a change is neither shown nor ruled out")


def _trust(main: Mapping[str, Any], ours: Sequence[Run], judge: Mapping[str, Any]) -> dict[str, Any]:
    seeds = main["seeds"]
    counts = sorted({row["difference"]["n"] for row in _rows(main, "unsafe_rate")})
    said = []
    if counts:
        most = f" to {counts[-1]}" if len(counts) > 1 else ""
        said.append(f"Safety is counted on {counts[0]}{most} prompts a set that no training saw.")
    if _unmatched(ours):
        said.append("It does not meet the safety at which methods were to be compared: read its figures as they stand.")
    leaks = [run.certificate["summary"]["leakage_basis"]["max"] for run in ours if run.certificate]
    if leaks:
        said.append(
            f"Certificate: no layer's output on protected directions changed by more than {max(leaks):.0e} of its size."
        )
    auroc = next((row["auroc"] for row in judge["rows"] if row["auroc"]), None)
    if auroc:
        said.append(
            f"The judge that calls answers unsafe ranks answers as people do with AUROC {auroc['value']:.2f} (0.5 is "
            "chance, 1 is always); it gave the training signal too."
        )
    answer = "As a first look: one training run" if seeds == 1 else f"Over {seeds} training runs of each"
    return {"answer": answer, "sentences": said}


def _next(main: Mapping[str, Any], ours: Sequence[Run]) -> list[dict[str, str]]:
    found = [{"text": "Read what it answers, below, before you believe a rate."}]
    if main["seeds"] == 1:
        command = "snakemake --cores all --config 'policy={seeds: [0, 1, 2]}'"
        found.append({"text": "Tell chance from effect with three seeds:", "command": command})
    if _unmatched(ours):
        found.append({"text": "Train longer, or ask for less (policy.steps, matching.target_unsafe)."})
    if any(row["reading"] == AT_FLOOR for row in _rows(main, "accuracy")):
        found.append({"text": "Take a model that can do the tasks: ability cannot fall from the floor."})
    command = "nspo init --model ORG/NAME --data prompts.jsonl --gpus 8 --out my.yaml"
    found.append({"text": "Try your own model and prompts:", "command": command})
    place = "matched" if any(run.match for run in ours) else "policy"
    found.append({"text": f"Use the model: the folder {place}/{main['ours']}/seed{ours[0].seed} beside this page."})
    return found


def _unmatched(runs: Sequence[Run]) -> bool:
    return any((run.match or {}).get("found") in ("not reached", "base below target") for run in runs)


def _rows(comparison: Mapping[str, Any], name: str) -> list[Row]:
    """The rows of one score by the first judge."""
    return [row for row in comparison["rows"] if row["measure"].name == name and row["measure"].judge is None]


def _set(row: Row) -> str:
    return str(row["measure"].domain)


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%" if value in (0, 1) or value >= 0.1 else f"{100 * value:.1f}%"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]

"""The result in sentences: nothing but what the tests of `nspo.report.compare` show, dominance first."""

from collections.abc import Mapping, Sequence
from typing import Any

from nspo.evaluation.statistics.intervals import wilson
from nspo.report.compare import AT_FLOOR, BETTER, EQUAL, OPEN, WORSE

UNHELPFUL = {"refusal_rate": "refuses", "unanswered_rate": "leaves unanswered"}  # by the name of a measure
Matches = Mapping[str, Sequence[Mapping[str, Any] | None]]  # method -> match.json of each seed


def verdict(
    found: Mapping[str, Any] | None, against_base: Sequence[Mapping[str, Any]], matches: Matches | None = None
) -> list[str]:
    """The sentences, the first of which says it all.

    Args:
        found: the comparison of the constrained method with its hardest rival; None when there is none.
        against_base: the comparisons of both with the base model.
        matches: where each method was tested.
    """
    if found is None:
        return ["There is no verdict: it takes a constrained method and an unconstrained one, both evaluated."]
    ours, theirs = found["ours"], found["theirs"]
    unsafe = [row for row in found["rows"] if row["measure"].name == "unsafe_rate"]
    kl = next((row for row in found["rows"] if row["measure"].name == "kl_per_token"), None)
    sentences = [f"{_winner(found, unsafe)}; {_kl(ours, theirs, kl)}."]
    if found["seeds"] == 1:
        sentences.append("One seed: intervals are over prompts only, another training run may differ.")
    sentences += _where(ours, theirs, matches or {})
    if unsafe:
        sentences.append(f"{_safety(found, unsafe)}: unsafe rate {_and([_rates(row) for row in unsafe])}.")
    groups: dict[str, list[str]] = {}
    for row in found["rows"]:
        if row not in (*unsafe, kl):
            groups.setdefault(row["reading"], []).append(_lower_first(row["measure"].title))
    said = {
        BETTER: "is better on",
        WORSE: "is worse on",
        EQUAL: "is equal, within the margin, on",
        OPEN: "is shown neither to differ nor to be equal on",
        AT_FLOOR: "could not show a loss (at the floor) on",
    }
    parts = [f"{words} {_and(groups[key])}" for key, words in said.items() if key in groups]
    if parts:
        sentences.append(f"Elsewhere, {ours} {'; it '.join(parts)}.")
    for comparison in against_base:
        change = [row for row in comparison["rows"] if row["measure"].name == "unsafe_rate"]
        if change and not any(row["reading"] == BETTER for row in change):
            sentences.append(f"{comparison['ours']} is not measurably safer than the base model on any held-out set.")
        unhelpful = [_beside_base(row) for row in comparison["rows"] if row["measure"].name in UNHELPFUL]
        if unhelpful:
            sentences.append(f"Of harmless prompts, {comparison['ours']} {'; it '.join(unhelpful)}.")
    return sentences


def _beside_base(row: Mapping[str, Any]) -> str:
    """One kind of over-refusal, set against the interval of the base model's own rate."""
    ours, theirs, n = (row["difference"][key] for key in ("ours", "theirs", "n"))
    told = f"{UNHELPFUL[row['measure'].name]} {_rate(ours)} (n = {n})"
    if row["reading"] == AT_FLOOR:
        return f"{told}, as the base model does, so a loss could not show"
    base = wilson(round(theirs * n), n)
    if ours > base.high:
        where = "more than the base model's interval holds"
    else:
        where = "inside the base model's interval" if ours >= base.low else "less than the base model's interval holds"
    return f"{told}, {where}: {_rate(theirs)} ({_rate(base.low)} to {_rate(base.high)})"


def _winner(found: Mapping[str, Any], unsafe: Sequence[Any]) -> str:
    ours, theirs = found["ours"], found["theirs"]
    if not unsafe:
        return "Held-out safety was not measured, so nothing is compared fairly"
    return {
        "ours": f"{ours} is both safer and drifts less than {theirs}, its hardest unconstrained rival",
        "theirs": f"{theirs}, an unconstrained rival, is both safer and drifts less than {ours}",
        "neither": f"Neither of {ours} and {theirs}, its hardest unconstrained rival, is both safer and less drifted",
    }[found["dominance"]]


def _safety(found: Mapping[str, Any], unsafe: Sequence[Mapping[str, Any]]) -> str:
    ours, theirs, margin = found["ours"], found["theirs"], f"{100 * unsafe[0]['measure'].margin:.0f} points"
    if found["equal_safety"]:
        return f"{ours} and {theirs} are equally safe, within {margin}"
    readings = {row["reading"] for row in unsafe}
    if readings == {BETTER}:
        return f"{ours} is safer than {theirs}"
    if found["safety_no_worse"]:
        return f"{ours} is no less safe than {theirs}, within {margin}"
    if WORSE in readings:
        return f"{ours} is less safe than {theirs} on at least one set, so their drift is not compared at equal safety"
    return f"{ours} and {theirs} are not shown to be equally safe (within {margin})"


def _where(ours: str, theirs: str, matches: Matches) -> list[str]:
    """At which point of its walk each was tested, and whether that met the target."""
    said, unmatched = [], []
    for method in (ours, theirs):
        tested = [match for match in matches.get(method, ()) if match]
        if tested:
            said.append(f"{method} at a = {_and([format(match['scale'], '.2f') for match in tested])}")
        if any(match["found"] in ("not reached", "base below target") for match in tested):
            unmatched.append(method)
    found = [f"Tested on the line from the base model through the trained policy: {_and(said)}."] if said else []
    if unmatched:
        found.append(f"NOT matched: {_and(unmatched)} does not meet the validation target on its walk.")
    return found


def _kl(ours: str, theirs: str, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return f"KL per token of {ours} and {theirs} was not measured"
    a, b, ratio = row["difference"]["ours"], row["difference"]["theirs"], row["difference"]["ratio"]
    values = f"({a:.3g} against {b:.3g} nats)"
    if ratio is None or ratio["low"] <= 1 <= ratio["high"]:
        return f"{ours}'s KL per token is not clearly different from {theirs}'s {values}"
    word = "lower" if ratio["value"] < 1 else "higher"
    times = sorted(1 / value if word == "lower" else value for value in ratio.values())
    interval = f"(95% interval {times[0]:.1f} to {times[2]:.1f})"
    return f"{ours}'s KL per token is {times[1]:.1f} times {word} than {theirs}'s {interval} {values}"


def _rates(row: Mapping[str, Any]) -> str:
    judge = f" by {row['measure'].judge}" if row["measure"].judge else ""
    rates = f"{_rate(row['difference']['ours'])} against {_rate(row['difference']['theirs'])}"
    return f"{rates} on {row['measure'].domain}{judge}"


def _rate(value: float) -> str:
    return f"{100 * value:.1f}%"


def _lower_first(title: str) -> str:
    return title if title.startswith("KL") else title[0].lower() + title[1:]


def _and(names: Sequence[str]) -> str:
    names = [name.replace(",", " of the") for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

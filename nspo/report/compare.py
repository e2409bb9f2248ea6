"""Who beats whom, and at what safety: paired differences on the same prompts, and the sentence that follows from them.

Methods are compared at equal held-out safety, never at equal learning rate or step: projection shrinks the step, so a
constrained run that merely moved less would otherwise look gentle. Differences are paired (both methods answered the
same prompts), with a bootstrap interval over prompts, and over seeds where there are several.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nspo.evaluation.statistics.intervals import paired_difference, pooled_difference, pooled_mean
from nspo.models.drift import token_weights
from nspo.report.runs import Run
from nspo.settings.config import Config


@dataclass(frozen=True)
class Measure:
    """One column of the comparison: a score of metrics.json, and the column of responses.parquet behind it."""

    axis: str
    name: str
    domain: str
    title: str
    column: str
    lower_is_better: bool
    role: str
    drift: bool = False  # counted in the verdict: over-refusal and drift
    first_tokens: int | None = None  # mean over answer tokens, weighted; None: mean over prompts

    @property
    def unit(self) -> str:
        """`nats` or `rate`."""
        return "nats" if self.name.startswith("kl") else "rate"


def measures(config: Config) -> list[Measure]:
    """The headline columns, left to right: safety, over-refusal, ability, drift."""
    harmful = [config.data.harmful.name or "harmful", *config.data.harmful_heldout]
    benign = config.data.benign.name or "benign"
    first = config.evaluation.first_tokens

    def moved(name: str, title: str, lower_is_better: bool, drift: bool, tokens: int | None) -> Measure:
        return Measure("drift", name, "all", title, name, lower_is_better, "general", drift, tokens)

    return [
        *(Measure("safety", "unsafe_rate", d, f"Unsafe rate, {d}", "unsafe", True, "harmful") for d in harmful),
        Measure("over_refusal", "refusal_rate", benign, "Over-refusal", "refused", True, "benign", drift=True),
        Measure("ability", "accuracy", "all", "Ability", "correct", False, "general"),
        moved("kl_per_token", "KL per token", True, True, first),
        moved("kl_first_tokens", "KL, first tokens", True, True, first),
        moved("exact_match", "Exact match", False, True, None),
        moved("top1_agreement", "Top-1 agreement", False, False, first),
    ]


class Value(NamedTuple):
    """One prompt's value, and its weight in the mean."""

    value: float
    weight: float


Table = Mapping[tuple[str, str], Value]  # of one run: (domain, prompt id) -> its value


def per_prompt(rows: Iterable[Mapping[str, Any]], measure: Measure) -> dict[tuple[str, str], Value]:
    """(domain, prompt id) -> the measure's value in one run; prompts without one (unmarked) are left out."""
    found = {}
    for row in rows:
        counts = row["role"] == measure.role and measure.domain in ("all", row["domain"])
        if counts and row.get(measure.column) is not None:
            weight = 1.0
            if measure.first_tokens is not None:
                weight = token_weights([row["reference_tokens"]], measure.first_tokens)[measure.column][0]
            found[row["domain"], row["id"]] = Value(float(row[measure.column]), weight)
    return found


def pooled(runs: Sequence[Run], measure: Measure) -> dict[str, Any] | None:
    """A method's score over all its seeds (see `pooled_mean`), `n` prompts each; its own score where it has one seed.

    None where some seed has no such score.
    """
    scores = [run.score(measure.axis, measure.name, measure.domain) for run in runs]
    if len(runs) == 1 or not all(scores):
        return scores[0] if len(runs) == 1 else None
    tables = [per_prompt(run.responses, measure) for run in runs]
    shared = _shared(tables)
    if len(shared) < 2:
        return None
    estimate = pooled_mean(_rows(tables, shared), weights=[tables[0][key].weight for key in shared])
    failures = sum(score["failures"] for score in scores if score)
    known = {key: (scores[0] or {})[key] for key in ("axis", "name", "domain", "judge", "unit")}
    return {**known, **estimate._asdict(), "n": len(shared), "seeds": len(runs), "failures": failures}


def paired(ours: Sequence[Table], theirs: Sequence[Table]) -> dict[str, Any] | None:
    """Difference of means over the prompts that all runs answered, with a 95% interval; None for fewer than two.

    Args:
        ours, theirs: what `per_prompt` found in each run of a method, one per seed.
    """
    shared = _shared([*ours, *theirs])
    if len(shared) < 2:
        return None
    a, b = _rows(ours, shared), _rows(theirs, shared)
    weights = [ours[0][key].weight for key in shared]
    if len(a) == len(b) == 1:
        difference = paired_difference(a[0], b[0], weights=weights)
    else:
        difference = pooled_difference(a, b, weights=weights)
    means = {"ours": _mean(a, weights), "theirs": _mean(b, weights)}
    return {**means, **difference._asdict(), "n": len(shared)}


def _shared(tables: Sequence[Table]) -> list[tuple[str, str]]:
    return sorted(set.intersection(*(set(table) for table in tables)))


def _rows(tables: Sequence[Table], keys: Sequence[tuple[str, str]]) -> list[list[float]]:
    return [[table[key].value for key in keys] for table in tables]


def _mean(rows: Sequence[Sequence[float]], weights: Sequence[float]) -> float:
    return sum(v * w for row in rows for v, w in zip(row, weights, strict=True)) / (len(rows) * sum(weights))


def reading(difference: Mapping[str, Any], lower_is_better: bool) -> str:
    """`better`, `worse`, or `no clear difference` when the interval holds zero."""
    if difference["low"] <= 0 <= difference["high"]:
        return "no clear difference"
    return "better" if (difference["value"] < 0) == lower_is_better else "worse"


def compare(
    responses: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], ours: str, theirs: str, columns: Sequence[Measure]
) -> dict[str, Any]:
    """All paired differences between two methods, and whether they meet at equal safety.

    Args:
        responses: method (or `base`) -> the rows of responses.parquet, one list per seed.

    Returns:
        `ours`, `theirs`, `rows` (measure, difference, reading), and `equal_safety`: no unsafe rate differs clearly.
    """
    rows: list[dict[str, Any]] = []
    for measure in columns:
        difference = paired(*([per_prompt(run, measure) for run in responses[name]] for name in (ours, theirs)))
        if difference:
            read = reading(difference, measure.lower_is_better)
            rows.append({"measure": measure, "difference": difference, "reading": read})
    safety = [row["reading"] for row in rows if row["measure"].name == "unsafe_rate"]
    equal = bool(safety) and set(safety) == {"no clear difference"}
    return {"ours": ours, "theirs": theirs, "rows": rows, "equal_safety": equal}


def comparisons(
    config: Config, responses: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], columns: Sequence[Measure]
) -> list[dict[str, Any]]:
    """Every method against its unconstrained twin (`MethodSettings.twin_of`), constrained methods first.

    With several such methods the twin is the hardest to beat: among those at equal safety the one with the
    lowest KL per token; if none is, the one nearest in unsafe rate.
    """
    methods = {name: method for name, method in config.policy.methods.items() if name in responses}
    found = []
    for name, method in sorted(methods.items(), key=lambda item: not item[1].constraint.exact):
        if twins := [other for other in methods if methods[other].twin_of(method)]:
            found.append(min((compare(responses, name, twin, columns) for twin in twins), key=_hardest))
    return found


def _hardest(comparison: Mapping[str, Any]) -> tuple[bool, float]:
    rows = {row["measure"].name: row["difference"] for row in reversed(comparison["rows"])}  # the first of a name stays
    if comparison["equal_safety"]:
        return False, rows["kl_per_token"]["theirs"] if "kl_per_token" in rows else 0.0
    return True, abs(rows["unsafe_rate"]["value"]) if "unsafe_rate" in rows else 0.0


def verdict(found: Mapping[str, Any] | None, against_base: Sequence[Mapping[str, Any]]) -> list[str]:
    """The result in sentences, the first of which says it all; every one follows from the intervals.

    Args:
        found: the comparison of the constrained method with its twin; None when one of them was not evaluated.
        against_base: the comparisons of both with the base model.
    """
    if found is None:
        return ["There is no verdict: it takes a constrained method and its unconstrained twin, both evaluated."]
    rows = {(row["measure"].name, row["measure"].domain): row for row in found["rows"]}
    ours, theirs = found["ours"], found["theirs"]
    unsafe = [row for row in found["rows"] if row["measure"].name == "unsafe_rate"]
    rates = ", ".join(f"{_both(row)} on {row['measure'].domain}" for row in unsafe) or "not measured"
    kl = rows.get(("kl_per_token", "all"))
    kl_said = _kl(ours, theirs, kl) if kl else f"KL per token of {ours} and {theirs} was not measured"
    if found["equal_safety"]:
        sentences = [f"With no clear difference in held-out safety (unsafe rate {rates}), {kl_said}."]
    elif unsafe:
        safer = {row["reading"] for row in unsafe} - {"no clear difference"}
        which = {("better",): "safer", ("worse",): "less safe"}.get(
            tuple(safer), "safer on one set, less safe on another"
        )
        sentences = [
            f"Not at equal held-out safety: {ours} is {which} than {theirs} (unsafe rate {rates}), so their drift "
            f"cannot be compared fairly; as they stand, {kl_said}."
        ]
    else:
        sentences = [f"Held-out safety was not measured, so no fair comparison is possible; as they stand, {kl_said}."]
    groups: dict[str, list[str]] = {"better": [], "worse": [], "no clear difference": []}
    for row in found["rows"]:
        if row["measure"].drift:
            groups[row["reading"]].append(_lower_first(row["measure"].title))
    said = {"better": "is better on", "worse": "is worse on", "no clear difference": "shows no clear difference on"}
    parts = [f"{said[key]} {_and(names)}" for key, names in groups.items() if names]
    if parts:
        total = sum(map(len, groups.values()))
        sentences.append(f"Of the {total} figures of over-refusal and drift, {ours} {'; it '.join(parts)}.")
    for comparison in against_base:
        change = [row for row in comparison["rows"] if row["measure"].name == "unsafe_rate"]
        if change and not any(row["reading"] == "better" for row in change):
            sentences.append(f"{comparison['ours']} is not measurably safer than the base model on any held-out set.")
        for row in comparison["rows"]:
            if row["measure"].name == "refusal_rate" and row["reading"] == "worse":
                refused = f"{_rate(row['difference']['ours'])} of harmless prompts"
                sentences.append(
                    f"{comparison['ours']} refuses {refused}, the base model {_rate(row['difference']['theirs'])}."
                )
    return sentences


def _kl(ours: str, theirs: str, row: Mapping[str, Any]) -> str:
    a, b = row["difference"]["ours"], row["difference"]["theirs"]
    values = f"({a:.3g} against {b:.3g} nats)"
    if row["reading"] == "no clear difference" or min(a, b) <= 0:
        return f"{ours}'s KL per token is not clearly different from {theirs}'s {values}"
    times, word = (b / a, "lower") if b > a else (a / b, "higher")
    return f"{ours}'s KL per token is {times:.1f} times {word} than {theirs}'s {values}"


def _both(row: Mapping[str, Any]) -> str:
    return f"{_rate(row['difference']['ours'])} against {_rate(row['difference']['theirs'])}"


def _rate(value: float) -> str:
    return f"{100 * value:.1f}%"


def _lower_first(title: str) -> str:
    return title if title.startswith("KL") else title[0].lower() + title[1:]


def _and(names: Sequence[str]) -> str:
    names = [name.replace(",", " of the") for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

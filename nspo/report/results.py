"""The results section: the verdict, the headline table, paired differences, judges, domains, and the trade."""

from collections.abc import Sequence
from typing import Any

from nspo import plots
from nspo.config import Config
from nspo.report import comparison
from nspo.report.data import BASE, Run, trained_runs
from nspo.report.figures import Figures

DOMAIN_SCORES = {
    ("drift", "kl_per_token"): "KL per token",
    ("drift", "kl_first_tokens"): "KL, first tokens",
    ("drift", "exact_match"): "Exact match",
    ("drift", "top1_agreement"): "Top-1 agreement",
    ("refusal", "refusal_rate"): "Refused",
    ("ability", "accuracy"): "Accuracy",
}


def facts(config: Config, runs: Sequence[Run]) -> dict[str, Any]:
    """What was run: the model, the seeds, how many held-out prompts of which kind, and every identity."""
    counts: dict[tuple[str, str], int] = {}
    for row in runs[0].responses:
        counts[row["role"], row["domain"]] = counts.get((row["role"], row["domain"]), 0) + 1
    return {
        "model": config.model.source,
        "seeds": config.policy.seeds,
        "counts": [{"role": role, "domain": domain, "n": n} for (role, domain), n in sorted(counts.items())],
        "evaluation": config.evaluation,
        "policy": config.policy,
    }


def results(config: Config, runs: Sequence[Run], figures: Figures) -> dict[str, Any]:
    """The verdict, the headline table, the paired differences, drift per domain, and the trade-off figures."""
    columns = comparison.measures(config)
    responses: dict[str, list[Any]] = {}
    for run in runs:
        responses.setdefault(run.method, []).append(run.responses)
    pairs = comparison.comparisons(config, responses, columns)
    main = next((pair for pair in pairs if config.policy.methods[pair["ours"]].constrained), None)
    against_base = (
        [comparison.compare(responses, main[side], BASE, columns) for side in ("ours", "theirs")] if main else []
    )
    colour = plots.colours(run.method for run in runs)
    return {
        "verdict": comparison.verdict(main, against_base),
        "main": main,
        "columns": columns,
        "headline": [
            {"run": run, "colour": colour[run.method], "scores": [run.score(c.axis, c.name, c.domain) for c in columns]}
            for run in runs
        ],
        "pairs": pairs,
        "domain_columns": list(DOMAIN_SCORES.values()),
        "domains": {
            domain: [
                {"run": run, "colour": colour[run.method], "scores": [run.score(*key, domain) for key in DOMAIN_SCORES]}
                for run in runs
            ]
            for domain in config.data.general
        },
        "judged": judged(runs),
        "trade": trade(columns, runs, figures),
    }


def judged(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The unsafe rate of every run by every judge, set by set; None when the cost model is the only one."""
    scores = [s for run in runs for s in run.metrics["scores"] if s["name"] == "unsafe_rate"]
    judges = list(dict.fromkeys(s["judge"] for s in scores))
    if len(judges) < 2:
        return None
    columns = [(judge, domain) for domain in dict.fromkeys(s["domain"] for s in scores) for judge in judges]
    colour = plots.colours(run.method for run in runs)
    rows = [
        {
            "run": run,
            "colour": colour[run.method],
            "scores": [run.score("safety", "unsafe_rate", domain, judge) for judge, domain in columns],
        }
        for run in runs
    ]
    return {"columns": columns, "rows": rows}


def trade(columns: Sequence[comparison.Measure], runs: Sequence[Run], figures: Figures) -> list[dict[str, str]]:
    """Unsafe rate against each kind of drift: paths from the validation probes, ends on the held-out prompts."""
    colour = plots.colours(run.method for run in runs)
    unsafe = columns[0]
    benign = next(c for c in columns if c.axis == "over_refusal")

    def end(run: Run, x: tuple[str, str, str]) -> dict[str, Any] | None:
        start = {"value": 0.0, "low": 0.0, "high": 0.0}  # the base model's drift from itself
        ends = start if run.method == BASE and x[0] == "drift" else run.score(*x), run.score(*_key(unsafe))
        return {axis: (e["value"], e["low"], e["high"]) for axis, e in zip("xy", ends, strict=True) if e} or None

    found = []
    for probe, key, label, unit in (
        ("kl_per_token", ("drift", "kl_per_token", "all"), "KL per token", "nats"),
        ("kl_first_tokens", ("drift", "kl_first_tokens", "all"), "KL of the first tokens", "nats"),
        ("over_refusal_rate", _key(benign), "over-refusal", "share of harmless prompts"),
    ):
        drawn = []
        for run in trained_runs(runs):
            probes = [row for row in run.probes if row.get(probe) is not None and row.get("unsafe_rate") is not None]
            path = [(row[probe], row["unsafe_rate"]) for row in probes]
            drawn.append({"label": run.label, "colour": colour[run.method], "path": path, "end": end(run, key)})
        drawn = [{**line, "end": line["end"] if line["end"] and len(line["end"]) == 2 else None} for line in drawn]
        base = end(runs[0], key)
        if any(line["end"] or line["path"] for line in drawn):
            figure = plots.trade(
                drawn,
                base if base and len(base) == 2 else None,
                f"{label} ({unit})",
                f"unsafe, {unsafe.domain}",
                benign.name in key,
            )
            found.append(figures.add(f"trade_{probe}", figure, f"Unsafe rate against {label}"))
    return found


def _key(measure: comparison.Measure) -> tuple[str, str, str]:
    return measure.axis, measure.name, measure.domain

"""The results section: the verdict, the headline table, paired differences, judges, domains and categories."""

from collections.abc import Sequence
from typing import Any

from nspo.evaluation.statistics.intervals import wilson
from nspo.report import compare as comparison
from nspo.report.runs import BASE, Run, by_method
from nspo.report.verdict import verdict
from nspo.settings.config import Config

DOMAIN_SCORES = {
    ("drift", "kl_per_token"): "KL per token",
    ("drift", "kl_first_tokens"): "KL, first tokens",
    ("drift", "exact_match"): "Exact match",
    ("drift", "top1_agreement"): "Top-1 agreement",
    ("refusal", "refusal_rate"): "Refused",
    ("ability", "accuracy"): "Accuracy",
}
CATEGORY_COLUMNS = {  # role -> what is counted in each category, in which column of responses.parquet
    "harmful": ("unsafe", "unsafe"),
    "benign": ("refused", "refused"),
    "general": ("correct", "correct"),
}


def facts(config: Config, runs: Sequence[Run]) -> dict[str, Any]:
    """What was run: the model, the seeds, how many held-out prompts of which kind, and every identity."""
    counts: dict[tuple[str, str], int] = {}
    for row in runs[0].responses:
        counts[row["role"], row["domain"]] = counts.get((row["role"], row["domain"]), 0) + 1
    return {
        "model": config.model.source,
        "seeds": config.policy.seeds,
        "left_out": runs[0].metrics.get("left_out") or {},
        "counts": [{"role": role, "domain": domain, "n": n} for (role, domain), n in sorted(counts.items())],
        "evaluation": config.evaluation,
        "policy": config.policy,
    }


def results(config: Config, runs: Sequence[Run]) -> dict[str, Any]:
    """The verdict, the headline table, the paired differences, and the tables by judge, domain and category."""
    columns = comparison.measures(config)
    responses = {method: [run.responses for run in of] for method, of in by_method(runs).items()}
    pairs = comparison.comparisons(config, responses, columns)
    main = next((pair for pair in pairs if config.policy.methods[pair["ours"]].constraint.exact), None)
    against_base = (
        [comparison.compare(responses, main[side], BASE, columns) for side in ("ours", "theirs")] if main else []
    )
    matches = {method: [run.match for run in of] for method, of in by_method(runs).items()}
    return {
        "verdict": verdict(main, against_base, matches),
        "main": main,
        "against_base": against_base,
        "columns": columns,
        "headline": headline(columns, runs),
        "pairs": pairs,
        "domain_columns": list(DOMAIN_SCORES.values()),
        "domains": {
            domain: [{"run": run, "scores": [run.score(*key, domain) for key in DOMAIN_SCORES]} for run in runs]
            for domain in config.data.general
        },
        "judged": judged(runs),
        "categories": categories(runs),
    }


def headline(columns: Sequence[comparison.Measure], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per run; before the runs of a method with several seeds, one that pools them (`seeds`, else None)."""
    rows: list[dict[str, Any]] = []
    for of in by_method(runs).values():
        if len(of) > 1:
            scores = [comparison.pooled(of, column) for column in columns]
            rows.append({"run": of[0], "label": of[0].method, "seeds": len(of), "scores": scores})
        for run in of:
            scores = [run.score(c.axis, c.name, c.domain, c.judge) for c in columns]
            rows.append({"run": run, "label": run.label, "seeds": None, "scores": scores})
    return rows


def judged(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The unsafe rate of every run by every judge, set by set; None when the cost model is the only one."""
    scores = [s for run in runs for s in run.metrics["scores"] if s["name"] == "unsafe_rate"]
    judges = list(dict.fromkeys(s["judge"] for s in scores))
    if len(judges) < 2:
        return None
    columns = [(judge, domain) for domain in dict.fromkeys(s["domain"] for s in scores) for judge in judges]
    rows = [
        {"run": run, "scores": [run.score("safety", "unsafe_rate", domain, judge) for judge, domain in columns]}
        for run in runs
    ]
    return {"columns": columns, "rows": rows}


def categories(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rates by category of prompt, for every set that has several: `domain`, `counts` (what), and a row per category
    with one rate per run, each with Wilson's interval and n."""
    tables = []
    for role, (column, said) in CATEGORY_COLUMNS.items():
        kept = [[row for row in run.responses if row["role"] == role and row[column] is not None] for run in runs]
        for domain in dict.fromkeys(row["domain"] for row in kept[0]):
            names = sorted({row.get("category") or "" for row in kept[0] if row["domain"] == domain})
            if len(names) > 1:
                rows = [
                    {"category": name or "(none)", "scores": [_rate(of, domain, name, column) for of in kept]}
                    for name in names
                ]
                tables.append({"domain": domain, "counts": said, "rows": rows})
    return tables


def _rate(rows: Sequence[dict[str, Any]], domain: str, category: str, column: str) -> dict[str, Any] | None:
    values = [row[column] for row in rows if row["domain"] == domain and (row.get("category") or "") == category]
    if not values:
        return None
    return {**wilson(sum(values), len(values))._asdict(), "n": len(values), "unit": "rate", "failures": 0}

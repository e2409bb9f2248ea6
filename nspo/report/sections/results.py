"""The results section: the verdict, the headline table, paired differences, judges, domains and categories."""

from collections.abc import Sequence
from typing import Any

from nspo.evaluation.agreement import kappa
from nspo.evaluation.scores import JUDGED
from nspo.evaluation.statistics.intervals import wilson
from nspo.judges.second.judge import NAME as SECOND
from nspo.judges.second.kinds import KINDS
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
        "unread": {run.label: sum(n.values()) for run in runs if (n := run.metrics.get("unread"))},
        "learnt": runs[0].metrics.get("learnt") or {},
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
            for domain in (*config.data.general, *config.data.general_heldout)
        },
        "judged": judged(runs),
        "disagreements": disagreements(runs),
        "kinds": kinds(runs),
        "kind_names": KINDS,
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


def disagreements(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per harmful set, what the cost model and the second judge say of every run's answers: `both` unsafe, `ours` (the
    cost model alone), `theirs` (the second judge alone), `neither`, and Cohen's kappa; empty without a second judge."""
    tables = []
    for domain, of in _sets(runs, "harmful", JUDGED + SECOND):
        rows = []
        for run, answers in of:
            pairs = [(row["unsafe"], row[JUDGED + SECOND] is None or row[JUDGED + SECOND] > 0) for row in answers]
            counts = {
                "both": pairs.count((True, True)),
                "ours": pairs.count((True, False)),
                "theirs": pairs.count((False, True)),
                "neither": pairs.count((False, False)),
            }
            sides = [[str(pair[side]) for pair in pairs] for side in (0, 1)]
            rows.append({"run": run, "n": len(pairs), **counts, "kappa": kappa(*sides)})
        tables.append({"domain": domain, "rows": rows})
    return tables


def kinds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per harmful and harmless set, the shares of the kinds of answers of every run, and of those to harmful prompts
    that the cost model calls safe though they neither refuse nor are on the topic (`hollow`); empty where none were
    told apart."""
    tables = []
    for domain, of in [*_sets(runs, "harmful", "kind"), *_sets(runs, "benign", "kind")]:
        rows = []
        for run, answers in of:
            shares = [_share([row["kind"] == kind for row in answers]) for kind in KINDS]
            hollow = [not row["unsafe"] and row["kind"] in ("off topic", "degenerate") for row in answers]
            rows.append(
                {"run": run, "shares": shares, "hollow": _share(hollow) if answers[0]["role"] == "harmful" else None}
            )
        tables.append({"domain": domain, "rows": rows})
    return tables


def _sets(runs: Sequence[Run], role: str, column: str) -> list[tuple[str, list[tuple[Run, list[dict[str, Any]]]]]]:
    """The answers of every run to each set of a role, where all rows have the column."""
    kept = [(run, [row for row in run.responses if row["role"] == role]) for run in runs]
    if any(column not in row for _, rows in kept for row in rows):
        return []
    domains = dict.fromkeys(row["domain"] for row in kept[0][1])
    return [(name, [(run, [row for row in rows if row["domain"] == name]) for run, rows in kept]) for name in domains]


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
    return _share(values) if values else None


def _share(values: Sequence[bool]) -> dict[str, Any]:
    return {**wilson(sum(values), len(values))._asdict(), "n": len(values), "unit": "rate", "failures": 0}

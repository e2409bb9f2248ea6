"""The tables of published benchmarks: scores side by side, whole and by category, and where each set came from."""

from collections.abc import Sequence
from typing import Any

from nspo.report.runs import Run

RECORD = ("name", "source", "split", "licence", "prompts", "asked", "leaks")


def benchmarks(runs: Sequence[Run]) -> dict[str, Any] | None:
    """`rows` (domain, name, judge and one score per run), the same by category as `categories`, and `records`.

    None where no run was asked any benchmark.
    """
    asked = [run for run in runs if run.benchmarks]
    if not asked:
        return None
    scores = [{_key(score): score for metrics in run.benchmarks for score in metrics["scores"]} for run in runs]
    keys = list(dict.fromkeys(key for found in scores for key in found))
    rows = [
        {"domain": domain, "name": name, "judge": judge, "category": category, "scores": [s.get(key) for s in scores]}
        for key in keys
        for domain, name, judge, category in [key]
    ]
    records = {
        m["benchmark"]["name"]: {
            **{k: m["benchmark"][k] for k in RECORD},
            "too_long": sum((m.get("left_out") or {}).values()),
        }
        for r in asked
        for m in r.benchmarks
    }
    return {
        "rows": [row for row in rows if not row["category"]],
        "categories": [row for row in rows if row["category"]],
        "records": list(records.values()),
    }


def _key(score: dict[str, Any]) -> tuple[str, str, str, str]:
    return score["domain"], score["name"], score["judge"], score["category"]

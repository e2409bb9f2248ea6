"""What goes elsewhere: every figure as CSV, the headline as a LaTeX table, and a model card for each policy."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from nspo.report.compare import Measure, pooled
from nspo.report.html import amount, environment
from nspo.report.runs import BASE, Run, by_method, trained_runs

SCORE = ("axis", "name", "domain", "category", "judge", "value", "low", "high", "n", "failures", "unit")
COLUMNS = ("method", "seed", "prompts", *SCORE)  # prompts: the run's own held-out ones, or a benchmark's
LATEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"})
TAGS = ["nspo", "null-space", "safety", "alignment", "reinforcement-learning"]


def write_summary(columns: Sequence[Measure], runs: Sequence[Run], path: Path) -> None:
    """One CSV row per method, seed and score; the headline scores of a method with several seeds also `pooled`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for method, of in by_method(runs).items():
            if len(of) > 1:
                rows = [pooled(of, column) for column in columns]
                writer.writerows(
                    {**row, "method": method, "seed": "pooled", "prompts": "heldout"} for row in rows if row
                )
            for run in of:
                about = {"method": method, "seed": run.seed}
                writer.writerows({**score, **about, "prompts": "heldout"} for score in run.metrics["scores"])
                writer.writerows({**figure, **about} for figure in _measured(run))
                for metrics in run.benchmarks:
                    writer.writerows({**score, **about, "prompts": "benchmark"} for score in metrics["scores"])


def _measured(run: Run) -> Iterable[dict[str, Any]]:
    """What is measured on the weights and not on prompts: where on its walk a policy was tested, what leaks."""
    if run.match:
        yield {"axis": "matching", "name": "scale", "value": run.match["scale"], "unit": "number"}
    summary = (run.certificate or {}).get("summary", {})
    for name, over in (("leakage_basis", "max"), ("leakage_validation", "mean")):
        if name in summary:
            yield {"axis": "certificate", "name": name, "domain": over, "value": summary[name][over], "unit": "number"}


def write_latex(columns: Sequence[Measure], rows: Iterable[Mapping[str, Any]], model: str, path: Path) -> None:
    r"""The headline table for a paper: `\input` it, with the package booktabs."""
    rows = list(rows)
    asked: dict[int, list[str]] = {}
    for place, column in enumerate(columns):
        for n in sorted({row["scores"][place]["n"] for row in rows if row["scores"][place]}):
            asked.setdefault(n, []).append(_latex(column.title.replace(", ", " ")))
    counts = "; ".join(f"{n} for {', '.join(titles)}" for n, titles in asked.items())
    heads = " & ".join(f"\\shortstack{{{_latex(_broken(column.title))}}}".replace("|", r"\\") for column in columns)
    body = "\n".join(
        " & ".join([_latex(_named(row)), *(_cell(score) for score in row["scores"])]) + r" \\" for row in rows
    )
    path.write_text(
        "% Written by nspo; needs \\usepackage{booktabs}.\n"
        "\\begin{table}\n\\centering\\footnotesize\n"
        f"\\begin{{tabular}}{{l{'r' * len(columns)}}}\n\\toprule\n & {heads} \\\\\n\\midrule\n{body}\n"
        "\\bottomrule\n\\end{tabular}\n"
        f"\\caption{{{_latex(model)}: held-out scores with 95\\% intervals below; rates in \\%, KL in nats. "
        f"Prompts: {counts}.}}\n\\label{{tab:nspo}}\n\\end{{table}}\n",
        encoding="utf-8",
    )


def write_cards(facts: Mapping[str, Any], runs: Sequence[Run], preference: Sequence[Any], folder: Path) -> None:
    """One model card METHOD/seedN.md per trained policy: what it is, its scores beside the base's, its certificate."""
    base = next(run for run in runs if run.method == BASE)
    template = environment().get_template("model_card.md.j2")
    for run in trained_runs(runs):
        path = folder / run.method / f"seed{run.seed}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = [
            {**score, "base": base.score(score["axis"], score["name"], score["domain"], score["judge"])}
            for score in run.metrics["scores"]
        ]
        theirs = {tuple(s[k] for k in SCORE[:5]): s for metrics in base.benchmarks for s in metrics["scores"]}
        tested = [
            {**score, "base": theirs.get(tuple(score[k] for k in SCORE[:5]))}
            for metrics in run.benchmarks
            for score in metrics["scores"]
            if not score["category"]
        ]
        data = ModelCardData(library_name="transformers", tags=TAGS, pipeline_tag="text-generation").to_yaml()
        text = template.render(data=data, facts=facts, run=run, scores=scores, tested=tested, preference=preference)
        path.write_text(text.rstrip() + "\n", encoding="utf-8")


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['label']} ({row['seeds']} seeds)" if row["seeds"] else str(row["label"])


def _broken(title: str) -> str:
    return title.replace(", ", ",|").replace(" per ", "|per ").replace(" agreement", "|agreement")


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "--"
    value, low, high = (amount(score[key], score["unit"]).rstrip("%") for key in ("value", "low", "high"))
    return f"\\shortstack[r]{{{value}\\\\\\scriptsize {low}--{high}}}"


def _latex(text: str) -> str:
    return text.replace("\\", "/").translate(LATEX)

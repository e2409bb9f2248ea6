"""The page at the end: what safety training did to the model, with and without the constraint, as one HTML file.

`data` reads what the stages wrote, a module for every section turns it into plain tables and figures, the template lays
them out. Nothing is measured here but the paired comparison of methods (`comparison`); what no stage measured says so.
The page needs no network and runs no script, all text from models and data is escaped, and equal inputs give equal
bytes: no dates, no times. The settings under `runtime` are not shown, since they change nothing that is.

Command: `nspo report --config config/config.yaml --evaluations [...] ... --out results/report.html`
"""

from pathlib import Path
from typing import Any

import yaml

from nspo.artifacts import atomic_path, make_manifest, read_json
from nspo.progress import track
from nspo.report import geometry, trust
from nspo.report.answers import answers
from nspo.report.data import load_runs, write_summary
from nspo.report.figures import Figures
from nspo.report.html import render
from nspo.report.results import facts, results
from nspo.report.training import training
from nspo.validation import load_config


def write_report(
    config: Path,
    evaluations: list[Path],
    certificates: list[Path],
    policies: list[Path],
    bases: Path,
    reward: Path,
    cost: Path,
    out: Path,
    summary: Path,
    plots: Path,
    agreement: Path | None = None,
) -> None:
    """Write the page `out`, all scores as `summary` (CSV), and the folder `plots` with every figure as PNG and SVG.

    Args:
        config: the configuration of the run.
        evaluations: folders METHOD/seedN of the evaluation stage, the base model's among them.
        certificates: files METHOD/seedN.json.
        policies: folders METHOD/seedN of the training stage.
        bases: the bases file.
        reward: folder of the reward model.
        cost: folder of the cost model.
        out: the page.
        summary: the CSV file, one row per method, seed and score.
        plots: the folder of figures; replaced as a whole.
        agreement: the judges' agreement with people, where it was measured.

    Raises:
        UserError: when an input is missing or broken, or no evaluation is the base model's.
    """
    settings = load_config(config)
    runs = load_runs(settings, evaluations, certificates, policies)
    with atomic_path(plots) as folder, track("report", 5, "section") as bar:
        folder.mkdir()
        figures = Figures(folder)
        page: dict[str, Any] = {"facts": facts(settings, runs), "runs": runs}
        page["results"] = results(settings, runs, figures)
        bar.update()
        page["training"] = training(runs, figures)
        bar.update()
        page["bases"] = geometry.bases(bases, figures)
        bar.update()
        page["leakage"] = geometry.leakage(runs, figures)
        bar.update()
        page["preference"] = [trust.preference(n, f, figures) for n, f in (("cost", cost), ("reward", reward))]
        page["agreement"] = read_json(agreement)["rows"] if agreement else []
        page["answers"] = answers(runs, page["results"]["main"])
        shown = settings.model_dump(mode="json", exclude={"runtime"})
        page["configuration"] = yaml.safe_dump(shown, sort_keys=False, width=100, allow_unicode=True)
        page["version"] = make_manifest("report")["nspo_version"]
        html = render(page)
        bar.update()
    with atomic_path(summary) as scratch:
        write_summary(runs, scratch)
    with atomic_path(out) as scratch:
        scratch.write_text(html, encoding="utf-8")

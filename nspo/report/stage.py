"""The page at the end: what safety training did to the model, with and without the constraint, as one HTML file.

`runs` reads what the stages wrote, a module of `sections` turns it into plain tables and figures, its template lays
them out. Nothing is measured here but the paired comparison of methods (`compare`); what no stage measured says so. The
page needs no network; all text from models and data is escaped, and its content policy lets no script run but the one
that fills the browser of answers. Equal inputs give equal bytes: no dates, no times. The settings under `runtime` are
not shown, since they change nothing that is.

Command: `nspo report --config config/config.yaml --evaluations [...] ... --out results/report.html`
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nspo.files.atomic import atomic_path
from nspo.files.manifest import make_manifest, read_json
from nspo.report.first import first_screen
from nspo.report.html import render
from nspo.report.plots import Figures
from nspo.report.runs import Run, load_runs
from nspo.report.sections import bases as directions
from nspo.report.sections.answers import answers, browser
from nspo.report.sections.benchmarks import benchmarks as benchmark_tables
from nspo.report.sections.leakage import leakage
from nspo.report.sections.location import location
from nspo.report.sections.preference import preference
from nspo.report.sections.results import facts, results
from nspo.report.sections.trade import trade
from nspo.report.sections.training import training
from nspo.report.sections.walks import walks
from nspo.report.summary import write_cards, write_latex, write_summary
from nspo.run.progress import say, track
from nspo.settings.config import Config
from nspo.settings.reading import load_config

NO_AGREEMENT: dict[str, Any] = {"rows": [], "refusals": [], "topic": None}


@dataclass(frozen=True)
class ReportInputs:
    """What the stages wrote.

    Attributes:
        config: the configuration of the run.
        evaluations: folders METHOD/seedN of the evaluation stage, the base model's among them.
        certificates: files METHOD/seedN.json.
        policies: folders METHOD/seedN of the training stage.
        bases: the bases file.
        reward, cost: folders of the two preference models.
        agreement: the judges' agreement with people, where it was measured.
        attributions: files METHOD/seedN.json of where safety lives, where that was measured.
        benchmarks: files METHOD/seedN/TASK/metrics.json of published benchmarks, where any were asked.
        screen: screen.json, where first steps were compared before training.
        matches: files METHOD/seedN/match.json of where each policy was tested.
    """

    config: Path
    evaluations: list[Path]
    certificates: list[Path]
    policies: list[Path]
    bases: Path
    reward: Path
    cost: Path
    agreement: Path | None = None
    attributions: list[Path] | None = None
    benchmarks: list[Path] | None = None
    screen: Path | None = None
    matches: list[Path] | None = None

    def runs(self, settings: Config) -> list[Run]:
        """One for every method and seed; see `load_runs`."""
        measured = self.attributions or [], self.benchmarks or [], self.matches or []
        return load_runs(settings, self.evaluations, self.certificates, self.policies, *measured)


@dataclass(frozen=True)
class ReportOutputs:
    """What the report writes.

    Attributes:
        out: the page.
        summary: CSV file, one row per method, seed and score.
        latex: LaTeX file, the headline.
        cards: folder with a model card METHOD/seedN.md for every policy; replaced as a whole.
        plots: folder with every figure as PNG and SVG; replaced as a whole.
    """

    out: Path
    summary: Path
    latex: Path
    cards: Path
    plots: Path


def write_report(inputs: ReportInputs, outputs: ReportOutputs) -> None:
    """Write the page, its tables and figures, and a card for every policy.

    Raises:
        UserError: when an input is missing or broken, or no evaluation is the base model's.
    """
    settings = load_config(inputs.config)
    runs = inputs.runs(settings)
    models = ("cost", inputs.cost), ("reward", inputs.reward)
    with atomic_path(outputs.plots) as folder, track("report", 8, "section") as bar:
        folder.mkdir()
        figures = Figures(folder)
        page: dict[str, Any] = {"facts": facts(settings, runs), "runs": runs, "results": results(settings, runs)}
        for name, section in (
            ("trade", lambda: trade(page["results"]["columns"], runs, figures)),
            ("walks", lambda: walks(runs, page["results"]["main"], figures)),
            ("leakage", lambda: leakage(runs, figures)),
            ("bases", lambda: directions.bases(inputs.bases, figures)),
            ("location", lambda: location(runs, figures)),
            ("preference", lambda: [preference(target, place, figures) for target, place in models]),
            ("training", lambda: training(runs, figures)),
        ):
            page[name] = section()
            bar.update()
        page["screen"] = directions.screened(inputs.screen, figures) if inputs.screen else None
        page["benchmarks"] = benchmark_tables(runs)
        page["agreement"] = read_json(inputs.agreement) if inputs.agreement else NO_AGREEMENT
        page["first"] = first_screen(page["results"], runs, page["preference"][0])
        main = page["results"]["main"]
        page["answers"], page["browser"] = answers(runs, main), browser(runs, main)
        shown = settings.model_dump(mode="json", exclude={"runtime"})
        page["configuration"] = yaml.safe_dump(shown, sort_keys=False, width=100, allow_unicode=True)
        page["version"] = make_manifest("report")["nspo_version"]
        html = render(page)
        bar.update()
    columns, rows = page["results"]["columns"], page["results"]["headline"]
    with atomic_path(outputs.cards) as folder:
        write_cards(page["facts"], runs, page["preference"], folder)
    with atomic_path(outputs.summary) as scratch:
        write_summary(columns, runs, scratch)
    with atomic_path(outputs.latex) as scratch:
        write_latex(columns, rows, page["facts"]["model"], scratch)
    with atomic_path(outputs.out) as scratch:
        scratch.write_text(html, encoding="utf-8")
    found = page["first"]["sentence"] if page["first"] else page["results"]["verdict"][0]
    say(f"{found} The page: {outputs.out}")

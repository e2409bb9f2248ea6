"""The figures of the page as functions, for a notebook or a paper: each returns a matplotlib `Figure`.

    from nspo import plot

    plot.trade("results")                          # safety against drift, one mark per method
    plot.certificate("results")                    # what reaches each layer on inputs it was kept from
    plot.spectra("results/bases/bases.safetensors")

`results` is the folder of a finished run, or what `load` made of it once for several figures. `save` writes a figure as
the page does, equal bytes for equal numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from nspo.bases.file import NullSpaceBases
from nspo.bases.table import by_kind
from nspo.errors import UserError
from nspo.files.manifest import read_json
from nspo.report import plots
from nspo.report.compare import measures
from nspo.report.runs import Run, load_runs, trained_runs
from nspo.report.sections import leakage, training, walks
from nspo.report.sections import trade as trades
from nspo.settings.config import Config
from nspo.settings.reading import load_config

__all__ = ["Results", "certificate", "curve", "load", "save", "spectra", "trade", "walk"]


@dataclass(frozen=True)
class Results:
    """A finished run: its configuration, and one `Run` per method and seed, the base model's first."""

    config: Config
    runs: list[Run]


def load(folder: Path | str) -> Results:
    """Read the folder of a run.

    Raises:
        UserError: where it holds no evaluations, or one of its files is broken.
    """
    folder = Path(folder)
    config = load_config(folder / "config.yaml")
    each = {
        "evaluations": [path.parent for path in sorted(folder.glob("evaluation/*/seed*/metrics.json"))],
        "certificates": sorted(folder.glob("certificates/*/seed*.json")),
        "policies": [path.parent for path in sorted(folder.glob("training/*/seed*/training.parquet"))],
        "matches": sorted(folder.glob("walks/*/seed*/match.json")),
    }
    return Results(config, load_runs(config, **each))


def trade(
    results: Results | Path | str,
    against: Literal["kl_per_token", "kl_first_tokens", "refusal_rate", "accuracy"] = "kl_per_token",
    harmful: str | None = None,
) -> Figure:
    """Safety against what it cost, on held-out prompts: a mark with its 95% intervals for every method.

    Args:
        results: a run.
        against: what the x axis shows.
        harmful: the set of harmful prompts, by default the first.

    Raises:
        UserError: for a set that the run does not have, or where no method was measured.
    """
    results = _loaded(results)
    columns = measures(results.config)
    unsafe = [column for column in columns if column.name == "unsafe_rate" and column.judge is None]
    y = next((column for column in unsafe if harmful in (None, column.domain)), None)
    if y is None:
        raise UserError(f"harmful={harmful!r}", expected=f"one of {', '.join(column.domain for column in unsafe)}")
    x = next(column for column in columns if column.name == against)
    return _drawn(trades.figure(results.runs, x, y, probes=y is unsafe[0]), against)


def walk(results: Results | Path | str) -> Figure:
    """Safety against drift along the line from the base model through every policy; a large mark where it was tested.

    Raises:
        UserError: where no policy was walked.
    """
    walked = [run for run in _loaded(results).runs if run.match]
    return _drawn(walks.draw(walked) if walked else None, "walks")


def curve(results: Results | Path | str, of: str) -> Figure:
    """A curve of the training of every run.

    Args:
        results: a run.
        of: reward, cost, unsafe, refused, kl, kept, multiplier or length.

    Raises:
        UserError: for another name, or where no run logged it.
    """
    if of not in training.CURVES:
        raise UserError(f"of={of!r}", expected=f"one of {', '.join(training.CURVES)}")
    return _drawn(training.draw(_loaded(results).runs, of), of)


def certificate(
    results: Results | Path | str | Mapping[str, Mapping[str, Any] | Path | str],
    on: Literal["leakage_validation", "leakage_basis"] = "leakage_validation",
) -> Figure:
    """How much of each layer's output an update changed, and a random update of equal norm in grey.

    Args:
        results: a run, or certificates by name: what `nspo.verify` returned, or their files.
        on: validation inputs of general tasks, or the protected directions themselves.

    Raises:
        UserError: where there is no certificate, or none that measured it.
    """
    if isinstance(results, Mapping):
        shades = plots.colours({name: name for name in results})
        found = [
            (name, shades[name], read_json(Path(one)) if isinstance(one, Path | str) else one)
            for name, one in results.items()
        ]
    else:
        runs = trained_runs(_loaded(results).runs)
        found = [(run.label, run.colour, run.certificate) for run in runs if run.certificate]
    return _drawn(leakage.draw(found, on), on)


def spectra(bases: NullSpaceBases | Path | str) -> Figure:
    """Spectra of the inputs of every kind of site, and how many directions are free in each block."""
    found = bases if isinstance(bases, NullSpaceBases) else NullSpaceBases.load(bases)
    return plots.bases_overview(by_kind(found))


def save(figure: Figure, path: Path | str) -> None:
    """Write a figure as .png or .svg, in the page's style.

    Raises:
        UserError: for another suffix.
    """
    plots.write(figure, Path(path))


def _loaded(results: Results | Path | str) -> Results:
    return results if isinstance(results, Results) else load(results)


def _drawn(figure: Figure | None, what: str) -> Figure:
    if figure is None:
        raise UserError(f"{what} was not measured in this run: nothing to draw")
    return figure

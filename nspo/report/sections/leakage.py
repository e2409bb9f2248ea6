"""The section on leakage: what reaches protected inputs (the certificates)."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure

from nspo.bases.table import block_of
from nspo.report import plots
from nspo.report.plots import Figures
from nspo.report.runs import Run, trained_runs

LEAKAGE_FIGURES = {  # column: the column of a random update of equal norm, title
    "leakage_validation": ("random_equal_norm", "Validation general inputs"),
    "leakage_basis": ("random_basis", "Protected directions"),
}


def leakage(runs: Sequence[Run], figures: Figures) -> dict[str, Any]:
    """Leakage per layer, beside random updates of equal norm, and one summary row per certificate.

    With it what the run itself says of the theory (`nspo.policy.log`), where it projected gradients.
    """
    certified = [run for run in trained_runs(runs) if run.certificate]
    named = [(run.label, run.colour, run.certificate) for run in certified if run.certificate]
    drawn = {column: draw(named, column) for column in LEAKAGE_FIGURES}
    found = [figures.add(column, figure, LEAKAGE_FIGURES[column][1]) for column, figure in drawn.items() if figure]
    rows = [
        {
            "run": run,
            "constrained": run.certificate["constrained"],
            "layers": len(run.certificate["layers"]),
            "summary": run.certificate["summary"],
            "coverage": run.certificate.get("coverage") or {},
            "theory": run.settings.get("theory"),
        }
        for run in certified
        if run.certificate
    ]
    coverage = [(run.certificate or {}).get("coverage") or {} for run in certified]
    inputs = {
        name: sorted({kind for covered in coverage for kind in covered.get(name, ())})
        for name in ("protected_inputs", "unprotected_inputs")
    }
    return {"figures": found, "rows": rows, **inputs}


def draw(certificates: Sequence[tuple[str, str, Mapping[str, Any]]], column: str) -> Figure | None:
    """One column of each (label, colour, certificate) per layer, and in grey a random update as large as the first.

    None where no certificate has it.
    """
    lines = [_line(found, column, label, colour) for label, colour, found in certificates]
    random, _ = LEAKAGE_FIGURES[column]
    lines += [_line(found, random, f"random, as {label}", plots.MUTED) for label, _, found in certificates[:1]]
    lines = [line for line in lines if line["dots"]]
    return plots.leakage(lines) if lines else None


def _line(certificate: Mapping[str, Any], column: str, label: str, colour: str) -> dict[str, Any]:
    layers = certificate["layers"]
    values = [(block_of(name), _all(layer.get(column))) for name, layer in layers.items()]
    dots = sorted((block, value) for block, value in values if value)  # a log axis has no place for exact zeros
    blocks = sorted({block for block, _ in dots})
    medians = [(block, median(value for at, value in dots if at == block)) for block in blocks]
    return {"label": label, "colour": colour, "dots": dots, "medians": medians}


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly from first to last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _cycle(items: Sequence[str], count: int) -> list[str]:
    return [items[i % len(items)] for i in range(count)]


def _all(value: Any) -> float | None:
    return value.get("all") if isinstance(value, dict) else value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None

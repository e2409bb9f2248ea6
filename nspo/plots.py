"""The figures of the report: one function per kind of figure, one style, one colour per method everywhere.

Each function takes plain numbers and returns a matplotlib figure; `save` writes it as PNG and SVG, with equal bytes for
equal numbers (no dates, no software versions, fixed SVG ids). The figures are small and single, so that a page can put
them side by side on a wide screen and below each other on a phone. Lines carry their names at their ends; the colours
are Okabe and Ito's, which stay apart under the common colour-vision deficiencies.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

BASE, MUTED, INK = "#4d4d4d", "#8c8c8c", "#222222"
KNOWN = {"base": BASE, "nspo": "#0072b2", "grpo_no_kl": "#d55e00", "grpo": "#009e73"}
SPARE = ("#cc79a7", "#56b4e9", "#b8860b", "#7a5195")
SEQUENCE = ("#7fbf9f", "#4fa58f", "#2f8582", "#1a5f6b", "#0c3547")  # first to last block
SITES = ("#0072b2", "#cc79a7", "#009e73", "#d55e00", "#56b4e9", "#b8860b")
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: Any = {  # Any: rc_context wants a dictionary of literal keys
    "axes.axisbelow": True,
    "axes.edgecolor": "#b0b0b0",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.figsize": (4.6, 3.1),
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": "#ececec",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "savefig.dpi": 160,
    "svg.fonttype": "path",
    "svg.hashsalt": "nspo",
    "text.color": INK,
    "xtick.color": "#555555",
    "xtick.labelcolor": INK,
    "ytick.color": "#555555",
    "ytick.labelcolor": INK,
}
METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}

Points = Sequence[tuple[float, float]]


def colours(methods: Iterable[str]) -> dict[str, str]:
    """The colour of every method, of the base model too: known names keep theirs, others take spare ones in order."""
    spare = [name for name in methods if name not in KNOWN]
    return KNOWN | {name: SPARE[index % len(SPARE)] for index, name in enumerate(spare)}


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write `name`.png and `name`.svg into `folder`; returns the path of the SVG."""
    with matplotlib.rc_context(STYLE):
        for suffix, metadata in METADATA.items():
            figure.savefig(folder / f"{name}.{suffix}", metadata=metadata)
    return folder / f"{name}.svg"


def trade(
    runs: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None, x_label: str, y_label: str, percent: bool
) -> Figure:
    """Safety against what it cost: each run's path through training, and where it ended on held-out prompts.

    Args:
        runs: per run `label`, `colour`, `path` (points (x, y) by step on validation prompts) and `end`
            (`x`, `y`, each (value, low, high)) or None.
        base: the `end` of the base model, or None.
        percent: x is a share, as y always is.
    """
    figure, axes = _figure(x_label, y_label)
    for run in runs:
        if run["path"]:
            xs, ys = zip(*run["path"], strict=True)
            axes.plot(xs, ys, color=run["colour"], alpha=0.45, linewidth=1.2, marker="o", markersize=2.5)
    ends = [(run["label"], run["colour"], run["end"]) for run in runs] + [("base", BASE, base)]
    for label, colour, end in ends:
        if end is None:
            continue
        (x, x_low, x_high), (y, y_low, y_high) = end["x"], end["y"]
        errors: dict[str, Any] = {"xerr": [[x - x_low], [x_high - x]], "yerr": [[y - y_low], [y_high - y]]}
        axes.errorbar(x, y, **errors, color=colour, fmt="o", markersize=7, elinewidth=1.2, markeredgecolor="white")
        axes.annotate(label, (x, y), (7, 7), textcoords="offset points", color=colour, weight="bold")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=-0.03)
    if percent:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(x=0.16)
    return figure


def curves(
    lines: Sequence[tuple[str, str, Points]], x_label: str, y_label: str, percent: bool = False, log: bool = False
) -> Figure:
    """Lines over steps or layers, each (label, colour, points) with its name at its end; `percent`: y is a share."""
    figure, axes = _figure(x_label, y_label)
    if log:
        axes.set_yscale("log")
    for _, colour, points in lines:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour, marker="o", markersize=2.5)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(0, 1.08 * max(max(y for _, _, points in lines for _, y in points), 0.05))
    _name_ends(axes, [(label, colour, points[-1][1]) for label, colour, points in lines])
    return figure


def spectrum(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Eigenvalues over the largest one, in order, for some blocks of one kind of site; a dot ends the protected part.

    Args:
        lines: per block, first to last: `label`, `eigenvalues` (descending), `rank`.
    """
    figure, axes = _figure("direction, by size of eigenvalue", "eigenvalue / largest")
    axes.set_xscale("log")
    axes.set_yscale("log")
    named = []
    for index, line in enumerate(lines):
        values = [max(value / line["eigenvalues"][0], 1e-12) for value in line["eigenvalues"]]
        colour = SEQUENCE[round(index * (len(SEQUENCE) - 1) / max(len(lines) - 1, 1))]
        axes.plot(range(1, len(values) + 1), values, color=colour)
        if line["rank"]:
            axes.plot(line["rank"], values[line["rank"] - 1], "o", color=colour, markeredgecolor="white", markersize=7)
        named.append((line["label"], colour, values[-1]))
    _name_ends(axes, named)
    return figure


def leakage(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """What reaches each layer's output on protected inputs, per layer, on a log axis.

    Args:
        lines: per run `label`, `colour`, `dots` (block, value) for every linear layer, `medians` (block, value).
    """
    figure, axes = _figure("block", "relative change of outputs")
    axes.set_yscale("log")
    for index, line in enumerate(lines):
        xs, ys = zip(*line["dots"], strict=True)
        axes.scatter(xs, ys, s=7, color=line["colour"], alpha=0.3, linewidths=0, marker=MARKERS[index % len(MARKERS)])
        axes.plot(*zip(*line["medians"], strict=True), color=line["colour"])
    _name_ends(axes, [(line["label"], line["colour"], line["medians"][-1][1]) for line in lines])
    return figure


def calibration(points: Points, counts: Sequence[int]) -> Figure:
    """Share of positive human labels against the model's mean probability, per bin (`counts` responses each)."""
    figure, axes = _figure("predicted probability", "share graded positive")
    axes.plot((0, 1), (0, 1), color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=INK, linewidth=1)
    axes.scatter(xs, ys, s=[8 + 240 * count / sum(counts) for count in counts], color=INK, zorder=3)
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    return figure


def _figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel=y_label)
    return figure, axes


def _name_ends(axes: Axes, names: Sequence[tuple[str, str, float]]) -> None:
    """Write each (label, colour, y) beside the right end of the axes, moved apart where they would overlap."""
    gap = 0.075  # of the axes' height: one line of text
    axes.autoscale_view()
    to_axes = axes.transScale + axes.transLimits
    heights = [(float(to_axes.transform((1.0, y))[1]), label, colour) for label, colour, y in names]
    placed: list[tuple[float, str, str]] = []
    for height, label, colour in sorted(heights):
        height = max(height, placed[-1][0] + gap) if placed else height
        placed.append((height, label, colour))
    overhang = max(placed[-1][0] - 1.0, 0.0) if placed else 0.0
    for height, label, colour in placed:
        axes.annotate(
            label,
            (1.0, height - overhang),
            (4, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )

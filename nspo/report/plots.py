"""The figures of the report: one function per kind of figure, one style, one colour per method everywhere.

Each function takes plain numbers and returns a matplotlib figure; `save` writes it as PNG and SVG, with equal bytes for
equal numbers (no dates, no software versions, fixed SVG ids). The figures are small and single, so that a page can put
them side by side on a wide screen and below each other on a phone. Lines carry their names at their ends; the colours
are Okabe and Ito's and, for the ablations, Tol's, which stay apart under the common colour-vision deficiencies.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from nspo.bases.table import block_of
from nspo.errors import UserError
from nspo.files.atomic import atomic_path

if TYPE_CHECKING:
    from nspo.nullspace.basis import SiteBasis

BASE, MUTED, INK = "#4d4d4d", "#8c8c8c", "#222222"
KNOWN = {
    "base": BASE,
    "nspo": "#0072b2",
    "grpo_no_kl": "#d55e00",
    "grpo": "#009e73",
    "nspo_lagrangian": "#332288",
    "grpo_lagrangian": "#e69f00",
    "random_projector": "#882255",
    "gradient_only": "#aa4499",
    "release": "#999933",
    "dpo": "#117733",
    "nspo_dpo": "#44aa99",
    "bfpo": "#661100",
    "nspo_bfpo": "#cc6677",
    "wdoor": "#6699cc",
    "nspo_wdoor": "#004488",
    "nspo_both": "#77aadd",
    "nspo_paper": "#225555",
    "null_space_adapter": "#99ddff",
    "project_after": "#bbcc33",
    "lora": "#ee8866",
    "ogpsa": "#997700",
    "replay_kl": "#994455",
    "l2_sp": "#666633",
}
SPARE = ("#cc79a7", "#56b4e9", "#b8860b", "#7a5195")
LIGHTEST = 0.5  # how far the last of several methods of one title is mixed with white
SEQUENCE = ("#7fbf9f", "#4fa58f", "#2f8582", "#1a5f6b", "#0c3547")  # first to last block
SITES = ("#0072b2", "#cc79a7", "#009e73", "#d55e00", "#56b4e9", "#b8860b")
OVERVIEW_BLOCKS = 5  # spectra drawn per kind of site
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


def colours(titles: Mapping[str, str]) -> dict[str, str]:
    """The colour of every method, given its title: known titles keep theirs, others take spare ones in order.

    Several methods of one title (say, at different learning rates) share its hue, the first darkest.
    """
    names = list(dict.fromkeys(titles.values()))
    spare = [name for name in names if name not in KNOWN]
    hues = KNOWN | {name: SPARE[index % len(SPARE)] for index, name in enumerate(spare)}
    found = {}
    for name in names:
        methods = [method for method, title in titles.items() if title == name]
        for place, method in enumerate(methods):
            found[method] = _lighter(hues[name], LIGHTEST * place / max(len(methods) - 1, 1))
    return found


def _lighter(colour: str, amount: float) -> str:
    """`colour` mixed with white; 0 leaves it as it is."""
    red, green, blue = (part + (1 - part) * amount for part in to_rgb(colour))
    return to_hex((red, green, blue))


class Figures:
    """Saves figures into the plots folder and hands the template what to embed."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, name: str, figure: Any, title: str) -> dict[str, str]:
        """Save `figure` as `name`.png and `name`.svg; returns its `title` and the SVG as a data URI."""
        data = save(figure, self.folder, name).read_bytes()
        return {"title": title, "uri": f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}"}


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write `name`.png and `name`.svg into `folder`; returns the path of the SVG."""
    for suffix in METADATA:
        write(figure, folder / f"{name}.{suffix}")
    return folder / f"{name}.svg"


def write(figure: Figure, path: Path) -> None:
    """Write one file, atomically, in the format of its suffix.

    Raises:
        UserError: as `check_suffix`.
    """
    metadata = METADATA[check_suffix(path)]
    with matplotlib.rc_context(STYLE), atomic_path(path) as scratch:
        figure.savefig(scratch, metadata=metadata)


def check_suffix(path: Path) -> str:
    """The format of a figure's file.

    Raises:
        UserError: for a suffix other than .png and .svg.
    """
    suffix = path.suffix.removeprefix(".")
    if suffix not in METADATA:
        raise UserError(
            f"{path}: a figure is written as .png or .svg", expected="one of these suffixes", change="rename it"
        )
    return suffix


def curves(
    lines: Sequence[tuple[str, str, Points]], x_label: str, y_label: str, percent: bool = False, log: bool = False
) -> Figure:
    """Lines over steps or layers, each (label, colour, points) with its name at its end; `percent`: y is a share."""
    figure, axes = new_figure(x_label, y_label)
    if log:
        axes.set_yscale("log")
    for _, colour, points in lines:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour, marker="o", markersize=2.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
    figure, axes = new_figure("direction, by size of eigenvalue", "eigenvalue / largest")
    _draw_spectrum(axes, lines)
    return figure


def bases_overview(kinds: Mapping[str, Sequence["SiteBasis"]]) -> Figure:
    """Bases at a glance: the spectra of every kind of site, and below them how many directions are free in each block.

    Args:
        kinds: the sites of each kind in order of their blocks (see `nspo.bases.table.by_kind`). Kinds whose
            eigenvalues are unknown have no spectrum.
    """
    spectra = {kind: sites for kind, sites in kinds.items() if all(len(site.eigenvalues) for site in sites)}
    columns = min(len(spectra), 2) or 1
    rows = -(-len(spectra) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8 * max(columns, 1.4), 3.0 * rows + 3.4))
        grid = figure.add_gridspec(rows + 1, columns)
        panels = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(len(spectra))]
        free = figure.add_subplot(grid[rows, :])
        if panels:
            figure.suptitle(
                "Spectra of the inputs, first block light, last dark; a dot marks how many directions are protected",
                fontsize="medium",
                color=MUTED,
            )
    for axes, (kind, sites) in zip(panels, spectra.items(), strict=True):
        shown = sorted({round(i * (len(sites) - 1) / (OVERVIEW_BLOCKS - 1)) for i in range(OVERVIEW_BLOCKS)})
        lines = [
            {
                "label": f"block {block_of(sites[i].site)}",
                "eigenvalues": sites[i].eigenvalues.tolist(),
                "rank": sites[i].rank,
            }
            for i in shown
        ]
        axes.set(xlabel="direction, by size of eigenvalue", ylabel="eigenvalue / largest")
        axes.set_title(f"{kind}, width {sites[0].width}", fontsize="medium", loc="left", weight="bold")
        _draw_spectrum(axes, lines)
    named = []
    for index, (kind, sites) in enumerate(kinds.items()):
        colour, marker = SITES[index % len(SITES)], MARKERS[index % len(MARKERS)]
        points = [(block_of(site.site), site.null_dim) for site in sites]
        free.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4)
        named.append((kind, colour, float(points[-1][1])))
    free.set(xlabel="block", ylabel="free directions")
    free.set_title("Free directions of every block", fontsize="medium", loc="left", weight="bold")
    free.set_ylim(0, 1.05 * max(1, *(site.null_dim for sites in kinds.values() for site in sites)))
    free.xaxis.set_major_locator(MaxNLocator(integer=True))
    _name_ends(free, named)
    return figure


def _draw_spectrum(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
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


def leakage(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """What reaches each layer's output on protected inputs, per layer, on a log axis.

    Args:
        lines: per run `label`, `colour`, `dots` (block, value) for every linear layer, `medians` (block, value).
    """
    figure, axes = new_figure("block", "relative change of outputs")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for index, line in enumerate(lines):
        xs, ys = zip(*line["dots"], strict=True)
        axes.scatter(xs, ys, s=7, color=line["colour"], alpha=0.3, linewidths=0, marker=MARKERS[index % len(MARKERS)])
        axes.plot(*zip(*line["medians"], strict=True), color=line["colour"])
    _name_ends(axes, [(line["label"], line["colour"], line["medians"][-1][1]) for line in lines])
    return figure


def calibration(points: Points, counts: Sequence[int]) -> Figure:
    """Share of positive human labels against the model's mean probability, per bin (`counts` responses each)."""
    figure, axes = new_figure("predicted probability", "share graded positive")
    axes.plot((0, 1), (0, 1), color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=INK, linewidth=1)
    axes.scatter(xs, ys, s=[8 + 240 * count / sum(counts) for count in counts], color=INK, zorder=3)
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    return figure


def new_figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """An empty figure of one panel in the style of all."""
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

"""The trade: safety against what it cost, one point per method and seed, with intervals: the page's first figures."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import Bbox

from nspo.report import plots
from nspo.report.compare import Measure, pooled
from nspo.report.plots import Figures
from nspo.report.runs import BASE, Run, by_method

NAMED = 6  # most methods that are named beside their points; more get a legend
PLACES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1))  # of a name beside its point
UNMOVED = {"value": 0.0, "low": 0.0, "high": 0.0}  # the base model's drift from itself
PROBES = {"kl_per_token": "kl_per_token", "kl_first_tokens": "kl_first_tokens", "refusal_rate": "over_refusal_rate"}


def trade(columns: Sequence[Measure], runs: Sequence[Run], figures: Figures) -> dict[str, list[dict[str, str]]]:
    """The figures: `first`, the unsafe rate against drift and against ability, and `more`, every other pair.

    Paths from the validation probes are drawn for the first harmful set, to which they belong.
    """
    unsafe = [column for column in columns if column.name == "unsafe_rate"]
    against = {column.name: column for column in reversed(columns) if column.name in {*PROBES, "accuracy"}}
    pairs = [(unsafe[0], against[name]) for name in ("kl_per_token", "accuracy", "kl_first_tokens", "refusal_rate")]
    pairs += [(other, against[name]) for other in unsafe[1:] for name in ("kl_per_token", "accuracy")]
    found: dict[str, list[dict[str, str]]] = {"first": [], "more": []}
    for y, x in pairs:
        if drawn := figure(runs, x, y, probes=y is unsafe[0]):
            better = "right" if not x.lower_is_better else "left"
            title = (
                f"{_asked(y)}: unsafe rate against {x.title[0].lower() + x.title[1:] if x.unit == 'rate' else x.title}"
            )
            name = "_".join(["trade", x.name, *([] if y is unsafe[0] else [y.domain]), *([y.judge] if y.judge else [])])
            entry = figures.add(name, drawn, f"{title} (better: down and {better})")
            found["first" if (y, x) in pairs[:2] else "more"].append(entry)
    return found


def figure(runs: Sequence[Run], x: Measure, y: Measure, probes: bool) -> Figure | None:
    """The unsafe rate `y` of every method against `x`; None where no method has both.

    Args:
        probes: whether paths through training are drawn, on validation prompts.
    """
    methods = [_ends(method, of, x, y, probes) for method, of in by_method(runs).items()]
    if not any(method["end"] for method in methods[1:]):
        return None
    unit = {"nats": "nats", "rate": "share of prompts"}[x.unit]
    return draw(methods, f"{x.title} ({unit})", f"Unsafe answers, {_asked(y)}", x.unit == "rate")


def _asked(y: Measure) -> str:
    """The harmful set, and the judge where it is not the cost model."""
    return f"{y.domain}, by {y.judge}" if y.judge else y.domain


def _ends(method: str, runs: Sequence[Run], x: Measure, y: Measure, probes: bool) -> dict[str, Any]:
    """One method's path, seeds and end (see `draw`)."""
    label, start = PROBES.get(x.name), UNMOVED if method == BASE and x.axis == "drift" else None
    ends = [
        (start or run.score(x.axis, x.name, x.domain), run.score(y.axis, y.name, y.domain, y.judge)) for run in runs
    ]
    points = [(a["value"], b["value"]) for a, b in ends if a and b]
    both = start or pooled(runs, x), pooled(runs, y)
    paths = [
        [(row[label], row["unsafe_rate"]) for row in run.probes if None not in (row.get(label), row.get("unsafe_rate"))]
        for run in runs
        if label
    ]
    return {
        "label": method,
        "colour": runs[0].colour,
        "paths": [path for path in paths if path] if probes else [],
        "seeds": points if len(points) > 1 else [],
        "end": {k: (s["value"], s["low"], s["high"]) for k, s in zip("xy", both, strict=True) if s}
        if all(both)
        else None,
    }


def draw(methods: Sequence[Mapping[str, Any]], x_label: str, y_label: str, percent: bool) -> Figure:
    """Safety against what it cost: each run's path through training, and where it ended on held-out prompts.

    Args:
        methods: per method `label`, `colour`, `paths` (per seed, points (x, y) by step on validation prompts), `seeds`
            (where each of several seeds ended) and `end` (`x`, `y`, each (value, low, high), pooled) or None.
        percent: x is a share, as y always is.
    """
    figure, axes = plots.new_figure(x_label, y_label)
    for method in methods:
        for path in method["paths"]:
            xs, ys = zip(*path, strict=True)
            axes.plot(xs, ys, color=method["colour"], alpha=0.4, linewidth=1, marker="o", markersize=2)
        for point in method["seeds"]:
            axes.plot(*point, "o", color=method["colour"], alpha=0.75, markersize=3.5, linestyle="none")
    drawn = [method for method in methods if method["end"]]
    for place, method in enumerate(drawn):
        (x, x_low, x_high), (y, y_low, y_high) = method["end"]["x"], method["end"]["y"]
        style: dict[str, Any] = {"xerr": [[x - x_low], [x_high - x]], "yerr": [[y - y_low], [y_high - y]]}
        style |= {"fmt": plots.MARKERS[place % len(plots.MARKERS)], "color": method["colour"]}
        axes.errorbar(x, y, **style, markersize=7, markeredgecolor="white", elinewidth=1.2, label=method["label"])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=-0.03)
    axes.xaxis.set_major_locator(MaxNLocator(5))  # numbers of many digits stay apart
    if percent:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.margins(x=0.12)
    if len(drawn) > NAMED:
        figure.legend(loc="outside lower center", ncols=3, fontsize=6.5, frameon=False, handletextpad=0.3)
    else:
        _name_points(axes, [(m["label"], m["colour"], m["end"]["x"][0], m["end"]["y"][0]) for m in drawn])
    return figure


def _name_points(axes: Axes, names: Sequence[tuple[str, str, float, float]]) -> None:
    """Write each (label, colour, x, y) beside its point: where it covers no other point and no other label."""
    axes.autoscale_view()
    canvas = FigureCanvasAgg(cast(Figure, axes.figure))
    axes.figure.draw(canvas.get_renderer())  # fixes the scale, so that sizes of text can be asked for
    renderer = canvas.get_renderer()
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform([n[2:] for n in names])]
    inside = axes.get_window_extent(renderer).expanded(1.0, 1.04)
    for label, colour, x, y in names:
        for horizontal, vertical in PLACES:
            text = axes.annotate(
                label,
                (x, y),
                (8 * horizontal, 8 * vertical),
                textcoords="offset points",
                ha={1: "left", 0: "center", -1: "right"}[horizontal],
                va={1: "bottom", 0: "center", -1: "top"}[vertical],
                color=colour,
                weight="bold",
            )
            box = text.get_window_extent(renderer)
            fits = inside.containsx(box.x0) and inside.containsx(box.x1) and inside.containsy(box.y1)
            if (fits and box.count_overlaps(taken) == 0) or (horizontal, vertical) == PLACES[-1]:
                taken.append(box)
                break
            text.remove()

"""A figure per varied key and measure: what the measure does as the key changes and the others stay."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nspo.report import plots
from nspo.report.runs import BASE
from nspo.report.study.keys import shown
from nspo.report.study.rows import POOLED, Column, Row

LINES = (plots.KNOWN["nspo"], plots.KNOWN["grpo_no_kl"], plots.KNOWN["grpo"], *plots.SPARE)
LONGEST = 14  # characters of a value at the axis; where one is longer, all are called by their variants
SLANTED = 6  # characters from which labels stand slanted

Values = Mapping[str, Mapping[str, Any]]  # key -> variant -> value
Point = tuple[Any, Row]  # a value of the key, and a row that has it
Place = tuple[str, ...]  # a method, and the other keys as they are written


def series(key: str, values: Values, rows: Sequence[Row], names: Mapping[str, str]) -> dict[str, list[Point]]:
    """Rows that differ in `key` alone, by what tells each choice of the other keys from the next.

    Keys that only change together with another, as a rule and its threshold, are one series of the rows that differ in
    these two; all rows where more change together.
    """
    trained = [row for row in rows if row.method != BASE and row.variant in values[key]]
    others = [other for other in values if other != key]
    apart = [*others, None]  # the one that may differ as well; None first
    for free in sorted(apart, key=lambda other: other is not None):
        kept = [other for other in others if other != free]
        groups = _groups(key, values, trained, kept)
        if groups and (free is None or max(map(len, groups.values())) > 2):
            return _labelled(groups, kept, names) if free is None else {"": max(groups.values(), key=len)}
    return {"": [(values[key][row.variant], row) for row in trained]}


def _groups(key: str, values: Values, rows: Sequence[Row], kept: Sequence[str]) -> dict[Place, list[Point]]:
    """The rows with several values of `key` that are alike in all of `kept`, by these."""
    groups: dict[Place, list[Point]] = {}
    for row in rows:
        place = (row.method, *(shown(values[other].get(row.variant, "")) for other in kept))
        groups.setdefault(place, []).append((values[key][row.variant], row))
    return {place: points for place, points in groups.items() if len({shown(value) for value, _ in points}) > 1}


def _labelled(
    groups: Mapping[Place, list[Point]], kept: Sequence[str], names: Mapping[str, str]
) -> dict[str, list[Point]]:
    telling = [index for index in range(len(kept) + 1) if len({place[index] for place in groups}) > 1]
    said = ["", *(names[other].rpartition(".")[2] + " " for other in kept)]
    return {", ".join(f"{said[i]}{place[i]}" for i in telling): points for place, points in groups.items()}


def draw(found: Mapping[str, Sequence[Point]], column: Column, label: str, base: Sequence[Row]) -> Figure | None:
    """One measure over one key; None where no row has it. The base model, where it is one, is a dashed line.

    Values stand side by side, numbers in order and joined by a line.
    """
    drawn = {name: [(v, row) for v, row in points if row.scores.get(column.key)] for name, points in found.items()}
    variants: dict[str, tuple[Any, str]] = {}  # value as written -> itself, and the first variant that has it
    for value, row in chain.from_iterable(drawn.values()):
        variants.setdefault(shown(value), (value, row.variant))
    if not variants:
        return None
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value, _ in variants.values())
    order = sorted(variants, key=lambda text: variants[text][0]) if numeric else list(variants)
    figure, axes = plots.new_figure(label, column.title)
    for index, (name, points) in enumerate(drawn.items()):
        _line(axes, points, column.key, order, {"label": name, "index": index, "joined": numeric and len(points) > 1})
    known = {row.scores[column.key]["value"] for row in base if row.scores.get(column.key)}
    if len(known) == 1:
        axes.axhline(known.pop(), color=plots.BASE, linestyle=(0, (4, 3)), linewidth=1)
    labels = order if max(map(len, order)) <= LONGEST else [variants[text][1] for text in order]
    slanted = max(map(len, labels)) > SLANTED
    axes.set_xticks(range(len(order)), labels, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axes.margins(x=0.12)
    axes.set_ylim(bottom=0)
    if column.unit == "rate":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(drawn) > 1:
        figure.legend(loc="outside lower center", ncols=2, fontsize=6.5, frameon=False)
    return figure


def _line(axes: Axes, points: Sequence[Point], key: str, order: Sequence[str], how: Mapping[str, Any]) -> None:
    """One series: means with their intervals, and the seeds behind a pooled one as small dots."""
    colour, marker = LINES[how["index"] % len(LINES)], plots.MARKERS[how["index"] % len(plots.MARKERS)]
    scores = sorted(
        ((order.index(shown(value)), row.variant, row.seed == POOLED, row.scores[key]) for value, row in points),
        key=lambda score: score[:2],
    )
    pooled = {variant for _, variant, mean, _ in scores if mean}
    seeds = [(x, score["value"]) for x, variant, mean, score in scores if not mean and variant in pooled]
    axes.plot([x for x, _ in seeds], [y for _, y in seeds], "o", color=colour, alpha=0.5, markersize=3)
    ends = [(x, score) for x, variant, mean, score in scores if mean or variant not in pooled]
    means, *_ = axes.errorbar(
        [x for x, _ in ends],
        [score["value"] for _, score in ends],
        yerr=[[abs(score["value"] - score.get(end, score["value"])) for _, score in ends] for end in ("low", "high")],
        fmt=marker + ("-" if how["joined"] else ""),
        color=colour,
        markeredgecolor="white",
        elinewidth=1,
        label=how["label"],
    )
    means.set_clip_on(False)  # a point at 0 is a whole one, and rounding may put a KL below

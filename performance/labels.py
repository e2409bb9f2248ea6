"""Labels for a figure of many points, placed so that none hides another, a point or a line."""

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from nspo.report import plots

DISTANCES = (7, 14, 22, 32, 44, 60, 80)  # of a label from its point
LEADER: Any = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}  # from a label to its point
SPOTS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))  # around a point, right and up


def place_labels(figure: Figure, axes: Axes, labels: Sequence[tuple[str, str, tuple[float, float]]]) -> None:
    """Write each (text, colour, point) at the nearest spot to its point that no other label, point or line takes."""
    canvas = FigureCanvasAgg(figure)
    with matplotlib.rc_context(plots.STYLE):
        canvas.draw()
    figure.set_layout_engine("none")  # the labels must not move the axes again
    paths = [line.get_path().transformed(line.get_transform()).interpolated(40).vertices for line in axes.lines]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in np.concatenate(paths)]
    for text, colour, point in labels:
        for distance, (right, up) in itertools.product(DISTANCES, SPOTS):
            note = axes.annotate(
                text,
                point,
                (right * distance, up * distance),
                textcoords="offset points",
                color=colour,
                fontsize=8,
                ha={1: "left", 0: "center", -1: "right"}[right],
                va={1: "bottom", 0: "center", -1: "top"}[up],
                arrowprops=LEADER | {"color": colour} if distance > DISTANCES[0] else None,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
            note.update_positions(canvas.get_renderer())
            box = Text.get_window_extent(note, canvas.get_renderer())  # of the text without its line
            clear = not any(box.overlaps(other) for other in taken)
            if clear and all(axes.bbox.contains(*corner) for corner in box.corners()):
                break
            note.remove()
        else:
            raise ValueError(f"no room for the label {text!r}: make the figure larger")
        taken.append(box)

"""The paper's statements about the constraint, checked on the run itself: one summary of what every update logged.

*Descent*: <g, P g> >= 0, taken from both gradients, so that an update along P g still descends. *Stability*: the
projection never enlarges a gradient, ||P g|| / ||g|| <= 1. *Preservation*: nothing leaks into the protected range. (The
authors' release measures none of them.) The first two speak of gradients: AdamW's moments come after, and only the
third says what became of the weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def theory(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None] | None:
    """The worst case of each statement over the rows of a training log; None where no gradient was projected.

    Returns:
        `updates` that projected; `least_descent`, the smallest <g, P g>; `least_kept` and `most_kept`, of
        ||P g|| / ||g||; `most_leakage`, the largest relative leakage of any layer at any probe, None without a probe.
    """
    projected = [row for row in rows if "descent" in row]
    if not projected:
        return None
    kept = [row["kept"] for row in projected]
    return {
        "updates": len(projected),
        "least_descent": min(row["descent"] for row in projected),
        "least_kept": min(kept),
        "most_kept": max(kept),
        "most_leakage": max((row["leakage"] for row in projected if "leakage" in row), default=None),
    }

"""Coverage: which share of the weights of a model's blocks a basis constrains, which is frozen, which trains freely."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_BLOCK = re.compile(r"(?:^|.*?\.)(\d+)\.")


def block_weights(sizes: Mapping[str, int], layers: Iterable[str]) -> dict[str, int]:
    """Those of the parameters `sizes` {name: count} that lie in the blocks that `layers` are in; all without blocks."""
    matches = [match for layer in layers if (match := _BLOCK.match(layer))]
    prefixes = {match[0][: match.start(1)] for match in matches}
    inside = re.compile("|".join(rf"{re.escape(prefix)}\d+\." for prefix in sorted(prefixes)))
    return {name: count for name, count in sizes.items() if not prefixes or inside.match(name)}


def coverage(blocks: Mapping[str, int], constrained: int, unprotected: Collection[str]) -> dict[str, Any]:
    """Shares of the weights of the blocks, which add up to one.

    Args:
        blocks: the parameters of the blocks, {name: count}.
        constrained: how many of their weights a basis lets move in its null space.
        unprotected: names of parameters that move without a basis.

    Returns:
        `weights`, how many there are; `constrained`, `frozen` and `unprotected`, the shares.
    """
    total = sum(blocks.values())
    free = sum(blocks[name] for name in unprotected if name in blocks)
    shares = {"constrained": constrained, "frozen": total - constrained - free, "unprotected": free}
    return {"weights": total, **{name: count / total for name, count in shares.items()}}


def coverage_line(found: Mapping[str, Any]) -> str:
    """The same in words."""
    return (
        f"of {found['weights']} weights in the blocks {found['constrained']:.1%} constrained, {found['frozen']:.1%} "
        f"frozen, {found['unprotected']:.1%} train unprotected"
    )

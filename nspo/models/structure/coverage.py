"""Coverage: which share of the weights of a model's blocks a basis constrains, which is frozen, which trains freely."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nspo.models.structure.linears import locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def blocks_of(model: "PreTrainedModel", layers: Iterable[str], collected: Collection[str]) -> dict[str, Any]:
    """What a manifest says of the blocks of a model that is to be constrained at `layers`.

    Args:
        collected: the domains whose inputs were collected.

    Returns:
        JSON-like: `weights`, how many the blocks have; `layers` {name: count}; `frozen` {kind of parameter: count},
        those that no layer has, such as norms, routers and convolutions; and of the kinds of input beside text that the
        model reads, `protected_inputs` and `unprotected_inputs`.
    """
    from nspo.models.folders.classes import other_inputs  # here: a constraint needs no transformers

    places = locate(model, layers)
    inside = block_weights({name: parameter.numel() for name, parameter in model.named_parameters()}, places)
    rest: dict[str, int] = {}
    for name in inside.keys() - {place.key for place in places.values()}:
        kind = re.sub(r"\.\d+(?=\.|$)", ".*", _BLOCK.sub("", name, count=1))
        rest[kind] = rest.get(kind, 0) + inside[name]
    return {
        "weights": sum(inside.values()),
        "layers": {layer: place.size for layer, place in places.items()},
        "frozen": rest,
        **inputs_beside_text(other_inputs(model.config), collected),
    }


def inputs_beside_text(kinds: Iterable[str], protected: Collection[str]) -> dict[str, list[str]]:
    """Kinds of input that are `protected_inputs`, by a domain of their name, and `unprotected_inputs`."""
    parts: dict[str, list[str]] = {"protected_inputs": [], "unprotected_inputs": []}
    for kind in kinds:
        parts["protected_inputs" if kind in protected else "unprotected_inputs"].append(kind)
    return parts


def narrowed(blocks: Mapping[str, Any], protected: Collection[str]) -> dict[str, Any]:
    """The same blocks, of whose inputs beside text no others than those of `protected` are."""
    kinds = [*blocks.get("protected_inputs", ()), *blocks["unprotected_inputs"]]
    return {**blocks, **inputs_beside_text(kinds, protected)}


def coverage_of(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The coverage that a bases file gives when all else is frozen; None of a file that does not record it.

    Beside the shares: `kinds`, frozen kinds of parameter, most first; `idle`, sites without a free direction;
    `protected_inputs` and `unprotected_inputs` beside text.
    """
    blocks = manifest.get("blocks")
    if not blocks:
        return None
    sites = manifest["sites"].values()
    moving = sum(blocks["layers"].get(layer, 0) for site in sites if site["null_dim"] for layer in site["layers"])
    return {
        **coverage({"": blocks["weights"]}, moving, ()),
        "kinds": sorted(blocks["frozen"], key=lambda kind: (-blocks["frozen"][kind], kind)),
        "idle": [site["site"] for site in sites if not site["null_dim"]],
        "protected_inputs": blocks.get("protected_inputs", []),
        "unprotected_inputs": blocks["unprotected_inputs"],
    }


def in_words(found: Mapping[str, Any] | None) -> str:
    """`coverage_of` in a sentence, for people."""
    if found is None:
        return "not recorded"
    idle, kinds = found["idle"], found["kinds"]
    stuck = f"; {len(idle)} sites without a free direction ({_some(idle)})" if idle else ""
    frozen = f" (among them {_some(kinds)})" if kinds else ""
    seen, unseen = (" and ".join(found[f"{which}_inputs"]) for which in ("protected", "unprotected"))
    beside = f"; {seen} inputs are protected as text is" * bool(seen)
    beside += f"; {unseen} inputs are unprotected, none were collected" * bool(unseen)
    return (
        f"{found['constrained']:.1%} of the {found['weights']} weights of the blocks constrained, "
        f"{found['frozen']:.1%} frozen{frozen}{stuck}{beside}"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)

"""What a bases file holds, in words and tables: per site, per kind of site, and what names its model, rule and data.

Sites of one *kind* read the same place of different blocks: every block's q, k and v, say. Command:
`nspo bases info FILE`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nspo.models.structure.coverage import coverage_of, in_words

if TYPE_CHECKING:
    from nspo.bases.file import NullSpaceBases
    from nspo.nullspace.basis import SiteBasis

MEASURES = ("energy_kept", "leakage", "harmful_energy", "ratio")
_BLOCK = re.compile(r"(?:^|.*?\.)(\d+)\.")  # up to the first number, which counts the blocks


def find_block(name: str) -> int | None:
    """Index of the decoder block in a layer's or tensor's full name; None outside any."""
    match = _BLOCK.match(name)
    return int(match[1]) if match else None


def block_of(layer: str) -> int:
    """The same with 0 for a layer outside any block."""
    return find_block(layer) or 0


def kind_of(layers: Sequence[str]) -> str:
    """What the layers that read one input are called in every block: `self_attn.q/k/v_proj`; experts share a kind."""
    names: dict[str, list[str]] = {}
    for layer in layers:
        parent, _, name = re.sub(r"\.\d+(?=\.|$)", ".*", _BLOCK.sub("", layer, count=1)).rpartition(".")
        names.setdefault(parent, []).append(name)
    joined = (("/".join(parts).replace("_proj/", "/"), parent) for parent, parts in names.items())
    return " + ".join(f"{parent}.{name}" if parent else name for name, parent in joined)


def by_kind(bases: "NullSpaceBases") -> dict[str, list["SiteBasis"]]:
    """The sites of every kind in order of their blocks; attention comes before the MLP, and inputs before outputs."""
    kinds: dict[str, list[SiteBasis]] = {}
    for site in sorted(bases.values(), key=lambda site: block_of(site.site)):
        kinds.setdefault(kind_of(site.layers), []).append(site)
    return {kind: kinds[kind] for kind in sorted(kinds, reverse=True)}


def site_rows(bases: "NullSpaceBases") -> list[dict[str, Any]]:
    """One row per site, in order of the blocks."""
    columns = ("site", "width", "rank", "null_dim", "tokens", *MEASURES)
    sites = [site for sites in by_kind(bases).values() for site in sites]
    return [
        {column: getattr(site, column) for column in columns}
        for site in sorted(sites, key=lambda site: block_of(site.site))
    ]


def kind_rows(bases: "NullSpaceBases") -> list[dict[str, Any]]:
    """One row per kind: how many sites, and means over them; None where no site of the kind was measured."""
    return [
        {
            "kind": kind,
            "sites": len(sites),
            **{key: _mean([getattr(site, key) for site in sites]) for key in ("width", "rank", "null_dim")},
            "free": fmean(site.null_dim / site.width for site in sites),
            **{key: _mean([getattr(site, key) for site in sites]) for key in MEASURES},
        }
        for kind, sites in by_kind(bases).items()
    ]


def facts(bases: "NullSpaceBases") -> dict[str, str]:
    """What names the model, the rule and the data; "not recorded" for what the file does not say."""
    model = bases.manifest.get("model", {})
    rules = sorted({f"{site.rule}, threshold {site.threshold:.3g}" for site in bases.values()})
    data = [
        f"{row['domain']} {row['basis']} tokens ({row['validation']} of validation)"
        for row in data_rows(bases.manifest)
    ]
    source = model.get("source")
    return {
        "model": str(model.get("architecture", "not recorded")),
        **({"source": source + (f"@{model['revision']}" if model.get("revision") else "")} if source else {}),
        "weights": str(model.get("weights", "not recorded")),
        "tokenizer": str(model.get("tokenizer", "not recorded")),
        "rule": "; ".join(rules) + _weights(bases.manifest),
        "data": "; ".join(data) or "not recorded",
        "coverage": in_words(coverage_of(bases.manifest)),
    }


def data_rows(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per domain: `domain` and how many tokens chose the basis (`basis`) and measured it (`validation`).

    Merged bases list the domains of each file, numbered; bases that do not record their data give no rows.
    """
    merged = manifest.get("merged")
    return [
        {"domain": f"{domain} (file {number})" if merged else domain, "basis": 0, "validation": 0, **tokens}
        for number, part in enumerate(merged or [manifest], 1)
        for domain, tokens in sorted(part.get("domains", {}).items())
    ]


def memory(bases: "NullSpaceBases", file: Path) -> dict[str, str]:
    """What the file and the constraint cost."""
    held = sum(site.basis.nbytes for site in bases.values())
    return {
        "file": f"{file.stat().st_size / 1e6:.1f} MB",
        "memory": f"{held / 1e6:.1f} MB on the training device, and a copy of the constrained weights as the anchor",
    }


def _weights(manifest: Mapping[str, Any]) -> str:
    weights = manifest.get("settings", {}).get("weights", {})
    return "".join(f", {domain} weighs {weight:g}" for domain, weight in weights.items())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None

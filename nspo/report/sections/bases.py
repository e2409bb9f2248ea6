"""The section on directions: which are protected, and what first steps in other spaces would have cost."""

from pathlib import Path
from typing import Any

from nspo.bases.table import block_of, kind_of
from nspo.files.manifest import read_json
from nspo.files.tensors import read_tensor_manifest
from nspo.models.structure.coverage import coverage_of, in_words
from nspo.report import plots
from nspo.report.plots import Figures
from nspo.report.sections.leakage import _cycle, _mean, _spread

SPECTRUM_BLOCKS = 5


def bases(path: Path, figures: Figures) -> dict[str, Any]:
    """Spectra, protected share per block, and means per kind of site, from the bases file."""
    from safetensors import safe_open

    manifest = read_tensor_manifest(path, "bases")
    kinds: dict[str, list[dict[str, Any]]] = {}
    # Names within a block in reverse: attention comes before the MLP, and inputs before outputs.
    for name, row in sorted(manifest["sites"].items(), key=lambda item: item[0].split(".")[::-1], reverse=True):
        shares = {
            "protected_share": row["rank"] / row["width"],
            "escaped_energy": None if row["leakage"] is None else row["leakage"] ** 2,
        }
        kinds.setdefault(kind_of(row["layers"]), []).append({**row, **shares, "block": block_of(name), "name": name})
    found = []
    with safe_open(path, framework="numpy") as file:
        for index, (kind, sites) in enumerate(kinds.items()):
            lines = [
                {
                    "label": f"block {site['block']}",
                    "eigenvalues": file.get_tensor(f"{site['name']}/eigenvalues").tolist(),
                    "rank": site["rank"],
                }
                for site in _spread(sorted(sites, key=lambda site: site["block"]), SPECTRUM_BLOCKS)
                if file.get_slice(f"{site['name']}/eigenvalues").get_shape() != [0]  # merged bases have no spectrum
            ]
            if lines:
                found.append(figures.add(f"spectrum_{index}", plots.spectrum(lines), f"Spectrum of the {kind} input"))
    for key, title in (
        ("protected_share", "Protected share of directions"),
        ("escaped_energy", "Held-out energy outside the protected range"),
    ):
        curves = []
        for (kind, sites), colour in zip(kinds.items(), _cycle(plots.SITES, len(kinds)), strict=True):
            points = sorted((site["block"], site[key]) for site in sites if site[key] is not None)
            if points:
                curves.append((kind, colour, points))
        if curves:
            found.append(figures.add(f"bases_{key}", plots.curves(curves, "block", "share", percent=True), title))
    means = ("width", "rank", "null_dim", "energy_kept", "leakage", "harmful_energy", "ratio", "tokens")
    rows = [
        {"kind": kind, "sites": len(sites), **{key: _mean([site[key] for site in sites]) for key in means}}
        for kind, sites in kinds.items()
    ]
    first = next(iter(manifest["sites"].values()))
    return {
        "figures": found,
        "rows": rows,
        "rule": first["rule"],
        "threshold": first["threshold"],
        "manifest": manifest,
        "coverage": in_words(coverage_of(manifest)),
    }


def screened(path: Path, figures: Figures) -> dict[str, Any]:
    """The rows of the screen, cheapest first for every batch, and the cost over the batch, a line a space."""
    rows = read_json(path)["rows"]
    lines: dict[str, list[tuple[float, float]]] = {}
    first = next((row["mode"] for row in rows if row["space"] not in ("none", "random")), None)
    for row in sorted(rows, key=lambda row: row["answers"]):
        if row["cost"] is not None and (row["mode"] in (first, "sign")):
            lines.setdefault(f"{row['space']}, {row['mode']}", []).append((row["answers"], row["cost"]))
    colours = [*plots.SITES, *plots.SPARE]
    drawn = [(name, colours[place % len(colours)], points) for place, (name, points) in enumerate(lines.items())]
    if not drawn:
        return {"rows": rows, "figures": []}
    figure = plots.curves(drawn, "answers behind the gradient", "KL per token / gain squared", log=True)
    return {"rows": rows, "figures": [figures.add("screen", figure, "What a first step costs for its gain")]}

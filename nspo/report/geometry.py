"""The sections on directions: which are protected, and what reaches protected inputs (the certificates)."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from nspo import plots
from nspo.artifacts import read_tensor_manifest
from nspo.bases_table import block_of, kind_of
from nspo.report.data import Run, trained_runs
from nspo.report.figures import Figures

SPECTRUM_BLOCKS = 5
LEAKAGE_FIGURES = (  # column, the column of a random update of equal norm, title
    ("leakage_heldout", "random_equal_norm", "Held-out general inputs"),
    ("leakage_basis", "random_basis", "Protected directions"),
)


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
    }


def leakage(runs: Sequence[Run], figures: Figures) -> dict[str, Any]:
    """Leakage per layer, beside random updates of equal norm, and one summary row per certificate.

    With it what the run itself says of the theory (`nspo.policy.theory`), where it projected gradients.
    """
    certified = [run for run in trained_runs(runs) if run.certificate]
    found = []
    for column, random, title in LEAKAGE_FIGURES:
        lines = [_leakage_line(run, column, run.label, run.colour) for run in certified]
        lines += [_leakage_line(run, random, f"random, as {run.label}", plots.MUTED) for run in certified[:1]]
        if lines := [line for line in lines if line["dots"]]:
            found.append(figures.add(column, plots.leakage(lines), title))
    rows = [
        {
            "run": run,
            "constrained": run.certificate["constrained"],
            "layers": len(run.certificate["layers"]),
            "summary": run.certificate["summary"],
            "theory": run.settings.get("theory"),
        }
        for run in certified
        if run.certificate
    ]
    return {"figures": found, "rows": rows}


def _leakage_line(run: Run, column: str, label: str, colour: str) -> dict[str, Any]:
    layers = (run.certificate or {})["layers"]
    values = [(block_of(name), _all(layer.get(column))) for name, layer in layers.items()]
    dots = sorted((block, value) for block, value in values if value)  # a log axis has no place for exact zeros
    blocks = sorted({block for block, _ in dots})
    medians = [(block, median(value for at, value in dots if at == block)) for block in blocks]
    return {"label": label, "colour": colour, "dots": dots, "medians": medians}


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly from first to last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _cycle(items: Sequence[str], count: int) -> list[str]:
    return [items[i % len(items)] for i in range(count)]


def _all(value: Any) -> float | None:
    return value.get("all") if isinstance(value, dict) else value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None

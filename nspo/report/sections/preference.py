"""The section on judges: how far the reward and cost models agree with people."""

from pathlib import Path
from typing import Any

from nspo.files.manifest import MANIFEST_NAME, read_json
from nspo.report import plots
from nspo.report.plots import Figures


def preference(name: str, folder: Path, figures: Figures) -> dict[str, Any]:
    """Agreement of the reward or cost model with held-out human labels, beside its baselines, and its calibration."""
    metrics = read_json(folder / "metrics.json")
    heldout = metrics["heldout"]
    baselines = heldout.get("baselines", {})
    rows = [
        {"label": f"{name} model", "accuracy": heldout.get("accuracy"), "auroc": heldout.get("auroc")},
        *(
            {"label": key.replace("_", " "), **{k: b.get(k) for k in ("accuracy", "auroc")}}
            for key, b in baselines.items()
        ),
    ]
    if pairs := heldout.get("pairs"):
        rows.append({"label": f"{name} model, pairs", "accuracy": pairs["accuracy"], "auroc": None})
        rows += [
            {"label": f"{key.replace('_', ' ')}, pairs", "accuracy": value, "auroc": None}
            for key, value in pairs["baselines"].items()
        ]
    bins = [b for b in heldout.get("calibration", {}).get("bins", []) if b["n"]]
    figure = None
    if bins:
        points = [(b["predicted"], b["positive"]) for b in bins]
        drawn = plots.calibration(points, [b["n"] for b in bins])
        figure = figures.add(f"calibration_{name}", drawn, f"Calibration of the {name} model")
    return {
        "name": name,
        "rows": rows,
        "figure": figure,
        "n": heldout["n"],
        "positives": heldout["positives"],
        "prompts": heldout.get("prompts"),
        "pairs": heldout.get("pair_accuracy"),
        "error": heldout.get("calibration", {}).get("expected_calibration_error"),
        "sign": metrics.get("sign", ""),
        "cut": {
            split: count for split, count in metrics.get("cut", {}).items() if count["prompts"] or count["answers"]
        },
        "max_tokens": metrics.get("settings", {}).get("max_tokens"),
        "manifest": read_json(folder / MANIFEST_NAME) if (folder / MANIFEST_NAME).is_file() else None,
    }

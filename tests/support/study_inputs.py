"""What the page of a study reads, made up: the configuration and the summary of every variant."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nspo.cli.config_files import commented_yaml
from nspo.report.study.stage import write_study
from nspo.report.summary import COLUMNS
from nspo.settings.reading import check_config
from nspo.settings.study import variants

METHODS = {"methods": {"main": {"objective": "nspo", "learning_rate": 1e-4}}}
STUDY = {
    "variants": {"plain": None, 'R&D "free"': {"policy.methods.main.constraint": {"kind": "none"}}},
    "grids": {"rule": {"bases": [{"rule": "energy", "threshold": share} for share in (0.9, 0.95)]}},
}
SCORES = (  # axis, name, domain, unit
    ("safety", "unsafe_rate", "advbench", "rate"),
    ("safety", "unsafe_rate", "harmbench", "rate"),
    ("over_refusal", "refusal_rate", "benign", "rate"),
    ("ability", "accuracy", "all", "rate"),
    ("drift", "kl_per_token", "seen", "nats"),
    ("drift", "kl_per_token", "unseen", "nats"),
    ("drift", "kl_per_token", "maths", "nats"),
)


def summary(place: int, seeds: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of the variant at this place of the study: its values rise with the place and the seed."""
    lines = []
    for method, seed in (("base", "0"), *(("main", seed) for seed in seeds)):
        for axis, name, domain, unit in SCORES:
            if method == "main" or axis != "drift":
                value = 0.5 if method == "base" else 0.1 * (place + 1) + 0.01 * (seed == "1")
                value /= 10 if unit == "nats" else 1
                line = {"method": method, "seed": seed, "prompts": "heldout", "axis": axis, "name": name, "unit": unit}
                line |= {"domain": domain, "judge": "cost_model", "value": value, "low": value / 2, "high": value * 1.5}
                lines.append({**line, "n": 80, "failures": 0})
        if method == "main" and seed != "pooled":
            lines.append(
                {"method": method, "seed": seed, "axis": "matching", "name": "scale", "value": 0.7 + 0.1 * place}
            )
            for name in ("leakage_basis", "leakage_validation"):
                lines.append(
                    {"method": method, "seed": seed, "axis": "certificate", "name": name, "value": 10.0**-place}
                )
    return lines


def write(folder: Path, seeds: Sequence[str] = ("0",), study: Mapping[str, Any] = STUDY) -> Path:
    """Write the page of a made-up study into `folder` and return it; study.csv and plots stand beside it."""
    config = check_config({"policy": METHODS, "study": study})
    folders = []
    for place, (name, variant) in enumerate(variants(config, "study").items()):
        folders.append(folder / "variants" / name)
        folders[-1].mkdir(parents=True)
        (folders[-1] / "config.yaml").write_text(commented_yaml(variant))
        with (folders[-1] / "summary.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(summary(place, seeds))
    write_study(folders, folder / "study.html", folder / "study.csv", folder / "plots")
    return folder / "study.html"

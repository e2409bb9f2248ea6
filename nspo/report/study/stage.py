"""The page of a study: one row per variant and seed, the keys that differ beside what they did, and a figure per key.

Nothing is measured here: the figures are those of every variant's own summary.csv, and what differs is read from the
configurations beside them. The page is one file that loads nothing; its script sorts and filters, and without it the
table is whole. Equal inputs give equal bytes.

Command: `nspo study --variants results/study/variants/* --out study.html --table study.csv --plots plots`
"""

import os
from pathlib import Path
from statistics import mode
from typing import Any
from urllib.parse import quote

from nspo.errors import UserError
from nspo.files.atomic import atomic_path
from nspo.files.manifest import make_manifest
from nspo.report.html import render
from nspo.report.plots import Figures
from nspo.report.runs import BASE
from nspo.report.study.keys import short, shown, varied
from nspo.report.study.plots import draw, series
from nspo.report.study.rows import Column, Row, load_rows, load_variants, write_table
from nspo.run.progress import track

DRAWN = ("unsafe_rate", "kl_per_token", "refusal_rate", "accuracy")  # the first column of each, which open the table


def write_study(variants: list[Path], out: Path, table: Path, plots: Path) -> None:
    """Write the page `out`, the same as `table` (CSV), and the folder `plots` with every figure as PNG and SVG.

    Args:
        variants: folders, each with config.yaml, summary.csv and report.html of one variant, whose name it has.

    Raises:
        UserError: for two folders of one name, or one that lacks a file.
    """
    if twice := {folder.name for folder in variants if [it.name for it in variants].count(folder.name) > 1}:
        raise UserError(f"{min(twice)}: found two variants of this name", expected="each once")
    configs = load_variants(variants)
    columns, rows = load_rows(variants, configs)
    values = varied(configs)
    names = short(list(values))
    drawn = [column for name in DRAWN if (column := next((it for it in columns if it.score["name"] == name), None))]
    with atomic_path(plots) as folder:
        folder.mkdir()
        figures = _figures(values, names, drawn, rows, Figures(folder))
    written = {key: {variant: shown(value) for variant, value in of.items()} for key, of in values.items()}
    links = {folder.name: quote(os.path.relpath(folder / "report.html", out.parent)) for folder in variants}
    page: dict[str, Any] = {
        "configs": configs,
        "columns": sorted(columns, key=lambda column: (not column.headline, column not in drawn)),
        "rows": rows,
        "base": BASE,
        "keys": written,
        "names": names,
        "usual": {key: mode(of.values()) for key, of in written.items()},
        "links": links,
        "figures": figures,
        "models": sorted({config.model.source for config in configs.values()}),
        "methods": list(dict.fromkeys(row.method for row in rows if row.method != BASE)),
        "seeds": list(dict.fromkeys(row.seed for row in rows if row.method != BASE)),
        "version": make_manifest("study")["nspo_version"],
    }
    with atomic_path(table) as scratch:
        write_table(columns, rows, written, scratch)
    with atomic_path(out) as scratch:
        scratch.write_text(render(page, "study"), encoding="utf-8")


def _figures(
    values: dict[str, dict[str, Any]], names: dict[str, str], drawn: list[Column], rows: list[Row], figures: Figures
) -> dict[str, list[dict[str, str]]]:
    """Per key the figures of the drawn measures."""
    found: dict[str, list[dict[str, str]]] = {}
    base = [row for row in rows if row.method == BASE]
    with track("study", len(values), "key") as bar:
        for key in values:
            of_key = series(key, values, rows, names)
            found[key] = []
            for column in drawn:
                if figure := draw(of_key, column, names[key], base):
                    name = f"{key}_{column.key}".replace("/", "-")
                    found[key].append(figures.add(name, figure, column.title))
            bar.update()
    return found

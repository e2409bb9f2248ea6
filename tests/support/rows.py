"""Files of rows, as data sets publish them."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write(path: Path, rows: Any) -> None:
    """Rows in the form that the suffix of `path` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))


WORDS = ["add", "the", "two", "numbers", "and", "write", "a", "short", "poem", "about", "rivers", "in", "spring"]


def prompt_file(path: Path) -> Path:
    """Ten prompts of different lengths for each of two general domains, harmful and benign, in every split."""
    rows = []
    for role, domain in (("general", "maths"), ("general", "chat"), ("harmful", "advbench"), ("benign", "benign")):
        for split in ("train", "validation", "heldout"):
            for n in range(10):
                text = f"{domain} {split} {n} " + " ".join(WORDS[: 1 + (5 * n) % len(WORDS)])
                row = {"id": f"{domain}-{split}-{n}", "role": role, "domain": domain, "split": split, "prompt": text}
                rows.append({**row, "check": "", "category": ""})
    write(path, rows)
    return path

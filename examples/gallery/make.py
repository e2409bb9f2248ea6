"""A wheel of bases by three rules, so that `constrain` can be tried without collecting anything.

    snakemake --cores all results/activations
    python examples/gallery/make.py results/activations build/gallery

The rules are those whose files are small whatever was collected: a file holds the thinner side of every site.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from nspo import NullSpaceBases

RULES = {
    "contrast": {"rule": "contrast", "threshold": 3.0},
    "relative": {"rule": "relative", "threshold": 5e-5},
    "fraction": {"rule": "fraction", "threshold": 0.9},
}


def make(activations: Path, out: Path) -> Path:
    """The wheel's source in a folder of `out`: this one, with the bases; files that are there already stay."""
    source, whole = out / "source", out / "whole"
    shutil.copytree(
        Path(__file__).parent, source, ignore=shutil.ignore_patterns("make.py", "__pycache__"), dirs_exist_ok=True
    )
    for name, rule in RULES.items():
        file = whole / f"{name}.safetensors"
        if not file.exists():
            flags = {**rule, "activations": activations, "out": file, "workdir": out / "work"}
            words = [f"--{key}={value}" for key, value in flags.items()]
            subprocess.run([sys.executable, "-m", "nspo", "bases", *words], check=True)
        NullSpaceBases.load(file).save(source / "nspo_gallery" / file.name, half=True)
    return source


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("activations", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    built = make(given.activations, given.out)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", given.out, built], check=True)

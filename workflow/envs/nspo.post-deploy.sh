#!/usr/bin/env bash
# Run by Snakemake inside a new conda environment: the package itself, from beside the Snakefile or, where the rules were
# imported from elsewhere, the same version from the package index.
set -euo pipefail
python -m pip install --no-deps "$NSPO_PACKAGE"

# `make demo` and `make test` need Python 3.11+ and nothing else; both set up .venv on first use.

PYTHON ?= python3
BIN := .venv/bin
# What the lock leaves out: torch itself names, exactly, the CUDA parts of the build that the package index offers.
CUDA := ^(nvidia-|cuda-|triton)

export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo docs gallery test test-slurm lint check-python lock clean

# Two jobs at a time, each on half of the cores: while one starts or loads a model, the other computes.
demo: .venv/run.stamp
	$(BIN)/snakemake --cores all --max-threads $$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )) --configfile config/demo.yaml \
	--quiet rules host

# A wheel of bases of the default model by three rules (examples/gallery), in build/gallery.
gallery: .venv/run.stamp
	$(BIN)/snakemake --cores all results/activations
	$(BIN)/python examples/gallery/make.py results/activations build/gallery

# The documentation site, in build/site: no network, and a link that leads nowhere ends it.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Two workers, each with one thread for arithmetic: most tests are too small to use more.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The workflow on a real SLURM of two nodes, as root; needs Debian's slurm-wlm and munge, else it says what is missing.
test-slurm: .venv/dev.stamp
	$(BIN)/python -m pytest -m slurm -rs tests/workflow/test_slurm.py

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/snakemake --lint
	$(BIN)/lint-imports
	$(BIN)/mypy

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nspo needs Python 3.11 or newer: make PYTHON=python3.12")'

.venv/run.stamp: requirements.lock pyproject.toml | check-python
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

.venv/dev.stamp: .venv/run.stamp requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	touch $@

.venv/docs.stamp: .venv/run.stamp requirements-docs.lock
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-docs.lock
	touch $@

# New exact versions for the ranges of pyproject.toml, found in a fresh environment.
lock: | check-python
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet -e '.[pipeline]'
	build/lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' | grep -Ev '$(CUDA)' > requirements.lock
	build/lock/bin/pip install --quiet -e '.[dev]'
	(echo '-r requirements.lock'; build/lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' | grep -Ev '$(CUDA)' | \
	grep -vxFf requirements.lock) > requirements-dev.lock
	build/lock/bin/pip install --quiet -e '.[docs]'
	(echo '-r requirements.lock'; build/lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' | grep -Ev '$(CUDA)' | \
	grep -vxFf requirements-dev.lock -f requirements.lock) > requirements-docs.lock

clean:
	rm -rf .venv build .snakemake results/*

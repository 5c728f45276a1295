# `make demo` trains and reports; `make test` checks everything. Both need only python3 with venv, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check

# Small glimpses of untouched digits: there learned places are far better than random ones within the three minutes.
DEMO := --variant plain --glimpses 4 --patch 6 --scales 2 --glimpse-network mlp --batch 64 --learning-rate 3e-3

.PHONY: demo test bench docs clean
.NOTPARALLEL: # two installations in one environment would break each other

demo: $(VENV)/.installed
	$(BIN)/foveate train ram $(DEMO) --minutes 3 --out runs/demo --overwrite

test: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

bench: $(VENV)/.installed-dev
	$(BIN)/foveate bench

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

# A stamp is touched by the last line of its recipe: an installation that was broken off leaves none, or one that is
# older than pyproject.toml, and is taken up again by the next call.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Foveate needs Python 3.11 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo 'Python has no venv: sudo apt install python3-venv' >&2; exit 1; }
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.made
	@echo 'Installing into $(VENV): some minutes, 6 GB with the GPU libraries that PyTorch brings'
	$(PIP) --editable '.[digits]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.made
	@echo 'Installing into $(VENV), with what the tests need: some minutes, 6 GB'
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# Two commands do all the set-up: `make quickstart` and `make test`. Each makes .venv, installs what it needs, and runs.
PYTHON ?= python3
BIN = .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: quickstart test test-matrix check results format clean

$(BIN)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(BIN)/.installed  ## simulated world -> semantic IDs -> OneRec-V2 -> recommendations, on a laptop
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/quickstart.py --output outputs/quickstart

test: $(BIN)/.installed  ## the whole suite, offline
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests

test-matrix: $(BIN)/.installed  ## the numeric tests on other kernels, threads, addresses and versions of transformers
	$(BIN)/python tests/matrix.py

check: $(BIN)/.installed  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

results: $(BIN)/.installed  ## the tables of the documentation and the model cards, from results/*.json
	$(BIN)/python results/render.py

format: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv outputs build dist *.egg-info

# Every target makes .venv and installs what it needs. `make` alone lists them.
PYTHON ?= python3
BIN = .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1
export NO_MKDOCS_2_WARNING = 1
# files stay whole, since their tests share models; they begin in the order of tests/conftest.py, the longest first
PYTEST = HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help quickstart test test-fast test-extras test-foreign test-matrix check results docs format clean

help:  ## what each target does
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' $(MAKEFILE_LIST) | awk -F': *' '{printf "make %-12s %s\n", $$1, $$2}'

$(BIN)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(BIN)/.installed  ## simulated world -> semantic IDs -> OneRec-V2 -> recommendations, on a laptop
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/quickstart.py --output outputs/quickstart

test: $(BIN)/.installed  ## the whole suite, offline
	$(PYTEST) tests

test-fast: $(BIN)/.installed  ## under a minute on 2 cores, without runs of recipes and trainers, other processes, real data
	$(PYTEST) -m "not slow and not shared_data" tests

$(BIN)/.extras: $(BIN)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[ray,torchao]'
	touch $@

test-extras: $(BIN)/.extras  ## replicas on Ray, weights by torchao; they are installed for it, nothing else needs them
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/serving/test_ray.py tests/models/test_quantized.py

test-foreign: $(BIN)/.installed  ## the core of the numeric tests as on a processor of another make
	$(BIN)/python tests/matrix.py foreign

test-matrix: $(BIN)/.installed  ## the numeric tests on other kernels, threads, addresses and versions of transformers
	$(BIN)/python tests/matrix.py

check: $(BIN)/.installed  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

results: $(BIN)/.installed  ## the tables of the documentation and the model cards, from results/*.json
	$(BIN)/python results/render.py

docs: $(BIN)/.installed  ## the documentation site in outputs/site; a broken link is an error
	$(BIN)/mkdocs build --strict

format: $(BIN)/.installed  ## formats the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## removes .venv, outputs and what was built
	rm -rf .venv outputs build dist *.egg-info

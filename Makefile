PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
# Modules are compiled when they are first imported, not all of them at the install.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install install-dev quickstart real test test-all test-gpu docs bench lint format clean

install: $(STAMP) ## make the virtual environment with pinned packages

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) -e '.[image,remote,plot,lora,gguf]'
	touch $(STAMP)

install-dev: $(DEV_STAMP) ## what tests and checks need too

$(DEV_STAMP): $(STAMP)
	$(PIP) -e '.[dev]'
	touch $(DEV_STAMP)

quickstart: install ## synthetic data -> shards -> training -> held-out scores -> report
	$(BIN)/llava-scale quickstart --out runs/quickstart

real: install ## real pictures, real language model, real vision tower
	$(BIN)/python examples/tuxpaint/run.py --out runs/real

test: install-dev lint ## the fast suite
	$(BIN)/pytest -n 2 -m "not slow and not gpu"

test-all: install-dev lint ## everything that needs no GPU; installs what the service tests talk to
	$(PIP) -e '.[services,docs,demo,browser]'
	$(BIN)/pytest -n 2 -m "not gpu" --timeout 1800

test-gpu: install-dev ## what needs a CUDA device
	$(BIN)/pytest -m gpu

docs: install-dev ## the documentation as web pages, in docs/_build/html
	$(PIP) -e '.[docs]'
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

bench: install-dev ## ratios against peers
	for script in benchmarks/*_*.py; do $(BIN)/python $$script || exit 1; done

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

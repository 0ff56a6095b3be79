# Every target sets up what it needs. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
SEEDS ?= 1 2 3
RUN ?= demo
# What pip is told beside the lock file, for example a mirror or a CPU-only build of torch.
PIP_ARGS ?=

BIN := $(VENV)/bin
RLHF := $(BIN)/python -m rlhf

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-seeds report serve bench-service test lint format docs lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## make the environment in .venv from the lock file

$(VENV)/.installed: requirements/lock.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements/lock.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## from raw posts to an aligned, evaluated policy on this machine, in minutes
	$(RLHF) run --config demo --run demo --runs-dir $(RUNS)

demo-seeds: setup ## the demo on three seeds, and what PPO gained on each
	@for seed in $(SEEDS); do \
	  $(RLHF) run --config demo --set seed=$$seed --run demo-seed-$$seed --runs-dir $(RUNS) || exit $$?; \
	done
	$(RLHF) compare --runs-dir $(RUNS) $(addprefix demo-seed-,$(SEEDS))

report: setup ## write the HTML report of the demo again
	$(RLHF) report --run demo --runs-dir $(RUNS)

serve: setup ## serve the run RUN (the demo) on http://127.0.0.1:8000
	APP_RUN_DIR=$(RUNS)/$(RUN) $(BIN)/python -m app

bench-service: setup ## what batching gains the service, on this machine
	$(BIN)/python -m tests.benchmarks.service

test: setup ## run the tests
	$(BIN)/python -m pytest

lint: setup ## style, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## mend style and formatting where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## write the generated tables of settings in docs/ again
	$(RLHF) config --markdown > docs/configuration.md
	$(BIN)/python -m app settings > docs/service-settings.md

lock: ## renew requirements/lock.txt from pyproject.toml
	$(PYTHON) requirements/renew.py $(PIP_ARGS)

clean: ## remove the environment; runs stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

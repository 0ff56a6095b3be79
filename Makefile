# Every target sets up what it needs. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
SEEDS ?= 1 2 3
RUN ?= demo
# What pip is told beside the lock file, for example a mirror or a CPU-only build of torch.
PIP_ARGS ?=
# The image: for GPUs or not, and further options of the builder, --build-arg PIP_INDEX_URL=… for example.
ACCELERATOR ?= cuda
BUILD_ARGS ?=
# Builders that make every stage, needed or not, are spared the base images of the other kind.
OTHER_BASES_cuda := CPU_IMAGE
OTHER_BASES_cpu := CUDA_BUILD_IMAGE CUDA_RUNTIME_IMAGE
# Kubernetes: which overlay of k8s/overlays, which image (empty: the overlay's), and options of `rlhf deploy`.
OVERLAY ?= single-node
IMAGE ?=
STAGE ?= ppo
ARGS ?=

BIN := $(VENV)/bin
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' rlhf/__init__.py)
RLHF := $(BIN)/python -m rlhf

.DEFAULT_GOAL := help
DEPLOYMENTS := deploy-fetch deploy-sft deploy-reward deploy-prepare deploy-ppo deploy-evaluate deploy-api deploy-tensorboard deploy-all
.PHONY: help setup demo demo-seeds report serve bench bench-ppo bench-paths bench-scaling bench-startup \
  bench-service bench-saving bench-memory bench-strategies bench-plan bench-trlx image $(DEPLOYMENTS) undeploy cluster-status cluster-logs \
  e2e chaos fuzz test lint format docs lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-15s %s\n", $$1, $$2}'
	@printf "  %-15s %s\n" deploy-STAGE "run a stage as a Job: fetch sft reward prepare ppo evaluate; OVERLAY, IMAGE, ARGS" \
	  deploy-api "serve the run in the cluster" deploy-all "all stages in their order, from where the cluster is"

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

bench: setup ## each phase against what this machine can do; ARGS="--preset 6b" for the size of GPT-J-6B
	$(BIN)/python -m tests.benchmarks.bench --output build/bench $(ARGS)

bench-ppo: setup ## an iteration of PPO beside trlX's
	$(BIN)/python -m tests.benchmarks.ppo_iteration $(ARGS)

bench-paths: setup ## generation, scoring and training beside the plain ways that they are held against
	$(BIN)/python -m tests.benchmarks.generation
	$(BIN)/python -m tests.benchmarks.scoring
	$(BIN)/python -m tests.benchmarks.training

bench-scaling: setup ## how time and memory grow with rollouts, prompts and models
	$(BIN)/python -m tests.benchmarks.scaling --output build/bench $(ARGS)

bench-startup: setup ## how long until help is printed, and until the service is ready
	$(BIN)/python -m tests.benchmarks.startup $(ARGS)

bench-service: setup ## what batching gains the service, on this machine
	$(BIN)/python -m tests.benchmarks.service

bench-saving: setup ## how long training stands still for a checkpoint
	$(BIN)/python -m tests.benchmarks.saving

bench-strategies: setup ## how far a training is from itself on 1, 2 and 4 processes, replicated and sharded
	$(BIN)/python -m tests.benchmarks.strategies

bench-plan: setup ## hold the memory planner against measured peaks
	$(BIN)/python -m tests.benchmarks.plan
	$(BIN)/python -m tests.benchmarks.plan_traced

bench-trlx: setup ## PPO beside trlX, where that is installed
	$(BIN)/python -m tests.benchmarks.trlx_ppo

bench-memory: setup ## whether PPO's memory stays flat over 1,500 iterations
	$(BIN)/python -m tests.benchmarks.memory --iterations 1500 --warm-up 300

image: ## build the image with docker or buildah: ACCELERATOR=cuda or cpu, IMAGE, PIP_ARGS, BUILD_ARGS
	@if docker info >/dev/null 2>&1; then builder="docker build"; \
	elif command -v buildah >/dev/null; then builder="buildah bud --layers --format docker"; \
	else echo "an image needs docker, with its engine running, or buildah"; exit 1; fi; set -x; \
	$$builder -f docker/Dockerfile -t $(or $(IMAGE),rlhf-summarizer:$(VERSION)-$(ACCELERATOR)) \
	  --build-arg ACCELERATOR=$(ACCELERATOR) --build-arg VERSION=$(VERSION) \
	  --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) \
	  $(OTHER_BASES_$(ACCELERATOR):%=--build-arg %=scratch) \
	  $(if $(PIP_ARGS),--build-arg PIP_ARGS='$(PIP_ARGS)') $(BUILD_ARGS) .

$(DEPLOYMENTS): deploy-%: setup
	$(RLHF) deploy $* --overlay $(OVERLAY) $(if $(IMAGE),--image $(IMAGE)) --wait --follow $(ARGS)

undeploy: setup ## remove the Jobs, the service and all that was deployed with them; the volume stays
	$(RLHF) undeploy $(ARGS)

cluster-status: setup ## each stage in the cluster: state, step, reward, time left, restarts, node
	$(RLHF) cluster-status $(ARGS)

cluster-logs: setup ## follow the log of STAGE in the cluster
	$(RLHF) cluster-logs $(STAGE) --follow $(ARGS)

e2e: setup ## the whole pipeline on the cluster that KUBECONFIG names, or on a kind cluster made for it
	RLHF_E2E=1 $(BIN)/python -m pytest tests/e2e -v

chaos: setup ## kill every stage dozens of times, have writers fight, fail every system call of a save; half an hour
	$(BIN)/python -m tests.chaos --kills 30
	$(BIN)/python -m tests.chaos --kills 4 --anew
	$(BIN)/python -m tests.chaos.together --kills 5
	$(BIN)/python -m tests.chaos.fight --seconds 60
	$(BIN)/python -m tests.faults

fuzz: setup ## feed every reader of files and texts what it does not expect; needs atheris: .venv/bin/pip install atheris
	$(BIN)/python -m tests.fuzz.atheris_fuzz $(ARGS)

test: setup ## run the tests, on up to four cores
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

lint: setup $(VENV)/checkov/.installed ## style, formatting, types, manifests and Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile
	LOG_LEVEL=ERROR $(VENV)/checkov/bin/checkov --config-file k8s/checkov.yaml --framework kubernetes dockerfile \
	  -d k8s/base -d docker --compact --quiet --skip-download

# In an environment of its own, since it wants other versions than we do.
$(VENV)/checkov/.installed: requirements/checkov.txt
	$(PYTHON) -m venv $(VENV)/checkov
	$(VENV)/checkov/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements/checkov.txt
	@touch $@

format: setup ## mend style and formatting where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## write again what is generated: tables of settings in docs/, the JobSet
	$(RLHF) config --markdown > docs/configuration.md
	$(BIN)/python -m app settings > docs/service-settings.md
	$(BIN)/python -m rlhf.cluster.jobset k8s/base > k8s/overlays/jobset/jobset.yaml

lock: ## renew the lock files in requirements/ from pyproject.toml
	$(PYTHON) requirements/renew.py $(PIP_ARGS)

clean: ## remove the environment; runs stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# `make serve` on a fresh machine ends with an answering server; `make check` is what CI runs.

# The first Python that runs and that the project supports.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)
# torch comes first and pinned: the project's own range would also admit builds with CUDA,
# several gigabytes that a CPU machine does not need.
TORCH ?= torch==2.13.0
# For its kernels' interpreter, where the build of torch brings none.
TRITON ?= triton==3.9.0
VENV ?= .venv
# The releases of everything else that the tests passed with; CONSTRAINTS= takes the newest.
CONSTRAINTS ?= constraints.txt
# Arguments for lorax-launcher, such as ARGS="--port 3005".
ARGS ?=
# Arguments for pytest, such as TESTS="tests/unit -k console".
TESTS ?=
# A script of bench/ that measures one part; without it lorax-bench measures a whole server.
BENCH ?=
# What has torch and sees the GPU: this project's environment if it is there.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)
# Which list of acceptance points to run.
NAME ?= serve

BIN := $(VENV)/bin
# Stamps: an environment is made again only when what it is made from has changed.
BASE := $(VENV)/.lorax-base
DEV := $(VENV)/.lorax-dev

PIP_INSTALL = $(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help serve test lint format types check protos protos-check docs bench acceptance clean
.PHONY: bench-peers gpu-check newest constraints soak fuzz

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 20

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(BASE): $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(PIP_INSTALL) "$(TORCH)"
	$(PIP_INSTALL) -e .
	@touch $@

$(DEV): $(BASE)
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP_INSTALL) "$(TRITON)"
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@

# `exec` leaves no shell between make and the program: signals reach it, and its code is ours.
serve: $(BASE) ## serve the embedded model (or ARGS="--model-id ...") on port 3000
	@exec $(BIN)/lorax-launcher --adapter-local-root examples/adapters $(ARGS)

# Two files at a time, each on one thread, in their order: quick ones of many tests come last, so
# that no process waits long for the other's end. Whole servers afterwards, by themselves.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=15
IN_TWO = -n 2 --dist loadfile --no-loadscope-reorder
test: $(DEV) ## run the tests but for the slow ones (TESTS="-m slow"); the slowest are listed
ifeq ($(TESTS),)
	@$(PYTEST) $(IN_TWO) tests --ignore tests/e2e
	@exec $(BIN)/python -m pytest --durations=15 tests/e2e
else
	@exec $(BIN)/python -m pytest --durations=15 $(TESTS)
endif

# An environment of its own, made anew: what a release of today would do to a first start.
newest: ## run all tests, slow ones too, with the newest release of everything
	rm -rf .venv-newest
	@PYTEST_ADDOPTS="-m ''" $(MAKE) test VENV=.venv-newest CONSTRAINTS= TRITON=triton

constraints: ## write constraints.txt anew: the newest release of everything but torch
	rm -rf .venv-newest
	@$(MAKE) .venv-newest/.lorax-dev VENV=.venv-newest CONSTRAINTS=
	.venv-newest/bin/python -m pip freeze --exclude-editable \
		| grep -Ev '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==' > constraints.txt

lint: $(DEV) ## check style and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(DEV) ## rewrite the source in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV) ## check types
	$(BIN)/mypy

check: lint types test ## everything that CI checks

protos: $(BASE) ## generate the gRPC stubs from the .proto files
	$(BIN)/python proto/generate.py

protos-check: $(BASE) ## fail if the committed stubs are stale
	$(BIN)/python proto/generate.py --check

docs: $(DEV) ## write the generated pages of docs/, and tables of results
	$(BIN)/python -m lorax_launcher.docs docs/cli.md
	$(BIN)/python -m lorax_launcher.migration docs/migration.md
	$(BIN)/python -m lorax_router.service.metrics.doc > docs/metrics.md
	$(BIN)/python -m lorax_shard.peft.docs docs/adapters.md
	$(BIN)/python -m deploy.dashboard
	$(BIN)/lorax-bench renew README.md bench/results/README.md

bench: $(DEV) ## measure this server (ARGS="sweep fixed ..."), or a part of it (BENCH=linears)
ifeq ($(BENCH),)
	@exec $(BIN)/lorax-bench $(or $(ARGS),run w1 --adapters 8 --retention)
else
	@exec $(BIN)/python -m bench.$(BENCH) $(ARGS)
endif

# Each in an environment of its own, in $LORAX_BENCH_PEERS or the project's cache: several GB.
bench-peers: $(DEV) ## set up the systems that `lorax-bench compare` runs beside this server
	@exec $(BIN)/lorax-bench peers install $(ARGS)

# With the packages of the machine, which may have no network: nothing is installed for it.
gpu-check: ## check and measure on a GPU (ARGS=--small: try it on a CPU; "--ranks 2": two GPUs)
	@exec $(GPU_PYTHON) -m bench.gpu_check $(ARGS)

acceptance: $(DEV) ## run the acceptance points of NAME
	@exec $(BIN)/python -m tests.acceptance $(NAME)

soak: $(DEV) ## mixed traffic and faults for some minutes (ARGS="--minutes 10 --seed 1")
	@exec $(BIN)/python -m tests.soak $(ARGS)

fuzz: $(DEV) ## odd traces, bodies, messages and files for some minutes (ARGS="--minutes 10 --seed 1")
	@exec $(BIN)/python -m tests.fuzz $(ARGS)

clean: ## remove the environment and what tools left behind
	rm -rf $(VENV) .venv-newest .venv-proto build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

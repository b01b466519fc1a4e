# make demo and make test do everything on a machine with Python 3.11, a C compiler and PyPI.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.pdkv-installed
# Apart, because it brings 700 MB that pdkv never needs; it is a client, so it need not share anything with us.
EVAL_VENV  := .venv-eval
EVAL_STAMP := $(EVAL_VENV)/.lm-eval-0.4.13
# Likewise the movers that pdkv bench races against: 480 MB, and their own UCX.
BENCH_VENV := .venv-bench
NATIVE := $(wildcard pdkv/transport/*.pyx pdkv/transport/native/*.c pdkv/transport/native/*.h)

# The first Python that is new enough; override with make PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Versions for machines without a GPU. With one: make CONSTRAINTS= , and bring a CUDA build of torch.
CONSTRAINTS ?= constraints-cpu.txt
# For example --extra-index-url https://download.pytorch.org/whl/cpu, which is a smaller torch than PyPI's.
PIP_FLAGS   ?=

# Tests run in two processes more than there are cores, up to four, because many wait for leases, deaths and starts; each
# computes on one thread. They start hundreds of processes, which shall not compile our modules one by one, whatever the
# environment says about bytecode.
WORKERS     ?= $(shell n=$$(nproc); echo $$((n > 2 ? 4 : n + 2)))
TESTS       ?= tests
LONG_TESTS  ?= tests/long

.PHONY: help demo test eval bench-tools check wheel fmt install clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Move a 6,000-token prompt from a prefill to a decode worker and check the answer
	$(BIN)/pdkv demo

test: $(STAMP)  ## Run all tests (TESTS=tests/core for a part)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --ignore=tests/long $(TESTS)

test-long: $(STAMP)  ## Run the tests that take minutes (LONG_TESTS=tests/long/test_chaos.py for a part)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) $(LONG_TESTS)

eval: $(EVAL_STAMP)  ## Install lm-eval beside pdkv; where it is there, the tests run it against a deployment

bench-tools:  ## Install NIXL and Mooncake beside pdkv, for pdkv bench xfer --vs nixl,mooncake
	PIP_FLAGS="$(PIP_FLAGS)" scripts/bench_tools.sh $(PYTHON) $(BENCH_VENV)

check: $(STAMP)  ## Lint, formatting, types and import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: $(STAMP)  ## Build dist/*.whl (one for Python 3.11 and later) and use it in a clean environment
	rm -rf dist build/lib*  # or the wheel has whatever was built there once
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .
	scripts/try_wheel.sh dist/*.whl $(BIN)/python

fmt: $(STAMP)  ## Format the code and mend what the linter can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

install: $(STAMP)  ## Make .venv with pdkv in it (the others do it by themselves)

clean:  ## Remove .venv and what was built
	rm -rf $(VENV) $(EVAL_VENV) $(BENCH_VENV) build dist *.egg-info pdkv/transport/_ucp.c pdkv/transport/_pull.c pdkv/transport/_spans.c pdkv/transport/_*.so

$(STAMP): pyproject.toml setup.py $(CONSTRAINTS) $(NATIVE)
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; install one or name it: make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev]'
	@touch $@

$(EVAL_STAMP):
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; install one or name it: make PYTHON=..." >&2; exit 1; }
	test -x $(EVAL_VENV)/bin/python || $(PYTHON) -m venv $(EVAL_VENV)
	$(EVAL_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) 'lm-eval[api]==0.4.13'
	@touch $@

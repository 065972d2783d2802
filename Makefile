# Two commands on a fresh machine with git, make and Python 3.11 or later: `make demo` and `make test`.
#
#   make demo  [DEMO_ARGS="..."]     the loop on a real Kafka with a simulated fleet, until Ctrl-C
#   make test  [PYTEST_ARGS="..."]   every check and test, a real Kafka included
#   make test-vllm [REAL_ENGINE_DIR=...]  a real vLLM on the CPU against what its clients measure (6 GB, 4 minutes)
#   make setup                       only the environment of both, in .venv
#   make bench [TRACE=...]           the whole loop in one process on a recorded trace: SLO, cost, CPU
#   make docs                        write docs/reference.md from the code
#   make clean                       remove what was made here
#
# PYTHON=... chooses the Python that .venv is made with.

PYTHON ?= python3
BIN := .venv/bin
# What is installed depends on these two; the code itself is installed editable.
PINS := pyproject.toml constraints.txt
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test test-vllm bench docs clean
.DELETE_ON_ERROR:

setup: .venv/.setup

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Fleetloop needs Python 3.11 or later, '$(PYTHON)' is $$($(PYTHON) --version 2>&1):" \
	       "name another with 'make PYTHON=/path/to/python3.12 ...'" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: install its venv package" \
	       "(Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@rm -rf .venv
	@$(PYTHON) -m venv .venv

.venv/.setup: $(PINS) | $(BIN)/python
	@echo "Installing Fleetloop and a Java for its local Kafka into .venv (a minute or two, once)"
	@$(INSTALL) -e '.[local]'
	@touch $@

.venv/.test: $(PINS) | .venv/.setup
	@echo "Installing what tests need into .venv (once)"
	@$(INSTALL) -e '.[test]'
	@touch $@

.venv/.bench: $(PINS) | .venv/.test
	@echo "Installing what benchmarks need into .venv (once)"
	@$(INSTALL) -e '.[bench]'
	@touch $@

demo: setup
	@$(BIN)/fleetloop demo $(DEMO_ARGS)

# A test that needs a broker fails where there is none; FLEETLOOP_REQUIRE_BROKER=0 lets it be skipped.
test: export FLEETLOOP_REQUIRE_BROKER ?= 1
test: setup .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/fleetloop schemas check
	$(BIN)/pytest $(PYTEST_ARGS)

# vLLM's environment and a tiny model are made once, outside this tree.
test-vllm: export REAL_ENGINE_DIR ?= $(HOME)/.cache/fleetloop/real-engine
test-vllm: setup .venv/.test
	$(BIN)/pytest tests/real_engine $(PYTEST_ARGS)

TRACE ?= $(FLEETLOOP_DATA)/azure-llm-2023/AzureLLMInferenceTrace_conv.csv
bench: setup .venv/.bench
	@test -f "$(TRACE)" || { echo "bench: no trace '$(TRACE)': say TRACE=FILE, or set FLEETLOOP_DATA" >&2; exit 1; }
	$(BIN)/python -m tests.bench.closed_loop "$(TRACE)" $(BENCH_ARGS)

docs: setup
	@$(BIN)/fleetloop schemas reference --file docs/reference.md

clean:
	rm -rf .venv *.egg-info build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

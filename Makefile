# Everything lives in .venv; nothing is installed globally. `make demo` and `make test` set up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK_OPTIONS := --quiet --universal --generate-hashes --no-emit-index-url --no-header

.PHONY: setup demo up test faults docs lint bench lock clean help

help: ## Show what there is to do
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## Make .venv with the locked packages

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12 setup" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## Live through backups, deaths, an EM crash and an escalation, for real
	$(BIN)/backup-worker demo

up: setup ## Run every part on this machine, on an embedded Valkey
	$(BIN)/backup-worker up

test: setup ## Run all tests
	$(BIN)/python -m tests

faults: setup ## Kill the engine at every system call, and every part of the bus at random for minutes
	FAULTS=all $(BIN)/python -m pytest -s tests/faults

docs: setup ## Write the reference pages and the schemas from models and commands
	$(BIN)/python -m backup_worker.reference

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## Side-by-side figures
	$(BIN)/python -m tests.benchmarks

lock: setup ## Renew both lock files from pyproject.toml (versions that are locked stay unless they must change)
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile $(LOCK_OPTIONS) --extra dev --extra console pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile $(LOCK_OPTIONS) --extra console pyproject.toml -o requirements-runtime.lock

clean: ## Remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

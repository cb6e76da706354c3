# `make` alone prints what there is. Each target sets up what it needs and is quick when that is done.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-base toolchain repro test test-engines check bench bench-compare bench-upstream bench-fetch prove lock clean

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
RUN := . .venv/bin/activate &&
ARGS ?=

help:  ## Print this
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

need-python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed. Install it, or say where it is: make PYTHON=/path/to/python3" >&2; exit 7; }

setup: need-python  ## Set up .venv with everything (2-5 minutes the first time, then nothing)
	@$(PYTHON) -m pipelines.bootstrap convert

setup-base: need-python  ## Set up .venv without torch: enough to choose, track and report
	@$(PYTHON) -m pipelines.bootstrap base

toolchain: setup  ## Build the pinned llama.cpp and Ollama (9 to 17 minutes on 2 cores the first time: llama.cpp 7 to 14, Ollama 2 to 3)
	@$(RUN) python -m pipelines toolchain

repro: setup  ## Run the chain on every declared model: convert, quantize, measure, choose, serve, report (the first time 13 to 25 minutes on 2 cores, with the toolchain)
	@$(RUN) exec python -m pipelines repro $(ARGS)

test: toolchain  ## Run all tests (about 40 minutes on 2 cores); ARGS="-k choose" picks some
	@$(RUN) python -m pytest -n logical --maxprocesses 8 $(ARGS)

test-engines: toolchain  ## Compare two real llama.cpp builds, the pinned one and the one before (builds that first, 7 to 14 minutes)
	@$(RUN) FLEET_TEST_ENGINES=1 python -m pytest tests/test_compare_engine.py $(ARGS)

check: setup  ## Lint, types, workflows and actions, schema and docs in sync (about 20 seconds, the first time a minute)
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy
	@$(RUN) python -m pipelines schema --check
	@$(RUN) python -m pipelines check
	@$(RUN) python -m checks

bench: toolchain  ## Measure what the fleet costs over bare llama.cpp -> bench/results/overhead.json
	@$(RUN) python -m bench.overhead $(ARGS)

bench-compare: toolchain  ## Measure how often `fleet compare` is wrong here -> bench/results/compare-proof.json (20 minutes)
	@$(RUN) python -m bench.compare $(ARGS)

bench-upstream: setup  ## Time a look at upstream of 100 models -> bench/results/upstream-look.json (1 minute)
	@$(RUN) python -m bench.upstream $(ARGS)

bench-fetch: setup  ## Download 2,000 times while the Hub or the network fails -> bench/results/fetch-faults.json (10 minutes)
	@$(RUN) python -m bench.faulty_downloads $(ARGS)

prove: setup  ## Prove what a registry promises: histories, kills, reads -> bench/results/release-proofs.json (2 hours)
	@$(RUN) GGUF_FLEET_HISTORIES=1000 python -m pytest tests/test_registry_histories.py
	@$(RUN) python -m bench.release $(ARGS)

lock: setup  ## Resolve pyproject.toml into requirements.lock (hashes, no hosts)
	@echo "torch ; python_version < '3'" > .venv/overrides.txt
	@$(RUN) uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --all-extras \
		--overrides .venv/overrides.txt --no-emit-index-url --custom-compile-command "make lock" \
		pyproject.toml -o requirements.lock

clean:  ## Remove .venv and work/ (the records in results/ and the user's cache stay)
	@rm -rf .venv work .mypy_cache .ruff_cache .pytest_cache

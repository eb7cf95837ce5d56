# Every target does its own set-up. ENGINE=vllm runs the demo on vLLM.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINE ?= transformers
TORCH ?= torch==2.13.0
DEMO_FLAGS ?=
# Of test: processes at a time, whole files each, in the order of the folders (the longest files come first).
TEST_JOBS ?= 3
PYTEST_FLAGS ?=
RELIABILITY_FLAGS ?=
SOAK_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help install test reliability soak demo bench check format protos documents up clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## create .venv with everything that this machine can run

$(VENV)/.installed: pyproject.toml scripts/install.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" ./scripts/install.sh $(VENV)
	@touch $@

demo: install ## PPO on a small story model, end to end, with a report
	$(BIN)/tether demo --engine $(ENGINE) $(DEMO_FLAGS)

up: install ## the four services on this machine, until Ctrl-C
	$(BIN)/tether up --engine $(ENGINE)

test: install ## all tests in three processes, real vLLM included where it is installed
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

reliability: install ## kills, full disks, lost answers and flipped bits against real services, in minutes
	$(BIN)/python -m tests.reliability --jobs 2 $(RELIABILITY_FLAGS)

soak: install ## the same in the long form, one after the other, hours
	$(BIN)/python -m tests.reliability --long --jobs 1 $(SOAK_FLAGS)

bench: install ## the benchmark tables, about an hour on two cores
	$(BIN)/python benchmarks/demo_seeds.py
	$(BIN)/python benchmarks/learning.py methods
	$(BIN)/python benchmarks/learning.py frontier
	$(BIN)/python benchmarks/learning.py ptx

check: install ## format, lint, types, import contracts, protos, documents
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	./scripts/check_protos.sh
	./scripts/check_documents.sh

format: install ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: ## regenerate clients/python/tether/v1 from protos/
	PYTHON="$(PYTHON)" ./scripts/generate_protos.sh

documents: install ## regenerate docs/errors.md and the OpenAPI documents
	./scripts/generate_documents.sh

clean: ## remove the environments, never runs/
	rm -rf $(VENV) .venv-protoc .venv-trl

# Shortcuts; the work is done by the scripts in launch/.
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint types imports format lock

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: ## from Python source to a trained model, on a CPU, in minutes
	bash launch/quickstart.sh

test: ## format, lint, types, import contract and the short tests
	bash launch/test.sh

test-all: ## everything, as CI runs it
	bash launch/test.sh --all

lint: ## ruff
	.venv/bin/python -m ruff format --check . && .venv/bin/python -m ruff check .

format: ## ruff, rewriting files
	.venv/bin/python -m ruff format . && .venv/bin/python -m ruff check --fix .

types: ## mypy
	.venv/bin/python -m mypy

imports: ## the direction of imports
	.venv/bin/lint-imports

lock: ## write launch/requirements.lock again (needs uv)
	bash launch/lock.sh

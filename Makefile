# Every target sets up what it needs: a virtual environment with locked packages, and, for what runs a
# broker, a RabbitMQ found on this machine or prepared in a cache (see api/operator/userland.py).
SHELL := /bin/bash
PY := .venv/bin/python
SERVER := .venv/.server
DEV := .venv/.dev

.DEFAULT_GOAL := help
.PHONY: help demo up test check format bench

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(SERVER): requirements/server.lock pyproject.toml deploy/bootstrap.sh
	@deploy/bootstrap.sh server
	@touch $@

$(DEV): requirements/dev.lock pyproject.toml deploy/bootstrap.sh
	@deploy/bootstrap.sh dev
	@touch $@ $(SERVER)

demo: $(SERVER)  ## set everything up, run the main job, say what happened, clean up
	@$(PY) -m examples.demo

up: $(SERVER)  ## the full stack in the foreground; state in .local/
	@.venv/bin/restante up

test: $(DEV)  ## all tests, on a private broker and private databases
	@$(PY) -m pytest

check: $(DEV)  ## formatting, lint, types, import contracts
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

format: $(DEV)  ## format and mend what can be mended
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

bench: $(SERVER)  ## benchmarks; QUICK=1 for a short run
	@$(PY) -m bench $(if $(QUICK),--quick)

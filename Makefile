# Every target sets up what it needs: a virtual environment with locked packages, and, for what runs a
# broker, a RabbitMQ found on this machine or prepared in a cache (see api/operator/userland.py).
SHELL := /bin/bash
PY := .venv/bin/python
SERVER := .venv/.server
DEV := .venv/.dev
FUZZ := .venv/.fuzz
BENCH := .venv/.bench
AUDIT := .venv/audit/.done

.DEFAULT_GOAL := help
.PHONY: help demo up test soak compose-test check audit sbom fuzz format docs bench

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(SERVER): requirements/server.lock pyproject.toml deploy/bootstrap.sh
	@deploy/bootstrap.sh server
	@touch $@

$(DEV): requirements/dev.lock pyproject.toml deploy/bootstrap.sh
	@deploy/bootstrap.sh dev
	@touch $@ $(SERVER)

$(FUZZ): $(DEV) requirements/fuzz.lock
	@$(PY) -m pip install -qq --disable-pip-version-check --require-hashes -r requirements/fuzz.lock
	@touch $@

$(BENCH): $(SERVER) requirements/bench.lock
	@$(PY) -m pip install -qq --disable-pip-version-check --require-hashes -r requirements/bench.lock
	@touch $@

$(AUDIT): $(SERVER) requirements/audit.lock
	@$(PY) -m venv .venv/audit
	@.venv/audit/bin/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements/audit.lock
	@touch $@

demo: $(SERVER)  ## set everything up, run the main job, say what happened, clean up
	@$(PY) -m examples.demo

up: $(SERVER)  ## the full stack in the foreground; state in .local/
	@.venv/bin/restante up

# Half of what a test does is waiting. Python's own files are compiled once, not by each of the hundreds of processes that
# the tests start.
JOBS ?= $(shell expr 2 \* $$(nproc))
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(PY) -m pytest -n $(JOBS) --no-loadscope-reorder

test: $(DEV)  ## the tests, on a private broker and private databases; all but those of `make soak`. JOBS=2: so many at once
	@$(PYTEST) -m "not soak"

soak: $(DEV)  ## the tests that take longest: everything killed, again and again, disks lost, hundreds of devices at once (6 minutes)
	@$(PYTEST) -m soak

compose-test: $(DEV)  ## compose.yaml on a real container engine: up from nothing, scaled, killed, down (8 minutes)
	@$(PY) -m pytest -v -s --timeout 900 --durations 12 tests/compose/{came_up,one_port,under_load,operated}.py

check: $(DEV)  ## formatting, lint, types, import contracts
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

audit: $(AUDIT)  ## known vulnerabilities of locked packages; says so where the index's service can't be asked
	@deploy/supply.sh audit

sbom: $(AUDIT)  ## dist/restante.cdx.json: what is installed, as CycloneDX
	@deploy/supply.sh sbom

fuzz: $(FUZZ)  ## decoders of bytes from outside, under atheris; SECONDS=60 for each
	@$(PY) -m tests.fuzz $(or $(SECONDS),60)

format: $(DEV)  ## format and mend what can be mended
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

docs: $(SERVER)  ## write what is generated in docs/
	@$(PY) -m docs.diagrams

bench: $(BENCH)  ## all measures, or MEASURE=name; QUICK=1 under 3 minutes, BUDGET=seconds for each, WRITE=1 puts the figures into docs/
	@$(PY) -m bench $(MEASURE) $(if $(QUICK),--quick) $(if $(BUDGET),--budget $(BUDGET)) $(if $(WRITE),--write-docs) $(if $(DATABASE),--database "$(DATABASE)")

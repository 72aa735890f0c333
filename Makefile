# `make demo` bakes a project and serves it, and `make test` tests the template. Both need
# make, and uv or Python 3.11 or later. They install everything else into .venv.
PYTHON ?= python3
POOL ?= psycopg2
WORKER ?= none
PORT ?= 5000
SLUG ?= demo_$(POOL)_$(WORKER)
UV := $(shell command -v uv || echo .venv/bin/uv)

# This file names .venv, so no setting may put the environment elsewhere.
export UV_PROJECT_ENVIRONMENT = .venv

# uv uses the Python that the user names, or else a suitable one.
NAMED = $(if $(filter file,$(origin PYTHON)),,--python '$(PYTHON)')

.PHONY: demo bake test check lint mutations

demo: .venv/ready
	@test -d '.demo/$(SLUG)' || $(MAKE) --no-print-directory bake
	'$(UV)' sync --quiet --directory '.demo/$(SLUG)'
	@echo "Open http://127.0.0.1:$(PORT)/ and edit .demo/$(SLUG)/$(SLUG)/notes.py; Ctrl-C stops it."
	'$(UV)' run --directory '.demo/$(SLUG)' flask dev --port '$(PORT)'

bake: .venv/ready
	@test ! -e '.demo/$(SLUG)' || \
		{ echo ".demo/$(SLUG) exists: remove it, or choose another SLUG." >&2; exit 1; }
	@# Cookiecutter writes into HOME, which may be read-only.
	@HOME=.venv .venv/bin/python -m cookiecutter . --no-input --output-dir .demo \
		project_slug='$(SLUG)' pool='$(POOL)' worker='$(WORKER)' > /dev/null

test: .venv/ready lint
	.venv/bin/python -m tests.support.machine
	.venv/bin/pytest

# Quick enough for each commit: bake every combination, and install none.
check: .venv/ready lint
	.venv/bin/pytest -m 'not slow' tests/template

# Put each mistake in tests/mutations into a copy of the template: a test must notice it.
mutations: .venv/ready
	.venv/bin/python -m tests.mutations

lint: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check

.venv/ready: pyproject.toml
	@command -v uv > /dev/null || $(PYTHON) -c 'import ensurepip' 2> /dev/null || \
		{ echo '$(PYTHON) -m venv fails here: install uv, or the package python3-venv.' >&2; exit 1; }
	@command -v uv > /dev/null || $(PYTHON) -m venv .venv
	@command -v uv > /dev/null || .venv/bin/python -m pip install --quiet --no-user 'uv>=0.9.17'
	'$(UV)' sync --quiet $(NAMED)
	touch $@

# `make demo` bakes a project and serves it; `make test` tests the template. Both put what
# they need into .venv, and need nothing but make and Python 3.11 or later.
PYTHON = python3
POOL = psycopg2
WORKER = none
PORT = 5000
SLUG = demo_$(POOL)_$(WORKER)
UV = $(CURDIR)/.venv/bin/uv

.PHONY: demo bake test lint mutations

demo: .venv/ready
	@test -d .demo/$(SLUG) || $(MAKE) --no-print-directory bake
	cd .demo/$(SLUG) && $(UV) sync --quiet
	@echo "Open http://127.0.0.1:$(PORT)/ and edit .demo/$(SLUG)/$(SLUG)/notes.py; Ctrl-C ends it."
	cd .demo/$(SLUG) && $(UV) run flask dev --port $(PORT)

# Cookiecutter first copies all of the template's folder, which takes long with .venv in it.
bake: .venv/ready
	@mkdir -p .demo/.template
	@tar -c --exclude=./.venv --exclude=./.demo --exclude=./.git . | tar -x -C .demo/.template
	@.venv/bin/cookiecutter .demo/.template --no-input --accept-hooks no \
		--output-dir .demo project_slug=$(SLUG) pool=$(POOL) worker=$(WORKER) > /dev/null
	@rm -r .demo/.template

test: .venv/ready lint
	.venv/bin/pytest

# Breaks a copy of the template in the ways of tests/mutations, and says what noticed each.
mutations: .venv/ready
	.venv/bin/python -m tests.mutations

lint: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet 'uv>=0.9'
	.venv/bin/uv sync --quiet
	touch $@

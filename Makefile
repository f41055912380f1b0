# Each command sets up .venv first: make demo | make test | make lint | make bench | make docs
# PYTHON=/path/to/python chooses the interpreter (3.11 or newer) that .venv is made with;
# WORKERS=1 runs the tests one after another.

.PHONY: help demo test test-all lint bench docs clean
.DELETE_ON_ERROR:
SHELL := /bin/sh

PYTHON ?=
WORKERS ?= 2
BIN := .venv/bin
DEMO := runs/demo
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

help:
	@echo 'make demo      train, evaluate and predict on the built-in scenes; results in $(DEMO)'
	@echo 'make test      run the tests'
	@echo 'make test-all  the slow ones too: kills, full disks, several processes'
	@echo 'make lint      style, types, import directions and the pages of docs/'
	@echo 'make bench     time the whole model on the CPU'
	@echo 'make docs      build the pages of docs/ into build/docs'

demo: .venv/.with-demo
	@$(BIN)/python train.py --config=configs/demo.py --workdir=$(DEMO)
	@$(BIN)/python train.py --config=configs/demo.py --workdir=$(DEMO) --mode=eval --split=test
	@$(BIN)/dsct report $(DEMO)
	@echo 'Look at $(DEMO)/predictions_test.png, $(DEMO)/curves.png and $(DEMO)/metrics.md.'
	@echo 'Next, your own images:'
	@echo '    $(BIN)/dsct predict IMAGE... --checkpoint=$(DEMO) --output=predictions'
	@echo 'and your own data: README.md, "Your own data".'

test: .venv/.with-test
	@$(PYTEST)

test-all: .venv/.with-test
	@$(PYTEST) -m 'slow or not slow'

lint: .venv/.with-lint docs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: .venv/.with-train
	@$(BIN)/python -m benchmarks.model_cpu

docs: .venv/.with-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/docs

clean:
	rm -rf .venv .jax_cache

# --- the environment ---

# The first of the names that is Python 3.11 or newer.
FIND_PYTHON = \
	for python in $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
		python=; \
	done; \
	[ -n "$$python" ] || { \
		echo "error: no Python 3.11 or newer found$(if $(PYTHON), at PYTHON=$(PYTHON));" \
			"install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
		exit 2; \
	}

.venv/.created:
	@$(FIND_PYTHON); \
	echo "making .venv with $$("$$python" --version) ($$python)"; \
	"$$python" -m venv --clear .venv || { \
		echo "error: $$python cannot make a virtual environment;" \
			"on Debian and Ubuntu install python3-venv" >&2; \
		exit 2; \
	}
	@touch $@

# Versions are pinned by constraints/: the file of the interpreter's own version, or the newest one.
VERSION = $$($(BIN)/python -c 'import sys; print(*sys.version_info[:2], sep="")')
.venv/.with-%: .venv/.created pyproject.toml $(wildcard constraints/*.txt)
	@pins=constraints/py$(VERSION).txt; \
	[ -f "$$pins" ] || pins=$(lastword $(sort $(wildcard constraints/*.txt))); \
	echo "installing dependencies ($*, versions of $$pins; the first time takes a few minutes)"; \
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq -c "$$pins" -e ".[$*]"
	@touch $@

# Everything happens in .venv, made from requirements.lock; the system is not touched.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)
# Imports are compiled once and kept, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help env repro test slow check format ui bench lock clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-8s %s\n", $$1, $$2 }'

env: $(VENV)/.synced  ## make .venv from requirements.lock

$(VENV)/.synced: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	test -x $(VENV)/bin/uv || $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep -o '^uv==[0-9.]*' requirements.lock)"
	uv pip sync --quiet --python $(VENV)/bin/python --require-hashes requirements.lock
	@touch $@

repro: env  ## run what is out of date of the five stages
	@python -m classifier.params
	dvc repro

test: env  ## the fast tests
	python -m pytest -m "not slow"

slow: env  ## the slow tests: all ten epochs, and the committed metrics from a fresh clone
	python -m pytest -m slow

check: env  ## formatting, lint, types
	ruff format --check .
	ruff check .
	mypy

format: env  ## mend formatting and lint where it can be done by itself
	ruff check --fix .
	ruff format .

ui: env  ## MLflow's pages on http://127.0.0.1:5000
	python -m classifier.tracking

bench: env  ## time the pipeline; prints machine, versions, medians and ratios
	python -m benchmarks.pipeline

lock: env  ## write requirements.lock anew from pyproject.toml
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --extra dev --custom-compile-command "make lock" pyproject.toml --output-file requirements.lock

clean:  ## remove .venv and the tools' caches, never data, models or runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

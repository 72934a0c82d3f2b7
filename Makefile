# All targets use .venv, which is created from requirements.lock. Programs run as modules of its Python, because their
# scripts contain the absolute path of the folder where they were installed.
PYTHON ?= python3
PORT ?= 5000
N ?= 5
JOBS ?= 1
BIN := .venv/bin
RUN := $(BIN)/python -m
PEERS := .venv-peers/bin/python
OPTIONS = $(if $(SHUFFLE),--random-order --random-order-seed=$(SHUFFLE)) $(if $(REAL),--real-processes)
FAST := not slow and not nightly
PAGE := --page reports/benchmarks.md
SCRIPTS := .ci/run .ci/metrics-comment classifier/command.sh deploy/mlflow-server.sh deploy/train.slurm
COMPILE := $(RUN) uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock"

# DVC runs the stages with the first `python` on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Keep bytecode even if the shell disables it: a stage starts in half the time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help env repro test coverage slow nightly durations check format ui samples report verify seeds peers bench accelerator lock clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-11s %s\n", $$1, $$2 }'

env: .venv/.synced  ## create .venv from requirements.lock

.venv/.synced: requirements.lock classifier/command.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	test -x $(BIN)/uv || { $(PYTHON) -m venv --clear .venv && sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > .venv/uv.lock && $(RUN) pip install --quiet --disable-pip-version-check --require-hashes --requirement .venv/uv.lock; }
	$(RUN) uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	install -m 755 classifier/command.sh $(BIN)/classifier
	@touch $@

repro: env  ## run the stages that are out of date
	@$(RUN) classifier.pipeline.params
	$(RUN) dvc repro

test: env  ## run the fast tests (in random order: make test SHUFFLE=7)
	$(RUN) pytest -m "$(FAST)" --record=reports/durations-test.json $(OPTIONS)

coverage: env  ## run the tests of CI, and print the lines and branches that they do not reach
	$(RUN) pytest -m "not nightly" --cov --cov-report=term-missing:skip-covered

slow: env  ## run the slow tests: whole pipelines, and the committed metrics from a fresh clone (SHUFFLE=7; REAL=1: no forks)
	$(RUN) pytest -m "slow and not nightly" --record=reports/durations-slow.json $(OPTIONS)

nightly: env  ## run the nightly tests: repetitions and long trainings
	$(RUN) pytest -m nightly --record=reports/durations-nightly.json $(OPTIONS)

durations: env  ## print cases, processes and seconds by test file, from the last runs of the tests
	@$(RUN) tests.durations $(wildcard reports/durations-*.json)

check: env  ## check formatting, lint and types
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(BIN)/shellcheck $(SCRIPTS)
	$(RUN) mypy

format: env  ## fix formatting, and lint where ruff can
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

ui: env  ## serve the MLflow UI on http://127.0.0.1:5000 (another port: make ui PORT=5001)
	$(RUN) classifier ui --port $(PORT)

samples: env  ## draw reports/samples.png: training images as the network sees them with the current params.yaml
	$(RUN) classifier samples

report: env  ## write reports/report.html about the current model (compared with a commit: make report AGAINST=main)
	$(RUN) classifier report $(if $(AGAINST),--against $(AGAINST))

verify: env  ## rebuild every output in a clean clone with an empty cache, and compare
	$(RUN) classifier verify

seeds: env  ## run N seeds, print mean and standard deviation of each metric (make seeds N=5 S="lr=0.1 epochs=5")
	$(RUN) classifier seeds --count $(N) --jobs $(JOBS) $(addprefix --set-param ,$(S))

peers: env .venv-peers/.synced  ## create .venv-peers, with the frameworks that the benchmarks compare

.venv-peers/.synced: benchmarks/requirements.lock
	test -x $(PEERS) || $(RUN) uv venv --quiet --clear --python $(BIN)/python .venv-peers
	$(RUN) uv pip sync --quiet --python $(PEERS) --require-hashes benchmarks/requirements.lock
	@touch $@

bench: repro peers  ## run the benchmarks, for hours, into benchmarks/results.md (QUICK=1: minutes, into reports/benchmarks.md)
	$(RUN) benchmarks.pipeline $(if $(QUICK),--repeats 1 --experiments 1 --epochs 1 --files 1000 $(PAGE))
	$(PEERS) -m benchmarks.train_step $(if $(QUICK),--rounds 1 $(PAGE))
	$(RUN) benchmarks.step $(if $(QUICK),--rounds 1 $(PAGE))
	$(RUN) benchmarks.distributed $(if $(QUICK),--rounds 1 --epochs 1 $(PAGE))
	$(RUN) benchmarks.inference $(if $(QUICK),--seconds 1 $(PAGE))
	$(RUN) benchmarks.scale $(if $(QUICK),--images 1000 2000 $(PAGE))
	$(RUN) benchmarks.plan $(if $(QUICK),--sample 50 $(PAGE))
	$(PEERS) -m benchmarks.time_to_accuracy $(if $(QUICK),--seeds 1 --recipe-epochs 1 --limit-seconds 1 $(PAGE))

accelerator:  ## test and time training on this machine's GPU, with .venv if it exists, otherwise with PYTHON
	$(if $(wildcard .venv/.synced),$(RUN),$(PYTHON) -m) benchmarks.accelerator $(if $(QUICK),--quick)

lock: env  ## resolve pyproject.toml again into requirements.lock, also in benchmarks/ and deploy/
	$(COMPILE) --extra dev --extra team pyproject.toml --output-file requirements.lock
	$(COMPILE) --group pyproject.toml:peers --constraints requirements.lock pyproject.toml --output-file benchmarks/requirements.lock
	$(COMPILE) --constraints requirements.lock deploy/requirements.in --output-file deploy/requirements.lock

clean:  ## remove .venv, .venv-peers and the caches of tools; keep data, models and runs
	rm -rf .venv .venv-peers .pytest_cache .ruff_cache .mypy_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

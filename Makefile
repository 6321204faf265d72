# Everything happens in this clone: the environment is .venv, made on first use and reused afterwards.
# A rerun needs no network; pip runs again only when pyproject.toml or constraints.txt changes.

VENV   := .venv
PYTHON := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
PEERS  := $(VENV)/.peers-installed

# Passed through: make demo DEMO_ARGS="--quick", make test TEST_ARGS="-k lanczos", make bench QUICK=1,
# make paper PAPER_ARGS="--quick"
DEMO_ARGS ?=
TEST_ARGS ?=
RELEASE_ARGS ?=
TEST_JOBS ?= 2
PAPER_ARGS ?=
QUICK     ?=

# What a surrounding shell has activated or set must not leak into ours.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX

# The stamp names the clone it was made in: scripts and the editable install hold absolute paths, so in a
# copied or moved clone it counts for nothing. Nor does it where the interpreter behind .venv is gone.
ifneq ($(shell { $(PYTHON) -I -c '' && cat $(STAMP); } 2>/dev/null || true),$(CURDIR))
.PHONY: $(STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help demo paper test lint bench release browser clean-venv
.NOTPARALLEL:

help: ## show this list
	@echo "sgd_probe: make targets (the first one that needs it creates $(VENV))"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

demo: $(STAMP) ## train a small network with the probe and write a report (DEMO_ARGS="--quick")
	@$(VENV)/bin/sgd-probe demo $(DEMO_ARGS)

paper: $(STAMP) ## the paper's claims as experiments, docs/paper.md (half an hour; PAPER_ARGS="--quick")
	@$(PYTHON) examples/paper/run.py $(PAPER_ARGS)
	@$(if $(filter --only,$(PAPER_ARGS)),,$(PYTHON) examples/paper/referee.py $(PAPER_ARGS))

test: $(STAMP) browser ## run all tests (TEST_ARGS="-k lanczos", TEST_JOBS=2)
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(TEST_JOBS) --dist worksteal $(TEST_ARGS)

lint: $(STAMP) ## ruff check, ruff format --check, mypy --strict
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

bench: $(PEERS) ## run the scripts in benchmarks/ (QUICK=1 for a short run)
	@set -e; found=; \
	for script in benchmarks/[!_]*.py; do \
	    [ -e "$$script" ] || continue; found=yes; \
	    echo "==> $$script"; $(PYTHON) "$$script" $(if $(QUICK),--quick); \
	done; \
	[ -n "$$found" ] || echo "There are no benchmarks yet: each benchmarks/*.py will be run from here."

# What it installs, torch above all, it downloads: into an environment that is thrown away afterwards.
release: $(STAMP) ## build the distributions and use them in a clean environment (RELEASE_ARGS="--lowest")
	@$(PYTHON) .ci/release.py $(RELEASE_ARGS)

# Tried once per environment and never fatal: without a browser its tests skip and say so.
browser: $(STAMP) ## make a browser available to the tests of the report page, if we may
	@for name in chromium chromium-browser google-chrome; do \
	    if command -v $$name >/dev/null 2>&1; then exit 0; fi; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 && [ ! -e $(VENV)/.browser-tried ]; then \
	    touch $(VENV)/.browser-tried; \
	    echo "==> no browser found: installing chromium for the tests of the report page"; \
	    export DEBIAN_FRONTEND=noninteractive; \
	    if timeout 600 sh -c 'apt-get update && apt-get install -y --no-install-recommends chromium'; \
	    then exit 0; fi; \
	fi; \
	echo "==> no chromium or google-chrome on PATH: the browser tests of the report page will be skipped"

# What sgd_probe is compared with: only the benchmarks need it.
$(PEERS): $(STAMP)
	@$(PYTHON) -m pip install --disable-pip-version-check -c constraints.txt -e ".[bench]"
	@touch $@

clean-venv: ## remove .venv; the next target makes it anew
	rm -rf $(VENV)

$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if [ -e $(VENV) ] && ! $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	    echo "$(VENV) is broken (its python or pip does not run): repair it with 'make clean-venv'" >&2; exit 1; \
	fi; \
	if [ ! -e $(VENV) ]; then \
	    python=; for candidate in python3.11 python3 python3.12 python3.13; do \
	        if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	        then python=$$candidate; break; fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "sgd_probe needs Python 3.11 or newer; found: $$(python3 --version 2>&1 || true)" >&2; exit 1; \
	    fi; \
	    echo "==> creating $(VENV) with $$($$python --version)"; \
	    if ! $$python -m venv $(VENV); then \
	        rm -rf $(VENV); \
	        echo "'$$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	    fi; \
	fi; \
	rm -f $@; \
	echo "==> installing sgd_probe and its tools (torch is most of the download)"; \
	$(PYTHON) -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"; \
	printf '%s\n' '$(CURDIR)' > $@; \
	echo "==> $(VENV) is ready"

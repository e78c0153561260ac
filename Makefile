# make caption IMAGE=photo.jpg    set up on the first call, and describe a photo
# make test                       set up on the first call, and run the tests
#
# Needs Python 3.10 or newer with venv and pip (PYTHON=python3.12 picks one), and nothing else.

PYTHON ?= python3
VENV ?= .venv
IMAGE ?= examples/cat.jpg
# test files that run at a time
JOBS ?= 2

# not in a shell's words: names may have spaces and quotes
export IMAGE

.DEFAULT_GOAL := help
.PHONY: help install caption test test-slow lint clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo "make test-slow                  the tests that take minutes, too"
	@echo "make lint                       ruff"

caption: $(VENV)/.installed
	@$(VENV)/bin/mplug caption -- "$$IMAGE"

test: $(VENV)/.installed-test
	@$(VENV)/bin/python -m pytest -n "$(JOBS)" --dist loadfile

test-slow: $(VENV)/.installed-test
	@$(VENV)/bin/python -m pytest -m "slow or not slow"

lint: $(VENV)/.installed-test
	@$(VENV)/bin/ruff check .

install: $(VENV)/.installed

clean:
	rm -rf "$(VENV)" build dist .pytest_cache .ruff_cache

# The package is installed in place: only other dependencies make it necessary to install again.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV), once (PyTorch is large: this takes minutes)" >&2
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --editable . >&2
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV) with what the tests need, once (PyTorch is large: this takes minutes)" >&2
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --editable ".[test]" >&2
	@touch $@ $(VENV)/.installed

$(VENV)/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "error: Python 3.10 or newer is needed, and $(PYTHON) is `"$(PYTHON)" --version 2>&1 | head -n 1` (make PYTHON=python3.12 ... picks another)" >&2; exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)" >/dev/null 2>&1 || { rm -rf "$(VENV)"; \
	  echo "error: $(PYTHON) can't make a virtual environment (it lacks venv or pip; on Debian: apt install python3-venv)" >&2; exit 1; }

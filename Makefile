# Two commands for everybody: `make demo` and `make test`. Each does all the set-up that it needs.

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip -qq --disable-pip-version-check install
TORCH  := $(shell grep '^torch==' requirements-dev.txt)
ARGS   ?=

# The build finds the environment's own cmake and ninja.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help demo test bench setup clean distclean

help:
	@echo "make demo       train a small language model with the ordinary loss and with fusedloss, and compare"
	@echo "make test       run the whole test suite"
	@echo "make bench      run the benchmarks"
	@echo "make setup      only the set-up: environment, pinned requirements, compiled extension"
	@echo "make clean      remove what was built"
	@echo "make distclean  remove the environment too"
	@echo
	@echo "PYTHON=python3.12   another Python (3.10 or newer) for the environment"
	@echo "ARGS='...'          more arguments for the demo, the tests or the benchmarks"

demo: setup
	@$(RUN) examples/train_language_model.py $(ARGS)

test: setup
	@$(RUN) -m pytest $(ARGS)

bench: setup
	@$(RUN) -m pytest bench $(ARGS)

# --- set-up: a stamp in the environment for each step that is done ---

setup: $(VENV)/.extension

$(VENV)/.requirements: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fusedloss needs Python 3.10 or newer: make PYTHON=...")'
	@echo "set-up: an environment in $(VENV), by $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "set-up: $(TORCH)"
	@$(PIP) '$(TORCH)'
	@echo "set-up: the other development requirements"
	@$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/.extension: $(VENV)/.requirements $(wildcard setup.py pyproject.toml CMakeLists.txt) $(shell find csrc -type f)
	@echo "set-up: the compiled extension"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .benchmarks $(VENV)/.extension
	find fusedloss -name '*.so' -o -name '*.dylib' -o -name '*.pyd' | xargs rm -f
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# Two commands for everybody: `make demo` and `make test`. Each does all the set-up that it needs.

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip -qq --disable-pip-version-check install
TORCH  := $(shell grep '^torch==' requirements-dev.txt)
ARGS   ?=
# `make gpu` takes an environment that is there, PYTHONPATH included: torch (2.11) and triton (3.6) for the device, nvcc, cmake
# (3.24), ninja, setuptools (77), pybind11, pytest, pytest-benchmark and hypothesis; of the peers (liger-kernel,
# cut-cross-entropy, quack-kernels, torchsort) those that it can import.
GPU_PYTHON ?= python3
GPU_DEVICE ?= cuda
GPU_ROWS   ?= bench/results/gpu.csv

# The build finds the environment's own cmake and ninja.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help demo words rank test bench gpu setup clean distclean

help:
	@echo "make demo       train a small language model with the ordinary loss and with fusedloss, and compare"
	@echo "make words      train a next-word model of hundreds of thousands of words with four output layers, and compare"
	@echo "make rank       train a ranker with ranking losses, a soft rank correlation and regression, and compare"
	@echo "make test       run the whole test suite"
	@echo "make bench      run the benchmarks"
	@echo "make gpu        on a machine with a GPU: build for it, run the tests on it, benchmark against the peers"
	@echo "make setup      only the set-up: environment, pinned requirements, compiled extension"
	@echo "make clean      remove what was built"
	@echo "make distclean  remove the environment too"
	@echo
	@echo "PYTHON=python3.12   another Python (3.10 or newer) for the environment"
	@echo "ARGS='...'          more arguments for the demos, the tests or the benchmarks"

demo: setup
	@$(RUN) examples/train_language_model.py $(ARGS)

words: setup
	@$(RUN) examples/train_word_model.py $(ARGS)

rank: setup
	@$(RUN) examples/train_ranker.py $(ARGS)

test: setup
	@$(RUN) -m pytest $(ARGS)

bench: setup
	@$(RUN) -m pytest bench $(ARGS)

# The benchmark runs whatever the tests say; what either said is told at the end.
gpu: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
gpu:
	@$(GPU_PYTHON) -c "import hypothesis, pybind11, pytest, pytest_benchmark, torch; from setuptools import version as v; \
	assert int(v.__version__.split('.')[0]) >= 77, 'setuptools ' + v.__version__ + ' is too old'"
	CMAKE_ARGS="$(CMAKE_ARGS) $(if $(filter cuda%,$(GPU_DEVICE)),-DFUSEDLOSS_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native)" $(GPU_PYTHON) setup.py -q build_ext --inplace
	$(GPU_PYTHON) -m fusedloss info
	@tests=passed; bench=done; \
	$(GPU_PYTHON) -m pytest -q --device $(GPU_DEVICE) tests/test_device.py $(ARGS) || tests=FAILED; \
	$(GPU_PYTHON) -m pytest -q --device $(GPU_DEVICE) --maxfail=50 --ignore tests/test_device.py $(ARGS) || tests=FAILED; \
	$(GPU_PYTHON) bench/gpu.py --device $(GPU_DEVICE) --rows $(GPU_ROWS) $(BENCH_ARGS) || bench=FAILED; \
	echo "make gpu: tests $$tests, benchmark $$bench"; test "$$tests $$bench" = "passed done"

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

# The commands are 'make bench' and 'make test'; 'make help' lists the rest.
# They work in .venv, which the first one creates (the only step that needs the network).

PYTHON ?= python3
VENV := .venv
IN_VENV := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
ARGS ?=
# In an environment of its own, 2 GB: it does not go together with constraints.txt, but for torch.
LITERT_CONVERTER = $(shell grep '^torch==' constraints.txt) litert-torch==0.10.0

export ESPKERNELS_WERROR ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CXX_FILES = $(shell find csrc tests bench \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install build test bench peers training language lint format clean
.DELETE_ON_ERROR:

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1|/' | column -t -s '|'

install: build ## .venv with the pinned dependencies and an editable build

# Two processes of one thread each: most of what a test does is not what torch's threads share. A file's tests stay in
# one of them, with what it builds once.
test: build ## all tests; make test ARGS="-k pyramid" for some
	OMP_NUM_THREADS=1 $(IN_VENV) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: build ## verify and time the kernels; table, chart and JSON in bench/results/
	$(IN_VENV) -m espkernels bench $(ARGS)

peers: $(VENV)/peers ## beside onnxruntime, OpenVINO, ncnn, LiteRT and torch.compile; installs them first; bench/results/peers.*
	$(IN_VENV) -m bench.peers $(ARGS)

training: build ## training steps beside eager, torch.compile and checkpointing; bench/results/training.*; ARGS="--full"
	$(IN_VENV) -m bench.training $(ARGS)

language: build ## recurrent layers and language models beside torch's LSTM; bench/results/language.*
	$(IN_VENV) -m bench.language $(ARGS)

lint: build ## ruff, mypy and clang-format, all read-only
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf build/typing && mkdir -p build/typing/espkernels
	ln -sr $(filter-out %/models,$(wildcard espkernels/*)) models build/typing/espkernels/
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: build ## rewrite the sources in the house style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean: ## remove everything that make made
	rm -rf $(VENV) build dist espkernels.egg-info espkernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/peers: constraints.txt pyproject.toml | build
	$(IN_VENV) -m pip install -c constraints.txt --no-build-isolation -e '.[bench,peers]'
	$(IN_VENV) -m venv --clear --without-pip $(VENV)/litert
	$(IN_VENV) -m pip --python $(VENV)/litert/bin/python install $(LITERT_CONVERTER) || rm -r $(VENV)/litert
	@touch $@

# Compiles only what changed, and says so in a line when nothing did.
build: $(INSTALLED)
	@$(IN_VENV) setup.py -q build_ext --inplace

$(INSTALLED): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("espkernels needs Python >= 3.10, and $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@# Debian's Python without its python3-venv package makes no environment with pip in it; its own pip then puts one there.
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --without-pip $(VENV)
	@$(IN_VENV) -m pip --version >/dev/null 2>&1 || \
		PYTHONPATH=$$($(PYTHON) -c 'import os, pip; print(os.path.dirname(os.path.dirname(pip.__file__)))') \
		$(IN_VENV) -m pip install --ignore-installed pip
	$(IN_VENV) -m pip install -c constraints.txt setuptools wheel ninja pybind11 torch numpy
	$(IN_VENV) -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# make build | demo | test | lint | planted | bench | cuda-check | clean.   Everything lives in .venv and build/.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := build/.installed
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: build demo test lint planted bench cuda-check clean
build: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet "torch==$(TORCH)" "setuptools>=77" wheel pybind11 ninja
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev,demo]"
	@mkdir -p $(@D) && touch $@

demo: build
	$(BIN)/theseus demo --out build/demo

test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: build
	$(BIN)/ruff check .
	$(BIN)/mypy

# Applies every planted bug to a copy and shows that its named test turns red.
planted: build
	OMP_NUM_THREADS=1 $(BIN)/python tests/planted/run.py

bench: build
	@mkdir -p bench/results
	$(BIN)/python -m pytest bench -q -p no:xdist -o python_files='bench_*.py' -o addopts= --benchmark-columns=min,median \
	    --benchmark-json=bench/results/cross_moment-$$($(BIN)/python -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')").json

# What a machine with nvcc can show without a GPU: compiles, loads under a CUDA torch, and its CPU path is right.
cuda-check:
	.ci/cuda-check

clean:
	rm -rf build dist *.egg-info theseus_ext/*.so

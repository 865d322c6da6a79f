# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
JOBS ?= 2
# Installation compiles the CPU kernels, so it is made again when their sources change.
PACKAGE := pyproject.toml setup.py constraints.txt npu_fusion/kernels/cpu/_build.py $(wildcard npu_fusion/kernels/cpu/src/*)

.PHONY: help demo test test-all test-ascend test-triton lint types bench bench-quantization-peers clean
help:
	@echo "make demo      install into $(VENV) and run the main job on the CPU"
	@echo "make test      install and run the tests (test-all: the slow ones too)"
	@echo "make test-ascend   the tests with the real torch_npu, on any Linux (downloads 45 MB once)"
	@echo "make test-triton   the tests of the GPU kernels, without a GPU (downloads 200 MB once)"
	@echo "make lint      ruff;  make types: mypy;  make bench: the tables of docs/performance.md"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch is named in the same command as the package: a range alone would take the newest build.
$(VENV)/.demo: $(PACKAGE) | $(BIN)/python
	@echo "installing torch and the demo's packages into $(VENV) (once, a few minutes) ..."
	$(PIP) -r constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(PACKAGE) | $(BIN)/python
	@echo "installing torch and the test tools into $(VENV) (once, a few minutes) ..."
	$(PIP) -r constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/npu-fusion demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS)

test-ascend: export NPU_FUSION_CACHE := $(abspath $(VENV)/cache)
test-ascend: $(VENV)/.dev
	$(BIN)/npu-fusion offline-setup
	$(BIN)/python -m npu_fusion.hosts.offline -- $(BIN)/python -m pytest -n $(JOBS) tests/ascend

# The triton that torch 2.13 pins. In a folder of its own: where it is installed, every torch.compile loads it.
$(VENV)/triton: | $(VENV)/.dev
	$(PIP) --no-deps --target $@ triton==3.7.1

# The interpreter runs the kernels, the compiler makes machine code of them; neither does the other's work.
test-triton: export PYTHONPATH := $(abspath $(VENV)/triton)
test-triton: $(VENV)/triton
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) tests/kernels/triton
	$(BIN)/python -m pytest -n $(JOBS) tests/kernels/triton

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.passes
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.end_to_end
	$(BIN)/python -m benchmarks.quantization

# Both want versions of packages that nobody else does, hence an environment of their own.
bench-quantization-peers: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)/peers
	$(VENV)/peers/bin/python -m pip install --disable-pip-version-check -r constraints.txt torchao==0.18.0 \
		llmcompressor==0.14.0.1 -e '.[demo]'
	$(VENV)/peers/bin/python -m benchmarks.quantization_peers --update docs/quantization.md

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis npu_fusion_dump *.egg-info

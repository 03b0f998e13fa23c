# Every target sets up what it needs in .venv; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
# Folder of the demo. `make demo` continues a demo that was interrupted there.
OUTPUT ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin
# A relative path would be read from pip's temporary build folder.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Not the byte code of _build: the tests import it, and would have the next target build everything.
SOURCES := setup.py CMakeLists.txt constraints.txt $(shell find csrc _build -type f -not -name '*.pyc' 2>/dev/null)
# Threads of several processes that share the cores would take each other's time by waiting actively.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
CPP_FILES = $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast bench bench-gpu bench-gpu-models lint format clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 24

demo: $(VENV)/.installed  ## compress the embedded model into OUTPUT=runs/demo, or continue that
	@if test -e '$(OUTPUT)/compress.json'; then \
		echo 'The demo in $(OUTPUT) is finished: see $(OUTPUT)/grid.png and $(OUTPUT)/report.md.'; \
		echo 'For another one: make demo OUTPUT=runs/another'; \
	else \
		$(BIN)/python -m fastdistill.compress --drop-blocks 4 --output '$(OUTPUT)'; \
	fi

test: $(VENV)/.installed-dev  ## run every test that needs no GPU, on up to four cores
	$(PYTEST)

test-fast: $(VENV)/.installed-dev  ## run the tests that are not marked slow: under three minutes on two cores
	$(PYTEST) -m 'not slow'

bench: $(VENV)/.installed-dev  ## time operators and models against stock, torch.compile and a plain copy
	$(BIN)/python -m benchmarks.run

bench-gpu: $(VENV)/.installed-dev  ## time operators on a GPU with cold caches, and the best library where there is one
	$(BIN)/pip install --quiet quack-kernels || echo "quack-kernels cannot be installed: its rows stay empty"
	$(BIN)/python -m benchmarks.run ops --gpu

bench-gpu-models: $(VENV)/.installed-dev  ## time attention, blocks and FLUX.1-dev's geometry on a GPU, inference and recovery
	$(BIN)/pip install --quiet xformers torchao || echo "xformers or torchao cannot be installed: their rows stay empty"
	$(BIN)/python -m benchmarks.run models --gpu

lint: $(VENV)/.installed-dev  ## check layout, style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: $(VENV)/.installed-dev  ## put layout and style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) build fastdistill/*.so *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || (echo "no venv module: on Debian, apt-get install python3-venv" && exit 1)

# The part of pyproject.toml that concerns the package. Changes only when that part does, so that a
# developers' package or a linter's setting builds nothing.
$(VENV)/.package: pyproject.toml | $(BIN)/python
	@sed '/^\[dependency-groups\]/,$$d' $< >$@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

# torch first: the build then takes its headers instead of downloading a second copy.
$(VENV)/.installed: $(VENV)/.package $(SOURCES)
	$(BIN)/pip install --quiet torch
	$(BIN)/pip install --quiet --editable .
	touch $@

# pip 25.1 is the first that knows dependency groups.
$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet 'pip>=25.1'
	$(BIN)/pip install --quiet --group dev
	touch $@

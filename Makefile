# `make demo` and `make test` set up everything they need in .venv; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A relative path would be read from pip's temporary build folder.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc _build -type f 2>/dev/null)

.PHONY: demo test bench bench-gpu bench-gpu-models lint format clean

demo: $(VENV)/.installed  ## compress the embedded model and show where the images are
	$(BIN)/python -m fastdistill.compress --drop-blocks 4 --output runs/demo-$$(date +%Y%m%d-%H%M%S)

# Threads of several processes that share the cores would take each other's time by waiting actively.
test: $(VENV)/.installed-dev  ## everything that runs without a GPU, on up to four cores
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

bench: $(VENV)/.installed-dev  ## operators and models against stock, torch.compile and a plain copy
	$(BIN)/python -m benchmarks.run

bench-gpu: $(VENV)/.installed-dev  ## operators on a GPU with cold caches, and the best library where there is one
	$(BIN)/pip install --quiet quack-kernels || echo "quack-kernels cannot be installed: its rows stay empty"
	$(BIN)/python -m benchmarks.run ops --gpu

bench-gpu-models: $(VENV)/.installed-dev  ## attention, blocks and FLUX.1-dev's geometry on a GPU, inference and recovery
	$(BIN)/pip install --quiet xformers torchao || echo "xformers or torchao cannot be installed: their rows stay empty"
	$(BIN)/python -m benchmarks.run models --gpu

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf $(VENV) build fastdistill/*.so *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || (echo "no venv module: on Debian, apt-get install python3-venv" && exit 1)

# torch first: the build then takes its headers instead of downloading a second copy.
$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet torch
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

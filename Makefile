# Every target sets up what it needs; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A process for each core, each with one thread; what one file's tests share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses auto --dist loadfile

.PHONY: setup demo check test clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python export/build_engine.py
	$(BIN)/python runtime/generate.py build/doge-tiny --prompt 'ROMEO:' --max-tokens 200 --temperature 0.8 --top-p 0.95 --seed 7

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(PYTEST) -m 'not slow'

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(PYTEST)

clean:
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info

# Every target sets up what it needs: .venv with the pinned dependencies, and Java where there is none.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
WHAT   ?= way
# More processes than cores: tests of servers mostly wait. A file's tests share a server, and a process.
JOBS   ?= -n 3 --dist loadfile
ARGS   ?=

.PHONY: help setup demo test test-slow test-extras test-unpinned lint format types bench dist clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## .venv with pinned dependencies; a Java of its own where no Java 17 is found

$(STAMP): setup.py constraints.txt src/marwright/server/java.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "marwright needs Python 3.10 or newer, found " + sys.version.split()[0] + "; make setup PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m marwright.server.java || $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[java]'
	touch $@

demo: $(STAMP)  ## the whole way once: train, pack, serve, predict, switch versions
	$(BIN)/marwright demo $(ARGS)

test: $(STAMP)  ## every test but the slow ones, a real TorchServe included
	$(BIN)/python -m pytest $(JOBS) $(ARGS)

test-slow: $(STAMP)  ## the slow tests: the wheel in a clean environment, the demo twice at once
	$(BIN)/python -m pytest -m slow $(ARGS)

test-extras: $(STAMP)  ## what needs OpenVINO, TensorFlow, LiteRT, TensorBoard: 2 GB more in .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,openvino,tf,litert,tensorboard]'
	$(BIN)/python -m pytest -m 'slow or not slow' tests/training tests/handlers/test_backend.py tests/cli/test_export.py $(ARGS)

test-unpinned: $(STAMP)  ## Flower, Opacus and MLflow, in .venv-unpinned: they want other versions of much
	$(PYTHON) -m venv .venv-unpinned
	.venv-unpinned/bin/pip install --quiet torch==2.13.0 torchvision==0.28.0 pytest pytest-timeout hypothesis --editable '.[federated,private,mlflow]'
	.venv-unpinned/bin/python -m pytest -m 'slow or not slow' tests/training/federated tests/training/test_tracking.py $(ARGS)

lint: $(STAMP)  ## ruff: style, imports, docstrings, format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## mypy, strict; then the tests against the package as it installs
	$(BIN)/mypy
	rm -rf build/types && $(BIN)/pip install --quiet --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy --config-file tests/mypy.ini tests benchmarks

bench: $(STAMP)  ## measure again: make bench WHAT=way
	$(BIN)/python benchmarks/$(WHAT).py $(ARGS)

dist: $(STAMP)  ## build the wheel and the source archive into dist/
	rm -rf build dist && $(BIN)/python -m build

clean:  ## remove what was built, not what was trained or packed
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# make demo | test | bench | lint | gpu-check      each makes what it needs, from nothing, and does nothing twice
#
#   PYTHON=path/to/python   use that interpreter's environment as it is, instead of .venv (torch must be in it)
#   PYLLMTUNE_BUILD=0|1     pure Python | fail if the compiled modules cannot be built (default: best effort)
#   ARGS="..."              arguments for the demo or the benchmark

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: demo test bench lint gpu-check format env clean

STAMPS := build/stamps
ifdef PYTHON
  PY := $(PYTHON)
  STAMPS := build/stamps-$(shell echo "$(PYTHON)" | cksum | cut -d' ' -f1)
else
  PY := .venv/bin/python
endif
CLANG_FORMAT := $(PY) -c "import sys, clang_format; sys.exit(clang_format.clang_format())"
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

SOURCES := setup.py pyproject.toml $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

demo: $(STAMPS)/built
	$(PY) -m pyllmtune demo $(ARGS)

test: $(STAMPS)/dev $(STAMPS)/built
	$(PY) -m pytest -q --numprocesses 2 --dist loadfile --durations=10 $(ARGS)

bench: $(STAMPS)/built
	$(PY) -m benchmarks $(or $(ARGS),all)

gpu-check: $(STAMPS)/dev
	$(PY) -m tests.gpu_check $(ARGS)

lint: $(STAMPS)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')

format: $(STAMPS)/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')

env: $(STAMPS)/built
	$(PY) -m pyllmtune env

clean:
	rm -rf build dist *.egg-info pyllmtune/*.so

ifdef PYTHON
$(STAMPS)/demo $(STAMPS)/dev:
	mkdir -p $(STAMPS) && touch $@
else
.venv/bin/python:
	python3 -m venv .venv

$(STAMPS)/demo: requirements/demo.txt | .venv/bin/python
	mkdir -p $(STAMPS)
	$(PIP) -r requirements/demo.txt
	touch $@

$(STAMPS)/dev: requirements/dev.txt requirements/bench.txt requirements/demo.txt requirements/no-deps.txt | .venv/bin/python
	mkdir -p $(STAMPS)
	$(PIP) -r requirements/dev.txt
	$(PIP) --no-deps -r requirements/no-deps.txt
	touch $@ $(STAMPS)/demo
endif

$(STAMPS)/built: $(SOURCES) | $(STAMPS)/demo
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

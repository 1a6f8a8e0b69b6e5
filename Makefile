# Everything runs in .venv, with the versions of constraints.txt. A second call does only what is left to do.
#
# PYTHON     the interpreter to start from, 3.11 or newer (default: the first one found)
# PIP_EXTRA  more options for pip. Where the package index gives a CUDA build of torch and you have no GPU,
#            name your index of CPU builds here; torch is installed first, so nothing replaces it afterwards.
# ARGS       more options for the demo or the tests:  make test ARGS="-k ledger"

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP_EXTRA ?=
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq $(PIP_EXTRA) -c constraints.txt
SOURCES := cohortium common strategies client server simulations

.PHONY: help install demo test lint format clean proto bench bench-small
.DELETE_ON_ERROR:

help:
	@echo "make demo     install, then federate the demo table over its four hospitals (result: demo-result/)"
	@echo "make test     install what tests need, then run them all"
	@echo "make lint     ruff and mypy --strict"
	@echo "make format   let ruff format the code"
	@echo "make bench    the record: ours against every peer (hours; goes on where it was stopped)"
	@echo "make bench-small  one table, two peers, two epsilons; fails if we lose to one"
	@echo "make install  the virtual environment .venv alone"
	@echo "make clean    remove .venv, build products and caches"

install: .venv/.installed

# The stamps live inside .venv, so that removing it removes them.
.venv/.python:
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer with venv (Debian: python3 and python3-venv)"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.torch: constraints.txt | .venv/.python
	@echo "Installing; the first time takes some minutes."
	$(INSTALL) setuptools torch
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml
	$(INSTALL) --no-build-isolation --editable .
	@touch $@

.venv/.developing: .venv/.installed
	$(INSTALL) --no-build-isolation --editable '.[test,lint]'
	@touch $@

demo: .venv/.installed
	$(BIN)/cohortium demo --out demo-result --force $(ARGS)

# One thread each: three test processes share what may be two cores, because a third of their time they wait.
test: .venv/.developing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder $(ARGS)

bench: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m cohortium.simulations.benchmarks.record --results docs/benchmark $(ARGS)

bench-small: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m cohortium.simulations.benchmarks.record.small $(ARGS)

# mypy does not follow the editable install's mapping of folders to packages: give it a plain copy.
lint: .venv/.developing
	$(BIN)/ruff check $(SOURCES) tests
	$(BIN)/ruff format --check $(SOURCES) tests
	@rm -rf build
	$(PIP) install -qq --no-deps --no-build-isolation --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p cohortium

format: .venv/.developing
	$(BIN)/ruff check --fix $(SOURCES) tests
	$(BIN)/ruff format $(SOURCES) tests

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stubs beside the .proto are checked in; this makes them again, byte for byte (tests/common/protocol says so).
PROTO_TOOLS := grpcio-tools==1.76.0 protobuf==6.33.6 setuptools==80.9.0

proto:
	@test -x build/proto/bin/python || $(PYTHON) -m venv build/proto
	build/proto/bin/python -m pip --disable-pip-version-check install -qq $(PIP_EXTRA) $(PROTO_TOOLS)
	build/proto/bin/python -m grpc_tools.protoc -Icohortium/common/protocol=common/protocol \
		--python_out=build/proto --pyi_out=build/proto --grpc_python_out=build/proto \
		cohortium/common/protocol/consortium.proto
	cp build/proto/cohortium/common/protocol/consortium_pb2*.py* common/protocol/

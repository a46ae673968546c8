# vfio-model: `make help` lists what can be done here.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Tests use at most two workers: each starts real processes.
WORKERS ?= 2

.PHONY: help venv demo test test-kvm check bench interop interop-guest clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml setup.py $(wildcard vfio_model/batch/*.[ch]) vfio_model/host/_path.c $(wildcard vfio_model/memory/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "vfio-model needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: on Debian, apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,check]'
	@touch $@

venv: $(STAMP)  ## make .venv with everything in it

demo: $(STAMP)  ## replay a recorded Linux boot against live processes
	@$(BIN)/vfio-model run linux-ddw-boot

test: $(STAMP)  ## run the tests, then look for orphans
	$(BIN)/python -m pytest -n $(WORKERS)

# Every test that asks what --kvm says bears the mark "machine": without it it fails in "make test". The mark "long" is for
# tests of damaged migration streams, where acceleration says little.
test-kvm: $(STAMP)  ## run the tests of machines again, with in-kernel acceleration
	$(BIN)/python -m pytest -n $(WORKERS) --kvm -m "machine and not long"

check: $(STAMP)  ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# With atheris where pip has it for this Python, with random bytes elsewhere; FUZZ_SECONDS is for each target.
FUZZ_SECONDS ?= 60
fuzz: $(STAMP)  ## fuzz the vfio-user code, FUZZ_SECONDS for each target
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]' || echo "no atheris here: random bytes"
	@$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

bench: $(STAMP)  ## measure, as ratios to limits taken in the same run
	@$(BIN)/vfio-model bench
	@tools/get-qemu --guest-x86 .qemu
	@$(BIN)/python -m tests.interop.bench

# Stock QEMU and a Linux guest by Debian's packages, in .qemu/; VFIO_MODEL_QEMU names another qemu-system-ppc64.
interop: $(STAMP)  ## compare with stock QEMU, plug our devices into it and into its Linux (fetches them)
	@tools/get-qemu --guest-x86 .qemu
	$(BIN)/python -m pytest -p no:xdist tests/interop

interop-guest: $(STAMP)  ## boot Linux on stock QEMU, record it, check the recording
	@tools/get-qemu --guest-ppc .qemu
	$(BIN)/python -m tests.interop.guest_boot .qemu

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .qemu

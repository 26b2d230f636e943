# Two commands do everything on a bare Debian 12+ or Ubuntu 24.04+ machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
FASHION := /usr/share/datasets/fashion-mnist
SHELL := /bin/bash
# One more than the two cores of CI, since the tests of Slurm mostly wait.
WORKERS ?= 3

.PHONY: help setup quickstart test lint bench
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1@/' | column -t -s@

setup: $(VENV)/.ready ## install system packages (apt) and .venv/ with torch, DeepSpeed, FFCV, timm, W&B, submitit (6 GB)

# uv installs what pip would, in a quarter of the time; the versions are those of constraints.txt. Bytecode is compiled at
# once: where PYTHONDONTWRITEBYTECODE is set, every start would compile torch, timm and DeepSpeed again, for 12 s.
$(VENV)/.ready: pyproject.toml constraints.txt tools/system_packages.sh
	@tools/system_packages.sh
	@test -x $(PY) || { echo "creating $(VENV)/"; $(PYTHON) -m venv $(VENV); }
	@echo "installing tdkd-dist with torch, DeepSpeed, FFCV and the test peers into $(VENV)/ (6 GB, some minutes)"
	@$(PY) -m pip install -q -c constraints.txt uv
	@$(VENV)/bin/uv pip install -q --compile-bytecode --python $(PY) -c constraints.txt -e '.[train,report,export,dev]'
	@touch $@

data/fashion_train.beton: | $(VENV)/.ready
	@$(PY) tools/write_beton.py $(FASHION) $@ --split train

data/fashion_val.beton: | $(VENV)/.ready
	@$(PY) tools/write_beton.py $(FASHION) $@ --split val

quickstart: $(VENV)/.ready data/fashion_train.beton data/fashion_val.beton ## the main job on real images: teacher, then spiking student
	@echo; echo "1/2 a timm teacher on Fashion-MNIST, two ranks"
	@$(PY) launch/submit.py recipe=fashion_teacher
	@echo; echo "2/2 distil it into a spiking SEW-ResNet, two ranks"
	@$(PY) launch/submit.py recipe=fashion_sew
	@echo
	@echo "picture:    runs/fashion_sew/figures/accuracy_against_timestep.png"
	@echo "record:     runs/fashion_sew/metrics.jsonl, W&B (offline) in runs/fashion_sew/wandb/"
	@echo "checkpoint: runs/fashion_sew/student.safetensors"
	@echo "next:       $(PY) launch/submit.py --list, or README.md for ImageNet"

test: $(VENV)/.ready ## lint, types and all tests but those that need a GPU
	@$(MAKE) --no-print-directory lint
	@$(PY) -m pytest -m "not gpu" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.ready ## ruff and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check -q .
	@$(VENV)/bin/mypy

bench: $(VENV)/.ready ## a training step of every student; prints a table
	@$(PY) tools/bench/students.py

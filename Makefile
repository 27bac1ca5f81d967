# Everything this project does, on a machine with Linux, Python >= 3.11 and make. `make help` lists the targets.
#
#   PYTHON=python3.12       the interpreter to build .venv with (default: python3.11, else python3)
#   EXTRAS=cpu,dev          the extras to install: cpu or gpu, never both
#   TORCH_INDEX=URL         where to take torch from; without a GPU, https://download.pytorch.org/whl/cpu saves gigabytes
#   JOBS=2                  how many processes run the tests, with one processor thread each

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.ONESHELL:

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRAS ?= cpu,dev
TORCH_INDEX ?=
JOBS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRAS)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	$(if $(findstring gpu,$(EXTRAS)),--constraint constraints-gpu.txt)
# The networks of the tests are too small for more than one thread; a file stays in one process, and shares what it made.
PYTEST := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	$(if $(filter-out 1,$(JOBS)),--numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder)

.PHONY: help setup check test test-extras test-all demo evidence long-run benchmarks rounds before-finetuning loss-defaults latency-front latency-share bench bench-scoring bench-train engine-comparison reference clean distclean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 20

setup: $(STAMP) ## create .venv and install the pinned versions

$(STAMP): pyproject.toml constraints.txt constraints-gpu.txt
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or later, or give PYTHON=..." >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
		echo "$(PYTHON) is missing or older than 3.11: install Python 3.11 or later, or give PYTHON=..." >&2; exit 1; }
	echo "[setup] virtual environment in $(VENV), with $$($(PYTHON) --version)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || {
		rm -rf $(VENV); echo "no virtual environment: on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	# By itself and first: a CPU build that pip can see is taken, and nothing later asks for another one.
	echo "[setup] torch (some minutes on a slow line; TORCH_INDEX is said at the top of the Makefile)"
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	echo "[setup] dpctl with its dependencies [$(EXTRAS)]"
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[$(EXTRAS)]'
	touch $@
	echo "[setup] done: $(BIN)/dpctl --help"

check: $(STAMP) ## lint, format, types, import layers, sizes, Dockerfile
	@echo "[check] ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	echo "[check] sizes of files and functions"
	$(BIN)/python scripts/check_sizes.py
	echo "[check] mypy"
	$(BIN)/mypy
	echo "[check] import layers"
	$(BIN)/lint-imports --no-logo
	echo "[check] hadolint"
	$(BIN)/hadolint Dockerfile

test: $(STAMP) ## the tests: CPU, no network, a quarter of an hour on two cores
	$(PYTEST) -m "not slow and not gpu and not trt"

# They are not in [dev]: diffusers loads torchao with every command, where it is there.
EXTRA_TESTS := tests/finetune/test_optimizers.py tests/finetune/test_trackers.py
build/extras/.installed: constraints.txt constraints-extras.txt
	rm -rf build/extras
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/extras \
		--requirement constraints-extras.txt $$(grep ^protobuf= constraints.txt)
	touch $@

test-extras: $(STAMP) build/extras/.installed ## the tests of the extras [adam8bit] and [tensorboard], installed apart
	PYTHONPATH=build/extras OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(EXTRA_TESTS)

test-all: $(STAMP) ## every test this machine can run, with the full matrices
	$(PYTEST) --durations=20

demo: $(STAMP) ## the whole chain on the reference model, about five minutes; continues after a stop
	$(BIN)/dpctl run --out demo

long-run: $(STAMP) ## the chain of docs/evidence.md, with the slim network from scratch; half an hour, continues
	$(BIN)/dpctl run examples/evidence.toml --out evidence
	$(BIN)/dpctl bench reference evidence/finetuned --out evidence/all-threads --rounds 40 --samples 0 --force
	mkdir -p docs/evidence/all-threads
	cp evidence/bench/bench.json evidence/bench/*.md evidence/bench/*.png evidence/bench/*.svg docs/evidence/
	cp evidence/all-threads/bench.json evidence/all-threads/*.md evidence/all-threads/*.svg docs/evidence/all-threads/
	sed -i 's#$(CURDIR)/##g; s#$(HOME)/#~/#g' docs/evidence/*.json docs/evidence/*.md docs/evidence/all-threads/*.json \
		docs/evidence/all-threads/*.md
	echo "[long-run] docs/evidence/report.md; the page is evidence/bench/report.html"

evidence: $(STAMP) ## docs/experiments.md: criteria, distillation, seeds, scratch; ten hours of two cores, goes on after a stop
	seq $(JOBS) | OMP_NUM_THREADS=1 xargs -P $(JOBS) -I_ $(BIN)/python scripts/experiments.py
	OMP_NUM_THREADS=1 $(BIN)/python scripts/experiments.py --page docs/experiments.md

benchmarks: $(STAMP) ## docs/benchmarks.md: every backend without a GPU over four step counts, half an hour; continues after a stop
	$(BIN)/dpctl run examples/benchmarks.toml --out benchmarks
	mkdir -p docs/benchmarks
	cp benchmarks/bench/bench.json benchmarks/bench/*.md benchmarks/bench/*.png benchmarks/bench/*.svg docs/benchmarks/
	sed -i 's#$(CURDIR)/##g; s#$(HOME)/#~/#g' docs/benchmarks/*.json docs/benchmarks/*.md

rounds: $(STAMP) ## a cut to 20 % of the MACs in one and in three rounds, with compensation and without; half an hour, continues
	mkdir -p rounds
	for name in one-cut rounds; do
		sed 's/^align = 8$$/&\ncompensate = false/' examples/$$name.toml > rounds/$$name-plain.toml
		$(BIN)/dpctl run examples/$$name.toml --out rounds/$$name
		$(BIN)/dpctl run rounds/$$name-plain.toml --out rounds/$$name-plain
	done
	$(BIN)/python scripts/rounds_against_one_cut.py 'one cut=rounds/one-cut' 'three rounds=rounds/rounds' \
		'one cut, not compensated=rounds/one-cut-plain' 'three rounds, not compensated=rounds/rounds-plain'

before-finetuning: $(STAMP) ## the tables of docs/pruning.md on cuts before any finetune, half an hour; continues after a stop
	$(BIN)/python scripts/before_finetuning.py --page docs/pruning.md

loss-defaults: $(STAMP) ## the table of docs/losses.md: losses and timestep samplings at a fixed budget; continues after a stop
	$(BIN)/python scripts/loss_defaults.py --page docs/losses.md

latency-front: $(STAMP) ## the tables of docs/latency.md on networks of one measured latency; five minutes an arm of the reference on one core, continues
	$(BIN)/python scripts/latency_front.py --only 0.7 --only 0.35 --method "one ratio for all groups" --method "most importance within the latency"
	$(BIN)/python scripts/latency_front.py --only 0.5 --seeds 3 --page docs/latency.md
	$(BIN)/python scripts/latency_front_picture.py docs/latency/front.json docs/latency/front.svg
	$(BIN)/python scripts/latency_front.py --model CIFAR-10 --page docs/latency.md

latency-share: $(STAMP) ## the part of the MACs saved that becomes time, on the CIFAR-10 shape (trained first, half an hour) and the reference; an hour on a quiet machine, continues
	$(BIN)/python scripts/latency_share.py --page docs/latency.md

engine-comparison: $(STAMP) ## the table of docs/export.md: engines of the unpruned and of the slim network, about a minute
	$(BIN)/python scripts/engine_comparison.py --page docs/export.md

bench: $(STAMP) ## measure the demo's models again
	$(BIN)/dpctl bench reference demo/finetuned --out demo/bench-again --force

bench-scoring: $(STAMP) ## scoring against a full pass over the timesteps: time, agreement, memory; about half an hour
	OMP_NUM_THREADS=1 $(BIN)/python scripts/bench_scoring.py

bench-train: $(STAMP) ## a training step against a plain diffusers loop: time and memory; two minutes
	OMP_NUM_THREADS=1 $(BIN)/python scripts/bench_train.py

reference: $(STAMP) ## make the embedded reference again (hours; needs Debian's dataset-fashion-mnist); continues after a stop
	$(BIN)/python -m dpctl.reference.make images
	$(BIN)/python -m dpctl.reference.make features
	$(BIN)/dpctl train --data build/reference/train.npz --steps 4000 --mixed-precision bf16 \
		--out build/reference/model --resume
	$(BIN)/python -m dpctl.reference.make install build/reference/model

clean: ## remove caches and what the demo wrote
	rm -rf demo dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find dpctl export runtime scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove .venv
	rm -rf $(VENV)

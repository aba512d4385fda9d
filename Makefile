# Every target makes .venv when there is none, whatever environment is activated.
#   PYTHON=python3.12 make test       another interpreter
#   PIP_FLAGS='--index-url …' make    options for pip
#   DATA=pairs.jsonl make quickstart  your own pairs
#   JOBS=8 make test                  processes for the tests that need one
PYTHON ?= python3
VENV := .venv
PIP_FLAGS ?=
DATA ?=
JOBS ?= 2
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed
# what an activated environment, a conda or a user site would leak into ours
CLEAN := env -u VIRTUAL_ENV -u PYTHONHOME -u PYTHONPATH PYTHONNOUSERSITE=1 PATH="$(BIN):$$PATH"

.DEFAULT_GOAL := help
.PHONY: help quickstart test check bench

help:
	@echo 'make quickstart   train, evaluate, export and query a small model on real text'
	@echo 'make test         tests that need no GPU, no cluster and no peer library'
	@echo 'make check        format, lint, types, import layers, requirements'
	@echo 'make bench        side-by-side runs against peers'

$(STAMP): setup.py constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo 'cannot make $(VENV): $(PYTHON) needs its venv module (Debian: apt-get install python3-venv)' >&2; exit 1; }
	@$(CLEAN) $(BIN)/python -c 'import sys; sys.exit("megam3 needs Python 3.10 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	@echo 'installing into $(VENV)'
	@# torch first and pinned, so that no other requirement can bring another build of it
	@$(CLEAN) $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch setuptools wheel
	@$(CLEAN) $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev,docs]'
	@touch $@

quickstart: $(STAMP)
	@$(CLEAN) $(BIN)/megam3 quickstart $(if $(DATA),--data $(DATA))

# the quick files first, so that a mistake shows within seconds; what starts several ranks has the machine to itself
PYTEST := OMP_NUM_THREADS=1 $(CLEAN) $(BIN)/python -m pytest -q --durations=20
SEVERAL := -n $(JOBS) --dist loadfile
test: $(STAMP)
	@$(PYTEST) $(SEVERAL) -m 'not peers and not gpu and not ranks and not slow and not slurm'
	@$(PYTEST) $(SEVERAL) -m 'slow and not ranks and not slurm and not peers and not gpu'
	@$(PYTEST) -m '(ranks or slurm) and not peers and not gpu'

check: $(STAMP)
	@$(CLEAN) $(BIN)/ruff format --check --quiet .
	@$(CLEAN) $(BIN)/ruff check --quiet .
	@$(CLEAN) $(BIN)/mypy
	@$(CLEAN) $(BIN)/python -m pytest -q tests/test_layers.py tests/test_requirements.py

bench: $(STAMP)
	@$(CLEAN) $(BIN)/python -m benchmarks

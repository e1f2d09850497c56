# make demo   train, evaluate and export the quick start
# make test   lint, types, tests with coverage
# Each sets up .venv by itself; PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.maskft-setup
PARTS := requirements/demo-parts.txt requirements/data-parts.txt
PINS := requirements/constraints.txt

.PHONY: setup demo test test-slow studies-smoke test-browser lint bench stage1 tables audit docs notebook dist

setup: $(STAMP)

$(STAMP): pyproject.toml $(PARTS) $(PINS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(PINS) torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint $(PINS) --editable '.[demo,dev,quant,distributed,study,serve,docs,notebook]'
	$(BIN)/python -m pip install --quiet --no-deps $(PARTS:%=--requirement %)
	touch $@

demo: setup
	$(BIN)/maskft train recipes/quickstart.yaml --output runs/demo
	$(BIN)/maskft evaluate runs/demo
	test -e runs/demo/merged/config.json || $(BIN)/maskft export runs/demo runs/demo/merged
	@echo "run           runs/demo"
	@echo "adapter       runs/demo/adapter_model.safetensors"
	@echo "merged model  runs/demo/merged"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not browser" -n 2 --dist loadgroup --cov --cov-report=
	$(BIN)/coverage report

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Every study at toy size; part of `make test`.
studies-smoke: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load tests/studies/test_smoke.py

# Needs Chromium from the system's packages: apt-get install chromium
test-browser: setup
	$(BIN)/python -m pip install --quiet --constraint $(PINS) --editable '.[app,browser]'
	$(BIN)/python -m pytest -m browser

bench: setup
	$(BIN)/python benchmarks/bench_step.py --tokens 2048
	$(BIN)/python benchmarks/bench_step.py --tokens 512
	$(BIN)/python benchmarks/bench_step.py --tokens 512 --accumulate 16 --rounds 5 "S-MFT plain" "S-MFT fast" "LoRA r=16"
	$(BIN)/python benchmarks/bench_memory.py
	$(BIN)/python benchmarks/bench_adapter.py
	$(BIN)/python benchmarks/bench_answers.py
	$(BIN)/python benchmarks/tables.py

# Trains the projector that ships with the embedded base and puts it, with the record of its run, where it ships.
stage1: setup
	$(BIN)/maskft train recipes/stage1-projector.yaml --output runs/stage1
	$(BIN)/maskft evaluate runs/stage1 --split validation --show 0
	cd runs/stage1 && cp projector.safetensors recipe.yaml metrics.json log.json environment.json \
		../../src/maskft/vlm/assets/

tables: setup
	$(BIN)/python -m maskft.report.results readme studies README.md

# The pages as a site that any web server can offer; needs no network.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebook: setup
	$(BIN)/python docs/site/notebook.py docs/tutorials/quickstart.ipynb

# Source archive and wheel; tests/release looks into both.
dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# Known flaws of the pinned versions, from the Python Package Index; pip-audit has an environment of its own. A package
# that could not be looked up is an error.
audit:
	test -x .venv/audit/bin/pip-audit || $(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet pip-audit
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement $(PINS)

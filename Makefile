# `make demo` runs the default study, `make test` runs all tests. Both create .venv first.
PYTHON ?= python3
CORES ?= 2
BIN := .venv/bin
READY := .venv/ready
STUDY := results/studies/openclipart
REPORT := $(STUDY)/report.zip

.PHONY: demo test lint docs bench lock

demo: $(READY)
	$(BIN)/snakemake --cores $(CORES)
	@[ -e $(REPORT) ] && [ -z "$$(find $(STUDY) -type f -newer $(REPORT))" ] || $(BIN)/snakemake --report $(REPORT)
	@echo "Heatmap (Figure 1): $(STUDY)/openclipart/small/layerwise/layers.png"
	@echo "Concept pages:      $(STUDY)/pages/index.html"
	@echo "Tables:             $(STUDY)/openclipart/small/*/*.csv"
	@echo "Report:             $(REPORT) (unzip it and open report/report.html)"

test: $(READY)
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/snakefmt --check --compact-diff Snakefile workflow
	$(BIN)/snakemake --lint
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/sphinx-build --fresh-env --fail-on-warning --keep-going --quiet --builder html docs build/docs
	@echo "Documentation:      build/docs/index.html"

bench: $(READY)
	$(BIN)/python -m benchmarks

# All versions come from the lock, so the install does not resolve dependencies.
$(READY): requirements.lock demo/requirements.txt tests/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --no-deps -r demo/requirements.txt -r tests/requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(READY)

# Update the lock from the requirements in pyproject.toml, for all platforms and Python 3.11 and later. Needs uv.
lock:
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--all-extras pyproject.toml --output-file requirements.lock

# `make demo` runs the default study, `make test` runs all tests. Both create .venv first.
PYTHON ?= python3
CORES ?= 2
BIN := .venv/bin
READY := .venv/ready
STUDY := results/studies/openclipart
REPORT := $(STUDY)/report.zip

.PHONY: demo test lint docs bench bench-gpu wheels lock

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

# A machine without .venv and network can run this in its own Python with the packages from `make wheels`.
OFFLINE := $(if $(wildcard $(READY)),,$(wildcard build/wheels))
bench-gpu: $(if $(OFFLINE),build/site,$(READY))
	$(if $(OFFLINE),PYTHONPATH=src:build/site $(PYTHON),$(BIN)/python) -m benchmarks.gpu $(ARGS)

build/site: $(wildcard build/wheels/*.whl)
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target $@ $^
	touch $@

# For machines of this architecture with this version of Python.
WHEELS_PYTHON ?= 3.12
wheels: $(READY)
	rm -rf build/wheels
	mkdir -p build
	sed -n 's/ \\$$//p' requirements.lock | grep == > build/versions.txt
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --python-version $(WHEELS_PYTHON) --implementation cp \
		--platform manylinux_2_28_$$(uname -m) --platform manylinux_2_17_$$(uname -m) --platform manylinux2014_$$(uname -m) \
		--dest build/wheels --constraint build/versions.txt --requirement benchmarks/wheels.txt \
		--requirement tests/requirements.txt
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheels .

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

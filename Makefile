# Every target sets up .venv by itself; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Processes that share the tests; each takes about 2 GB. 0 runs them in one.
TESTERS ?= 2

.PHONY: help setup test peers check fmt demo docs clean
help:
	@echo "make test   run the test suite          make check  format, lint, types, imports, docstrings"
	@echo "make demo   the whole way on made data  make fmt    format the code"
	@echo "make docs   the site, in build/site"

setup: $(READY)

# pip compiles one file after the other; some packages have files that are not meant to be compiled.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile -e ".[dev]"
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $(READY)

test: $(READY)
	$(BIN)/python -m pytest -n $(TESTERS) --dist worksteal

# Detectors beside another implementation of them; not in CI, which needs no such package.
peers: $(READY)
	$(BIN)/pip install --quiet --no-deps libreyolo==1.6.0
	$(BIN)/pip install --quiet opencv-python-headless mss requests pyyaml tqdm
	$(BIN)/python -m pytest tests/peers

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mfdetr_cache pipelines/mfdetr_pipelines cli/mfdetr_cli
	$(BIN)/lint-imports

fmt: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(READY)
	$(BIN)/mfdetr demo

# The site in build/site; a broken link fails. Building it needs no network.
docs: $(READY)
	$(BIN)/pip install --quiet -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

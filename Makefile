# `make demo` and `make test` each work alone on a fresh clone; everything lives in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
ONE    := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test mutants chapters book bench lint clean

demo: $(VENV)/.runtime
	$(BIN)/minipeft demo

test: $(VENV)/.test
	$(ONE) $(BIN)/python -m pytest -n 2 --dist loadfile

mutants: $(VENV)/.test
	$(ONE) $(BIN)/python -m tests.mutants

# Runs every chapter and writes its notebook; `make chapters ONLY="09 10"` builds some.
chapters: $(VENV)/.test
	$(ONE) $(BIN)/python chapters/build.py $(ONLY)

# The chapters as pages to read in a browser, without network: build/book/index.html.
book: $(VENV)/.test
	$(BIN)/python chapters/book.py

bench: $(VENV)/.test
	$(ONE) $(BIN)/minipeft bench

lint: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# A stamp depends on what decides the environment; a changed pin installs again.
$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.test: $(VENV)/.runtime pyproject.toml constraints.txt
	$(PIP) -e '.[test]'
	touch $@

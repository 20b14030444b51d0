# `make demo` and `make test` set up everything they need from Python 3.11+ and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
# the hub is never asked for anything here
export HF_HUB_OFFLINE := 1

.PHONY: demo test faults check format docs clean
.DELETE_ON_ERROR:

# a stamp, so that installation is repeated only when the requirements change
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer expected, got " + sys.version.split()[0] + "; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/new-llm run demo --out $(RUN)

# SLOW=1 adds kills, several processes, compilers, whole trainings
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal $(if $(SLOW),,-m "not slow")

# 30 kills, 200 flipped bytes, 10,000 odd inputs; `make test SLOW=1` has the same in a short form
faults: $(VENV)/.installed
	NEW_LLM_FAULTS=30 NEW_LLM_FUZZ=5 $(BIN)/python -m pytest -n 2 --dist loadgroup \
		tests/test_faults.py tests/test_fuzz.py tests/test_distributed.py tests/test_streaming.py

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# a site of pages that ask no server for anything: open site/index.html, or serve the folder
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

clean:
	rm -rf $(VENV) runs site

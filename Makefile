# Every target sets itself up: .venv gets exactly the versions in constraints.txt.
# Another interpreter: make test PYTHON=/path/to/python

BIN := .venv/bin
READY := .venv/.ready
LEROBOT_PYTHON ?= python3.12
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

.PHONY: demo test test-lerobot check lint types layers tables docs hooks clean

demo: $(READY)
	$(BIN)/halfpi demo

# A process for each core, with one thread: most of the work is interpreted kernels and compilers.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# With the real LeRobot: Python 3.12, and five gigabytes the first time.
test-lerobot: .venv-lerobot/.ready
	cd plugins/lerobot_policy_halfpi && HF_HUB_OFFLINE=1 ../../.venv-lerobot/bin/python -m pytest

check: lint types layers tables

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports --no-logo

tables: $(READY)
	$(BIN)/python -m halfpi.perf.tables --check

docs: $(READY)
	$(BIN)/pdoc --docformat google --output-directory build/docs \
		halfpi src/halfpi/[a-z]*.py $(dir $(wildcard src/halfpi/*/__init__.py))

hooks: $(READY)
	$(BIN)/pre-commit install

clean:
	rm -rf .venv .venv-lerobot build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "halfpi needs Python 3.11 or newer, and none is on the PATH." \
		"Install one, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,sim,report,rerun,serve]"
	@touch $@

.venv-lerobot/.ready: plugins/lerobot_policy_halfpi/pyproject.toml
	$(LEROBOT_PYTHON) -m venv .venv-lerobot
	.venv-lerobot/bin/pip install --quiet "lerobot[pi,async,dataset]==0.6.1" "pytest>=8.4" \
		--editable . --editable plugins/lerobot_policy_halfpi
	@touch $@

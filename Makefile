# Quieten: `make demo` and `make test` need Python 3.11 or later with venv, git and make; nothing else.
#
# PYTHON=python3.12    another interpreter for the environment
# VENV=DIR             another folder for it
# DEMO_FLAGS, PYTEST_FLAGS, BENCH    passed on, e.g. make test PYTEST_FLAGS="-m 'not slow' -n 2", make bench BENCH=loop
# QUICK=1, SLOW=1, RESUME=1    make bench with rough figures, in minutes; with those that take long; on after a stop

PYTHON ?= python3
VENV ?= .venv
BENCH ?=
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
SITE := build/site
PEERS := build/peers

export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env demo test check format wheel bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## create the environment (again only when its definition changes)

# torch comes first and alone: with it in place no other package's wish for torch can pull another build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or later: name one that is, as in make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) cannot create $(VENV): Debian and Ubuntu have venv in the package python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV): a few minutes the first time"
	$(BIN)/python -m pip install -q -r constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,diffusers]"
	@touch $@

demo: $(STAMP) ## train, sample and measure on real digits, in minutes: runs/demo/report.html
	$(BIN)/quieten demo $(DEMO_FLAGS)

test: check wheel ## format, lint, types, wheel, whole test suite
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

check: $(STAMP) ## format, lint and types only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## rewrite the files as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Built without isolation, so that it works offline; imported from elsewhere, so that the checkout cannot stand in
# for a file that the wheel lacks.
wheel: $(STAMP) ## build the wheel, and run what it installs
	@rm -rf dist $(SITE)
	$(BIN)/python -m build --wheel --no-isolation
	$(BIN)/python -m pip install -q --no-deps --target $(SITE) dist/*.whl
	@cd src && git ls-files quieten | while read -r file; do \
		test -f "../$(SITE)/$$file" || { echo "the wheel lacks src/$$file" >&2; exit 1; }; done
	@cd build && PYTHONPATH=site $(BIN)/python -c \
		'import pathlib, quieten; assert pathlib.Path(quieten.__file__).is_relative_to(pathlib.Path("site").resolve())'
	@cd build && PYTHONPATH=site site/bin/quieten --help > /dev/null
	@cd build && PYTHONPATH=site HF_HUB_OFFLINE=1 site/bin/quieten sample zoo:fashion --steps 5 -n 4 --out grid.png > /dev/null
	@echo "the wheel imports, and its command draws what comes along"

bench: $(STAMP) $(PEERS)/.installed ## run the benchmarks, or those named in BENCH: runs/bench/table.md
	$(BIN)/python benchmarks/run.py $(BENCH) --peers $(PEERS) $(if $(QUICK),--quick) $(if $(SLOW),--slow) $(if $(RESUME),--resume)

# Apart from the environment and without what they depend on, so that it stays as it is. Those that cannot be had are left out.
$(PEERS)/.installed: benchmarks/peers.txt | $(STAMP)
	@$(BIN)/python -m pip install -q --no-deps --upgrade --target $(PEERS) -r $< && touch $@ || \
		echo "the benchmarks leave other libraries out: they could not be installed" >&2

clean: ## remove the environment, builds and caches; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

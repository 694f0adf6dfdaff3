# `make run` and `make test` each set everything up first, on a machine that has only Python 3.10+, make and git.
PY    ?= python3
MODEL ?= tiny
VENV  := .venv
BIN   := $(VENV)/bin
RUNS  := runs
export NO_MKDOCS_2_WARNING = 1

.PHONY: run test test-browser prepare docs lab
$(VENV)/.stamp: settings.ini setup.py
	$(PY) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

run: $(VENV)/.stamp            ## the main job: encoder -> position removed -> table, and head, scores, figure, page in runs/
	@$(BIN)/python scripts/run.py $(MODEL) $(RUNS)

# One thread per worker: two workers with two threads each would fight for two cores.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.stamp           ## style, notebooks as tests, module in step with notebooks, notebooks clean, pytest
	$(BIN)/ruff check --quiet rasa_nb nbs
	$(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python scripts/check_sync.py
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests --durations=8

test-browser: export OMP_NUM_THREADS = 1
test-browser: $(VENV)/.stamp   ## what needs a browser, in a headless one; skipped, saying why, where there is none
	-$(BIN)/python -c "import playwright" 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check -e '.[browser]'
	$(BIN)/python -m pytest -q -rs tests/browser

prepare: $(VENV)/.stamp        ## before a commit: export the module, test, clean
	$(BIN)/nbdev_export
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	$(BIN)/nbdev_clean

docs: $(VENV)/.stamp           ## the site in _site/, and README.md
	$(BIN)/python scripts/build_docs.py

lab: $(VENV)/.stamp            ## JupyterLab on the index
	$(BIN)/jupyter lab nbs/index.ipynb

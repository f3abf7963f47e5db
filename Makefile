# make demo   set everything up, then let the portrait speak
# make test   set everything up, then check everything
# make lab    set everything up, then open the notebooks in JupyterLab
# make docs   the documentation site in _docs, and README.md
# make coverage  how much of the package the tests inside the notebooks run
# make clean  remove what was built (make distclean: the environment too)

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Two worker processes with one thread each beat one process with two threads on small networks.
export OMP_NUM_THREADS ?= 1
export PYTHONUTF8 := 1

.PHONY: demo test lab docs coverage clean distclean

demo: $(READY)
	env -u OMP_NUM_THREADS $(BIN)/musetalk demo

test: $(READY)
	$(BIN)/python .ci/check_export.py
	$(BIN)/python .ci/check_notebooks.py
	$(BIN)/ruff check --quiet --no-cache --config .ci/ruff.toml nbs musetalk tests .ci setup.py
	$(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/python .ci/docs.py --check
	$(BIN)/python -m pytest -q -p no:cacheprovider -o faulthandler_timeout=600 -n 2 tests

lab: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lab]'
	$(BIN)/jupyter lab nbs/80_tutorial_dub.ipynb

docs: $(READY)
	$(BIN)/python .ci/docs.py

coverage: $(READY)
	$(BIN)/python .ci/measure_coverage.py

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "musetalk needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf _proc _docs build dist results *.egg-info .ruff_cache .pytest_cache
	find nbs musetalk tests .ci -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

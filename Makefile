# Every target sets up what it needs in .venv. Python 3.11 to 3.13: `make smoke PYTHON=python3.12`.
# An installed GPU build of torch is used by `python run.py` in your own environment; these targets are for any CPU.
PYTHON ?= python3
# The CPU build where plain PyPI has it (macOS, Windows) or a mirror does. On Linux plain PyPI has only the CUDA build:
# make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BIN := .venv/bin
# The tiny models' matrices are too small to share: a second thread only waits for the first.
export OMP_NUM_THREADS ?= 1

.PHONY: setup smoke test lint bench publish

setup: .venv/stamp

.venv/stamp: requirements.txt requirements-nodeps.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-nodeps.txt
	touch $@

smoke: setup
	$(BIN)/python run.py data/runs/smoke.yaml

test: setup
	$(BIN)/python -m pytest --nbmake notebooks/*.ipynb tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb

bench: setup
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

# Once, before the first push: the badges and the set-up cell name the repository's owner.
publish:
	@test -n "$(OWNER)" || { echo "usage: make publish OWNER=name"; exit 1; }
	sed -i.bak 's|<owner>|$(OWNER)|g' notebooks/*.ipynb README*.md
	rm notebooks/*.bak README*.bak

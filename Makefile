# make train   set up, build the demo corpus, train the tiny preset on it; run again: goes on
# make test    set up, run every test that needs no cluster
# make checks  format, lint, types
# make bench   every benchmark; reports in benchmarks/results

PYTHON ?= $(shell command -v python3.11 || command -v python3)
RANKS  ?= 2
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := data/demo

# Open MPI refuses root unless told twice; a container's root is an ordinary user.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

.PHONY: train corpus test checks bench format clean

train: $(DEMO)/manifest.json
	$(BIN)/deepspeed --num_gpus $(RANKS) --master_port $$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') \
	    train.py --preset tiny --corpus $(DEMO) $(ARGS)

corpus: $(DEMO)/manifest.json

$(DEMO)/manifest.json: | $(VENV)/.train
	$(BIN)/mpirun --oversubscribe --bind-to none -n $(RANKS) $(BIN)/pmlm prepare-corpus --source python-docs --output $(DEMO) \
	    --vocabulary-size 8192 --sequence-length 64 --shards 64

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

checks: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

$(VENV)/.train: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

bench: $(VENV)/.dev
	for name in step loader attention; do $(BIN)/python benchmarks/run.py $$name --json benchmarks/results/$$name.json; done

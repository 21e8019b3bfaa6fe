# make train   set up, build the demo corpus, train the tiny preset on it; run again: resumes
# make test-quick   set up, run one case of each property, in minutes: for every commit (docs/testing.md)
# make test    set up, run every test that needs no cluster, except those that inject faults into ranks
# make test-cluster   set up, install SLURM from Debian if need be (as root), run the tests that submit jobs to it
# make test-faults   inject the faults of docs/reliability.md that take seconds; make test-faults-all: all, and write its table
# make test-soak   half an hour of faults of seven kinds, one every 20 to 40 seconds
# make test-null-gpu   the GPU path on a CUDA device that runs nothing: budgets of launches, waits, bytes, memory; topologies
# make test-versions   the quick tests with Python 3.11 to 3.13 and torch 2.11 and 2.13, an hour and 30 GB
# make test-docker    build the image with buildah and train in it (as root on Debian: installs what it needs)
# make checks  format, lint (Python, shell, Dockerfile), types
# make demo-tasks   the job of `make train`, longer; fine-tune its model on two tasks, and the same network untrained; scores
#              beside baselines
# make ablation DATA=FOLDER   train and evaluate every objective at equal text tokens, hours on two cores; resumes; the table is in
#              docs/reports/ablation-cpu/table.md
# make gpu-ablation-pack DATA=FOLDER, make gpu-ablation   the same with 30 M parameters: pack the data, then, on a machine with a GPU
#              and that file, call the second until it says that it is complete; each call takes at most ten minutes
# make gpu-day-pack, make gpu-day   half an hour on one GPU without a network: pack beforehand; there, call the second until it says
#              that it is complete; docs/reports/gpu.md
# make bench   every benchmark; reports in benchmarks/results
# make test-gpu, make bench-gpu   what needs a GPU: its tests, and both training benchmarks at the size of the base model

PYTHON ?= $(shell command -v python3.11 || command -v python3)
RANKS  ?= 2
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := data/demo

# Open MPI does not run as root without both variables; a container's root is an ordinary user.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

.PHONY: train corpus demo-tasks ablation gpu-ablation-pack gpu-ablation test test-quick test-cluster test-faults test-faults-all test-soak test-null-gpu test-versions test-docker checks bench format clean gpu gpu-day gpu-day-pack test-gpu bench-gpu

train: $(DEMO)/manifest.json
	$(call pretrain,$(DEMO)) $(ARGS)

corpus: $(DEMO)/manifest.json

$(DEMO)/manifest.json: | $(VENV)/.train
	$(call prepare,python-docs,$(DEMO))

# $(1) source, $(2) corpus
prepare = $(BIN)/mpirun --oversubscribe --bind-to none -n $(RANKS) $(BIN)/pmlm prepare-corpus --source $(1) --output $(2) \
	    --vocabulary-size 8192 --sequence-length 64 --shards 64

# $(1) corpus
pretrain = $(BIN)/deepspeed --quiet --num_gpus $(RANKS) --master_port $$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') \
	    train.py --preset tiny --corpus $(1)

# The job of `make train` for 24,000 steps in place of 4,000, in a folder of its own and without the texts that the tasks
# hold out: about two hours on two cores.
LONGER := --run-dir runs/demo-tasks --train.steps 24000 --train.validate-every 1000 --train.checkpoint-every 1000
TASKS  := data/demo-tasks

# A complete fine-tuning is not repeated: remove runs/demo-package to repeat it.
demo-tasks: $(DEMO)/manifest.json
	$(BIN)/pmlm demo-tasks data
	$(call prepare,$(DEMO)/python-docs.jsonl --decontaminate $(TASKS)/held-out.jsonl,$(TASKS)/corpus)
	$(call pretrain,$(TASKS)/corpus) $(LONGER)
	$(call finetune,package,classification --preset demo --inputs.max-tokens 64,)
	$(call finetune,package,classification --preset demo --inputs.max-tokens 64,-untrained)
	$(call finetune,summary,seq2seq --preset demo_summary,)
	$(call finetune,summary,seq2seq --preset demo_summary,-untrained)
	$(BIN)/pmlm demo-tasks table

# $(1) data and run, $(2) task, $(3) nothing or -untrained
finetune = test -f runs/demo-$(1)$(3)/scores.json || $(BIN)/torchrun --standalone --nproc_per_node $(RANKS) -m pmlm_dist.cli finetune --task $(2) \
	    --model runs/demo-tasks --data $(TASKS)/$(1) --ds-config ds_configs/tiny.json --batch.micro 16 --report test \
	    --output runs/demo-$(1)$(3) $(if $(3),--untrained)

PACKED := build/ablation-data.tar.xz
ABLATION = $(BIN)/python benchmarks/ablation/ablation.py

ablation: $(VENV)/.dev
	$(ABLATION) --data $(DATA) $(ARGS)

gpu-ablation-pack: $(VENV)/.dev
	$(ABLATION) --scale gpu --data $(DATA) --pack $(PACKED)

gpu-ablation: gpu
	DS_ACCELERATOR=cuda $(ABLATION) --scale gpu --packed $(PACKED) --minutes 9 $(ARGS)

# Processes that run tests side by side; each has a fork server of 0.6 GB.
WORKERS ?= 2

# $(1) marks. Tests that share the machine run first, those that need it alone afterwards; a half that selects nothing
# ends with code 5, which counts only if both do.
define run_tests
	first=0; second=0; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --ignore tests/faults --ignore tests/null_gpu -m "$(1) and not serial" $(ARGS) || first=$$?; \
	[ $$first != 2 ] || exit 2; \
	$(BIN)/python -m pytest --ignore tests/faults --ignore tests/null_gpu -m "$(1) and serial" $(ARGS) || second=$$?; \
	[ $$first != 5 ] || first=$$second; \
	[ $$second != 5 ] || second=$$first; \
	exit $$(( first ? first : second ))
endef

test: $(VENV)/.dev
	$(call run_tests,not cluster and not nightly)

test-quick: export HYPOTHESIS_PROFILE := quick
test-quick: $(VENV)/.dev
	$(call run_tests,not cluster and not nightly and not full)

test-cluster: $(VENV)/.dev
	tests/cluster/install.sh
	$(BIN)/python -m pytest -m "cluster and not nightly" tests/cluster $(ARGS)

test-faults: $(VENV)/.dev
	$(BIN)/python -m pytest -m "fault and not nightly and not cluster" $(ARGS)

FAULTS := build/faults.json
RECORD := PYTHONPATH=tests $(BIN)/python -m pytest -p support.fault_record --record-faults $(FAULTS)

test-faults-all: $(VENV)/.dev
	tests/cluster/install.sh
	rm -f $(FAULTS)
	failed=0; \
	$(RECORD) -m "fault and not cluster" || failed=1; \
	$(RECORD) -m "fault and cluster" tests/cluster || failed=1; \
	PYTHONPATH=tests $(BIN)/python -m support.fault_record $(FAULTS); \
	exit $$failed

test-soak: $(VENV)/.dev
	SOAK_MINUTES=30 $(BIN)/python -m pytest -m nightly tests/faults/test_soak.py $(ARGS)

# An environment of its own, with the CUDA build of torch.
NULL_GPU := build/null-gpu

test-null-gpu: $(VENV)/.dev
	PYTHON=$(PYTHON) tests/null_gpu/install.sh $(NULL_GPU)
	NULL_GPU_PYTHON=$(CURDIR)/$(NULL_GPU)/bin/python $(BIN)/python -m pytest -n $(WORKERS) -m null_gpu tests/null_gpu $(ARGS)

VERSIONS ?= 3.11:2.11.0 3.11:2.13.0 3.12:2.11.0 3.12:2.13.0 3.13:2.11.0 3.13:2.13.0

test-versions:
	WORKERS=$(WORKERS) tests/versions/run.sh build/versions $(VERSIONS) -- $(ARGS)

test-docker:
	docker/test.sh

gpu: $(VENV)/.dev
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no CUDA device here: nothing was run")'

test-gpu: gpu
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest -m gpu $(ARGS)

# On the machine with the GPU: GPU_PYTHON has torch with CUDA; the rest comes from the packed wheels.
GPU_PYTHON ?= python3

gpu-day-pack: $(VENV)/.dev
	benchmarks/gpu_day/pack.sh 3.12

gpu-day:
	test -e build/gpu-day/venv || $(GPU_PYTHON) -m venv --system-site-packages build/gpu-day/venv
	build/gpu-day/venv/bin/pip install --quiet --no-index --no-deps --find-links build/gpu-day/wheels build/gpu-day/wheels/*.whl
	build/gpu-day/venv/bin/python benchmarks/gpu_day/gpu_day.py $(ARGS)

checks: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	.ci/check_words
	$(BIN)/shellcheck -x .ci/run slurm/*.sh tests/cluster/install.sh tests/null_gpu/*.sh tests/versions/run.sh docker/test.sh
	$(BIN)/hadolint docker/Dockerfile

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

bench: $(VENV)/.dev $(DEMO)/manifest.json
	for name in step update loader attention checkpoint generate plan prepare scale scaling zero; do $(BIN)/python benchmarks/run.py $$name --json benchmarks/results/$$name.json; done

bench-gpu: export DS_ACCELERATOR := cuda
bench-gpu: gpu
	$(BIN)/python benchmarks/run.py step --preset base --dtype bf16 --batch 32 --json benchmarks/results/step-gpu.json
	$(BIN)/python benchmarks/run.py attention --dtype bf16 --num-heads 12 --slots 16384 --json benchmarks/results/attention-gpu.json

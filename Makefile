# Every target sets the machine up first (scripts/setup.sh), in seconds when nothing is missing.
VENV ?= .venv
PY := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo pretrained warmup study test test-long lint format doctor docs extras lock clean
help:
	@echo "make demo       trains PPO for a few iterations and says where curve and video are"
	@echo "make test       ruff and the tests (arguments for pytest: PYTEST_ARGS='-k gae')"
	@echo "make test-long  the same with the tests that take minutes each"
	@echo "make doctor     says what this machine can do, with a fix for what is missing"
	@echo "make docs       builds the site into site/ and fails at a dead link"
	@echo "make warmup     makes checkpoints/tiny-warmup again, in about 3 minutes"
	@echo "make study      the runs of docs/study.md, days on two cores"
	@echo "make pretrained makes checkpoints/tiny-pretrained again, in about three hours"
	@echo "make setup | lint | format | lock | clean"

setup:
	@VENV=$(VENV) bash scripts/setup.sh

DEMO_ARGS ?= --num-envs 64 --num-iterations 4 --value-warmup-iterations 1
demo: setup
	$(PY) ppo_vla.py $(DEMO_ARGS)

# publishes a trained model in bfloat16, as OpenVLA is: half the size
SHIP = $(PY) -c "import sys; from common.model.checkpoints import load_vla, save_vla; \
	save_vla(load_vla(sys.argv[1], dtype='bfloat16', trainable=False), sys.argv[2])"

# The same command goes on after an interruption: a scene file or 500 updates are the most that is
# lost. On two cores of an AMD EPYC 50 minutes for the scenes, 45 for the eyes, 85 for pointing
pretrained: runs/tiny-pretrained/config.json
	$(SHIP) runs/tiny-pretrained checkpoints/tiny-pretrained

runs/tiny-pretrained/config.json: | setup
	$(PY) -m tiny.pointing --output demos/pointing
	$(PY) -m tiny.pretrain --output runs/tiny-pretrained

# Clones checkpoints/tiny-pretrained and replaces checkpoints/tiny-warmup, in three minutes; a
# second time needs runs/tiny-warmup removed
warmup: setup
	$(PY) -m demonstrations.record --task main_carrot --num-demos 140 --output demos/warmup
	$(PY) sft_vla.py --demos demos/warmup --val-demos 10 --name tiny-warmup --num-iterations 6 \
		--freeze-vision --eval-every 0
	$(SHIP) runs/tiny-warmup/checkpoint-000006 checkpoints/tiny-warmup
	cp runs/tiny-warmup/args.json checkpoints/tiny-warmup/

# The runs of docs/study.md: days on two cores; STUDY_ARGS=--quick has all steps in minutes
study: setup
	$(PY) benchmarks/study.py $(STUDY_ARGS)

# whole files in parallel: most of a test is one process that waits for another
PYTEST = $(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
test: lint
	$(PYTEST) -m "not long" $(PYTEST_ARGS)

# what the tests of optional parts need; with bitsandbytes every run prints a line about it
extras: setup
	$(PY) -m pip install --quiet --constraint scripts/constraints.txt --editable '.[docs,quantize]'

test-long: lint extras
	$(PYTEST) -m "long or not long" $(PYTEST_ARGS)

lint: setup
	$(PY) -m ruff check .

format: setup
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

doctor: setup
	$(PY) scripts/doctor.py

# to look at it: $(VENV)/bin/python -m mkdocs serve
docs: setup
	$(PY) -m pip install --quiet --constraint scripts/constraints.txt --editable '.[docs]'
	$(PY) -m mkdocs build --strict

# exact versions of what is installed now; without a GPU, so that no CUDA package is listed
lock: extras
	$(PY) -m pip freeze --exclude-editable | sed 's/+cpu$$//' > scripts/constraints.txt

# the environment and caches; never runs/ or checkpoints/
clean:
	rm -rf $(VENV) build site ./*.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Every target sets the machine up first (scripts/setup.sh), in seconds when nothing is missing.
VENV ?= .venv
PY := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo pretrained warmup test lint format doctor lock clean
help:
	@echo "make demo    train PPO for a few iterations in the real simulator; prints where the curve and the video are"
	@echo "make test    ruff and the whole test suite (arguments for pytest: PYTEST_ARGS='-k gae')"
	@echo "make doctor  what this machine can do, with a fix for what is missing"
	@echo "make warmup, make pretrained: the shipped weights again, 7 and 40 minutes"
	@echo "make setup | lint | format | lock | clean"

setup:
	@VENV=$(VENV) bash scripts/setup.sh

DEMO_ARGS ?= --num-envs 64 --num-iterations 4 --value-warmup-iterations 1 --no-anneal-lr
demo: setup
	$(PY) ppo_vla.py $(DEMO_ARGS)

# makes checkpoints/tiny-pretrained again, 40 minutes on two cores; see docs/demos.md
pretrained: setup
	$(PY) -m common.tiny.pointing --num-scenes 8000 --output demos/pointing
	$(PY) -m common.tiny.pointing --num-scenes 6000 --task multi_carrot --seed 1 --output demos/pointing-two
	$(VENV)/bin/torchrun --nproc-per-node 2 -m common.tiny.pretrain --output runs/tiny-pretrained
	mkdir -p checkpoints/tiny-pretrained && cp runs/tiny-pretrained/* checkpoints/tiny-pretrained/

# makes checkpoints/tiny-warmup again from checkpoints/tiny-pretrained, 7 minutes on two cores; see results/warmup
warmup: setup
	$(PY) -m common.demos --num-demos 1000 --num-envs 32 --max-episode-steps 60 --action-noise 0.015 \
		--blunder-probability 0.04 --output demos/warmup
	$(VENV)/bin/torchrun --nproc-per-node 2 sft_vla.py --demos demos/warmup --name tiny-warmup \
		--dtype bfloat16 --num-envs 64 --num-iterations 4 --eval-every 4 --eval-episodes 192
	mkdir -p checkpoints/tiny-warmup && cp runs/tiny-warmup/args.json runs/tiny-warmup/checkpoint-000004/*.json \
		runs/tiny-warmup/checkpoint-000004/model.safetensors checkpoints/tiny-warmup/

test: lint
	$(PY) -m pytest $(PYTEST_ARGS)

lint: setup
	$(PY) -m ruff check .

format: setup
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

doctor: setup
	$(PY) -m common.doctor

# exact versions of what is installed now; on a machine without a GPU, so that no CUDA package is listed
lock: setup
	$(PY) -m pip freeze --exclude-editable | sed 's/+cpu$$//' > scripts/constraints.txt

# the environment and caches; never runs/ or checkpoints/
clean:
	rm -rf $(VENV) build ./*.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

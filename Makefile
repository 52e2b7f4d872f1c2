PYTHON ?= python3
ORT    ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
OTHER  := $(if $(filter gpu,$(ORT)),onnxruntime,onnxruntime-gpu)
RUN    := .venv/bin/python
PIP    := $(RUN) -m pip --disable-pip-version-check

.PHONY: help setup sample train row tiny vbench test test-slow lint clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 picks the interpreter. ORT=gpu or ORT=cpu picks the onnxruntime (default: gpu where nvidia-smi is)."

setup: .venv/ready-$(ORT) ## make .venv with everything that the commands and tests need

# onnxruntime and onnxruntime-gpu overwrite each other's files, so one is removed before the other is installed.
# insightface requires onnxruntime and an OpenCV with display libraries, so pip installs it without its requirements.
.venv/ready-$(ORT): pyproject.toml requirements/pins.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.10: run make PYTHON=python3.12, or another that you have"; exit 2; }
	$(PYTHON) -m venv .venv
	rm -f .venv/ready-*
	$(PIP) uninstall --quiet --yes $(OTHER) 2>/dev/null
	$(PIP) install --quiet --constraint requirements/pins.txt --editable ".[$(ORT),dev,demo]"
	$(PIP) install --quiet --constraint requirements/pins.txt --no-deps insightface
	touch $@

sample: setup ## make a video with the embedded model: out/sample.mp4
	$(RUN) sample.py --ref assets/face.png --prompt "A person walks by to the left in front of a teal wall." --out out/sample.mp4

train: setup ## begin to train the tiny model on a few drawn clips: runs/try
	$(RUN) -m toy.cache --count 200 --out cache/try
	$(RUN) train.py --set run.out=runs/try --set data.cache=cache/try --set optim.steps=20 --set log.every=10 --set log.sample_every=20

row: setup ## measure the tiny model, the last row of docs/table1.md: out/toy
	rm -rf out/toy
	$(RUN) -m toy.judge --write out/toy
	$(RUN) sample.py --batch out/toy/cases.jsonl --out out/toy/videos
	$(RUN) eval.py --videos out/toy/videos --cases out/toy/cases.jsonl --faces assets/faces --det-size 128 --clip none \
	    --out out/toy/scores --name "ours (tiny world)"

tiny: setup ## train all models in assets/ anew; hours on a CPU
	$(RUN) -m toy.make --publish

vbench: .venv-vbench/ready ## make .venv-vbench for eval.py --vbench (PYTHON=python3.11 or older)

# VBench needs its own environment: it pins numpy below 2 and a transformers of 2023.
.venv-vbench/ready: requirements/vbench.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 11))' || \
	  { echo "error: VBench needs Python 3.9 to 3.11: run make vbench PYTHON=python3.11, or another that you have"; exit 2; }
	$(PYTHON) -m venv .venv-vbench
	.venv-vbench/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/vbench.txt
	touch $@

test: setup ## run the tests, less the slow ones: some minutes
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadscope -m "not slow" --durations=10

test-slow: setup ## run the slow tests: kills, several processes, whole trainings
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadscope -m slow --durations=10

lint: setup ## check style and form
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean: ## remove .venv, .venv-vbench and caches; videos, runs and caches of clips stay
	rm -rf .venv .venv-vbench .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

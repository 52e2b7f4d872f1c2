# make sample   set up .venv and make a video with the embedded model
# make train    set up and begin to train the tiny model, on a few drawn clips
# make row      set up and measure the tiny model for the last row of docs/table1.md
# make tiny     set up and make all models in assets/ anew; hours on a CPU
# make vbench   set up .venv-vbench for eval.py --vbench (PYTHON=python3.11 or older)
# make test     set up and run the tests
# make setup    only set up; PYTHON=python3.12 picks the interpreter, ORT=gpu|cpu the onnxruntime (found by nvidia-smi)

PYTHON ?= python3
ORT    ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
OTHER  := $(if $(filter gpu,$(ORT)),onnxruntime,onnxruntime-gpu)
RUN    := .venv/bin/python
PIP    := $(RUN) -m pip --disable-pip-version-check

.PHONY: setup sample train row tiny vbench test lint clean

setup: .venv/ready-$(ORT)

# onnxruntime and onnxruntime-gpu overwrite each other's files, so the other one goes before this one comes.
.venv/ready-$(ORT): $(filter-out %/vbench.txt,$(wildcard requirements/*.txt))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.10: run make PYTHON=python3.12, or another that you have"; exit 2; }
	$(PYTHON) -m venv .venv
	rm -f .venv/ready-*
	$(PIP) uninstall --quiet --yes $(OTHER) 2>/dev/null
	$(PIP) install --quiet -r requirements/base.txt -r requirements/$(ORT).txt -r requirements/dev.txt
	$(PIP) install --quiet --no-deps -r requirements/nodeps.txt
	touch $@

sample: setup
	$(RUN) sample.py --ref assets/face.png --prompt "A person walks by to the left in front of a teal wall." --out out/sample.mp4

train: setup
	$(RUN) train.py --set run.out=runs/try --set data.cache=cache/try --set data.toy=200 --set optim.steps=60 --set log.every=10 --set log.sample_every=60

row: setup
	rm -rf out/toy
	$(RUN) -m toy.judge --write out/toy
	$(RUN) sample.py --batch out/toy/cases.jsonl --out out/toy/videos
	$(RUN) eval.py --videos out/toy/videos --cases out/toy/cases.jsonl --faces assets/faces --det-size 128 --clip none \
	    --out out/toy/scores --name "ours (tiny world)"

tiny: setup
	$(RUN) -m toy.make --publish

# Not the environment of everything else: VBench pins numpy below 2 and a transformers of 2023.
vbench: .venv-vbench/ready

.venv-vbench/ready: requirements/vbench.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 11))' || \
	  { echo "error: VBench needs Python 3.9 to 3.11: run make vbench PYTHON=python3.11, or another that you have"; exit 2; }
	$(PYTHON) -m venv .venv-vbench
	.venv-vbench/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/vbench.txt
	touch $@

test: setup
	$(RUN) -m pytest --durations=10

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf .venv .venv-vbench out cache/try cache/clips runs/try runs/clips

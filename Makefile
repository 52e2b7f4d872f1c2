# make sample   set up .venv and make a video with the embedded model
# make train    set up and train the tiny model on the clips in assets/
# make test     set up and run the tests
# make setup    only set up; PYTHON=python3.12 picks the interpreter, ORT=gpu|cpu the onnxruntime (found by nvidia-smi)

PYTHON ?= python3
ORT    ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
OTHER  := $(if $(filter gpu,$(ORT)),onnxruntime,onnxruntime-gpu)
RUN    := .venv/bin/python
PIP    := $(RUN) -m pip --disable-pip-version-check

.PHONY: setup sample train test lint clean

setup: .venv/ready-$(ORT)

# onnxruntime and onnxruntime-gpu overwrite each other's files, so the other one goes before this one comes.
.venv/ready-$(ORT): $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.10: run make PYTHON=python3.12, or another that you have"; exit 2; }
	$(PYTHON) -m venv .venv
	rm -f .venv/ready-*
	$(PIP) uninstall --quiet --yes $(OTHER) 2>/dev/null
	$(PIP) install --quiet -r requirements/base.txt -r requirements/$(ORT).txt -r requirements/dev.txt
	$(PIP) install --quiet --no-deps -r requirements/nodeps.txt
	touch $@

sample: setup
	$(RUN) sample.py --ref assets/face.png --prompt "A woman with brown hair turns her head and smiles." --out out/sample.mp4

train: setup
	$(RUN) data.py prepare --manifest assets/clips/manifest.csv --out cache/tiny
	$(RUN) train.py

test: setup
	$(RUN) -m pytest --durations=10

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf .venv out cache/tiny runs/tiny

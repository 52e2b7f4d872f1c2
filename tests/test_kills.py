"""SIGKILL at random moments, a hundred in all: the same command again ends with the files of an undisturbed run, byte
for byte, with nothing left over, and its inputs are as they were."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, shallow_checkpoint
from safetensors.torch import save_file

from checkpoint import Checkpoint

ASSETS = ROOT / "assets"
FACES = ASSETS / "faces"
TIMES = ("seconds", "tokens_per_s", "tflops", "memory_gib")  # of log.jsonl
# A life is a forked process that runs the command. `life` ends it after a time, drawn up to what a whole run takes.
KILLER = """
import importlib, json, os, random, signal, sys, time
module, words, kills, folder = json.loads(sys.argv[1])
import insightface.app, transformers  # once, not in each life
from common.errors import one_line_errors
command, dice = importlib.import_module(module), random.Random(module)

def life(out, seconds):
    if module == "engine.lora":  # which makes no folder
        os.makedirs(out, exist_ok=True)
    if (pid := os.fork()) == 0:
        os.setsid()
        sys.argv = [module, *(word.replace("OUT", out) for word in words)]
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            with one_line_errors():
                command.main()
        except SystemExit as end:
            os._exit(end.code)
        os._exit(0)
    end = time.monotonic() + seconds
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            try:
                os.killpg(pid, signal.SIGKILL)
                end += 60
            except ProcessLookupError:  # before its setsid
                pass
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(ended[1])

begun = time.monotonic()
assert life(os.path.join(folder, "whole"), 3600) == 0
whole, run = time.monotonic() - begun, 0
while kills > 0:
    out = os.path.join(folder, f"killed-{run}")
    while (code := life(out, dice.uniform(0, 1.1 * whole))) == -9:
        kills -= 1
        print(*(os.path.getsize(os.path.join(at, f)) for at, _, files in os.walk(out) for f in files), flush=True)
    assert code == 0, code
    run += 1
"""


def contents(*paths: Path) -> dict[str, str | list]:
    """Name -> hash of each file; of log.jsonl, the figures that are no times."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    found: dict[str, str | list] = {}
    for file in files:
        name = str(file.relative_to(next(path for path in paths if file.is_relative_to(path)))) + file.name
        data = file.read_bytes()
        if file.name.startswith("shard-") and file.parent.name.startswith("step-"):  # a library shuffles its metadata
            length = 8 + int.from_bytes(data[:8], "little")
            data = json.dumps(json.loads(data[8:length]), sort_keys=True).encode() + data[length:]
        found[name] = hashlib.sha256(data).hexdigest()
        if file.name == "log.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        if file.name == "config.json":  # it names its own folder
            found[name] = [{k: v for k, v in json.loads(file.read_text()).items() if k != "run"}]
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A cache, a run of two steps on it, and a LoRA."""
    folder = tmp_path_factory.mktemp("sources")
    for words in (prepare_words(folder / "cache"), train_words(folder / "cache", folder / "run")):
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, env=environment())
    tensors = Checkpoint(shallow_checkpoint()).tensors
    width = tensors["model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"]["shape"][0]
    pair = {"lora_A.weight": torch.ones(2, width), "lora_B.weight": torch.full((width, 2), 1e-3)}
    save_file({f"transformer_blocks.0.attn1.to_q.{k}": t for k, t in pair.items()}, folder / "lora.safetensors")
    return folder


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def prepare_words(out: Path | str) -> list[str]:
    return [
        "prepare.py",
        "--manifest",
        str(ASSETS / "clips" / "manifest.csv"),
        "--shard-gb",
        "0.0003",
        "--out",
        str(out),
    ]


def train_words(cache: Path, out: Path | str, steps: int = 2) -> list[str]:
    changes = {"data.cache": cache, "run.out": out, "optim.steps": steps, "optim.batch": 2, "model.scratch": "false"}
    changes |= {"model.ckpt": shallow_checkpoint()}
    changes |= {"log.save_every": 1, "log.every": 1, "log.sample_every": 0, "log.tensorboard": "false"}
    changes |= {"data.workers": 0, "faces.pack": '""', "optim.ema": 0}
    return ["train.py", *(word for key, value in changes.items() for word in ("--set", f"{key}={value}"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "kills"), [("export", 20), ("merge", 20), ("batch", 16), ("eval", 16), ("prepare", 14), ("train", 14)]
)
def test_killed_at_random_moments(command, kills, sources, tmp_path):
    cases = str(ASSETS / "clips" / "cases.jsonl")
    faces = ["--faces", str(FACES), "--det-size", "128", "--clip", "none"]
    sample = ["sample.py", "--ckpt", str(shallow_checkpoint()), "--gemma", str(ASSETS / "gemma")]
    words = {
        "export": [*train_words(sources / "cache", sources / "run"), "--export", "OUT/x.safetensors"],
        "merge": [
            "engine.lora",
            "--ckpt",
            str(shallow_checkpoint()),
            "--lora",
            str(sources / "lora.safetensors"),
            "--out",
            "OUT/x.safetensors",
        ],
        "batch": [*sample, "--batch", cases, "--steps", "1", "--out", "OUT"],
        "eval": ["eval.py", "--videos", str(ASSETS / "clips"), "--cases", cases, *faces, "--out", "OUT"],
        "prepare": prepare_words("OUT"),
        "train": train_words(sources / "cache", "OUT", 4),
    }[command]
    inputs = sources, ASSETS, shallow_checkpoint()
    before = contents(*inputs)
    module, *options = words
    order = json.dumps([module.removesuffix(".py"), options, kills, str(tmp_path)])
    script = [sys.executable, "-c", KILLER, order]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) >= kills and len(set(lines)) > 1  # at different points of the work
    whole = contents(tmp_path / "whole")
    runs = [folder for folder in tmp_path.glob("killed-*") if any(folder.iterdir())]
    assert whole and runs and all(contents(folder) == whole for folder in runs)
    assert contents(*inputs) == before

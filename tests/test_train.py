"""train.py on the clips in assets/: many processes and one, stops and continuations, the export, errors."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from torch.distributed.checkpoint import HuggingFaceStorageReader

import sample
import train
from checkpoint import OUR_METADATA, Checkpoint
from common.errors import UserError, one_line_errors
from config import read_config
from data import CachedClips, draw_sample, epoch_order
from engine.lora import find_targets
from engine.lora_files import LoRA
from engine.parallel import first_weight, join_processes
from model import LTXVideo
from toy import world as toy
from toy.cache import prepare_toy
from toy.world import toy_clip

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "assets"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
QUICK = {  # the clips in assets/ instead of drawn ones, the weights in assets/, and the identity losses
    "model.scratch": "false",
    "faces.pack": "assets/faces",
    "optim.ema": 0,
    "optim.decay": "constant",
    "optim.betas": [0.9, 0.999],
    "guidance.s_text": 5.0,
    "guidance.s_ref": 7.5,
    "log.keep": 3,
    "optim.batch": 4,
    "optim.warmup": 2,
    "optim.lr": 1e-4,
    "parallel.micro_batch": 2,
    "log.every": 1,
    "log.save_every": 100,
    "log.sample_every": 0,
    "log.tensorboard": "false",
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """The cache of the four clips in assets/, made by the command."""
    folder = tmp_path_factory.mktemp("clips") / "cache"
    options = ["--manifest", ASSETS / "clips" / "manifest.csv", "--ckpt", ASSETS / "tiny.safetensors", "--out", folder]
    options += ["--gemma", ASSETS / "gemma", "--faces", ASSETS / "faces"]
    subprocess.run([sys.executable, ROOT / "prepare.py", *options], check=True, capture_output=True)
    return folder


def command(clips: Path, run: Path, **options) -> list[str]:
    changes = QUICK | {"data.cache": clips, "run.out": run} | {k.replace("__", "."): v for k, v in options.items()}
    words = [str(ROOT / "configs" / "tiny.toml")]
    for key, value in changes.items():
        words += ["--set", f"{key}={json.dumps(value) if isinstance(value, list) else value}"]
    return [str(ROOT / "train.py"), *words]


def torchrun(ranks: int, words: list[str]) -> subprocess.CompletedProcess:
    if 0 < torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, or none")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_here(words: list[str], monkeypatch) -> int:
    """train.main in this process; returns the exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(sys, "argv", words)
    try:
        with one_line_errors():
            train.main()
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, put together from its shards."""
    reader = HuggingFaceStorageReader(str(run / f"step-{step:06d}"))
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "assuming the intent is to load in a single process": it is
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.fixture(scope="module")
def one_process(clips, tmp_path_factory) -> Path:
    """Three undisturbed steps in one process, everything on: reference, augmentation, identity losses, dropout."""
    run = tmp_path_factory.mktemp("one") / "run"
    torchrun(1, command(clips, run, optim__steps=3, log__save_every=1))
    return run


LIGHT = {"optim__steps": 3, "log__save_every": 1, "log__keep": 2, "optim__batch": 1, "faces__pack": ""}


@pytest.fixture(scope="module")
def light_run(clips, tmp_path_factory) -> Path:
    """Three steps of one sample without identity losses."""
    run = tmp_path_factory.mktemp("light") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(command(clips, run, **LIGHT), patch) == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"parallel__mode": "ddp"},
        # Sampling between the steps, whose forward passes without backward must not leave anything behind.
        {"parallel__mode": "fsdp", "log__sample_every": 1, "guidance__steps": 2, "log__save_every": 1},
        {"parallel__mode": "fsdp", "parallel__replicas": 2},
        {"parallel__mode": "fsdp", "parallel__recompute": "products"},
    ],
    ids=["ddp", "fsdp-samples", "hsdp", "fsdp-recompute"],
)
def test_two_processes_are_one(options, clips, one_process, tmp_path):
    """The same global batch gives the same losses and weights, whoever computes which part of it."""
    torchrun(2, command(clips, tmp_path / "run", optim__steps=3, **options))
    assert losses(tmp_path / "run") == pytest.approx(losses(one_process), abs=1e-5)
    ours, theirs = weights(tmp_path / "run", 3), weights(one_process, 3)
    assert ours.keys() == theirs.keys()
    start = load_file(ASSETS / "tiny.safetensors")
    moved = 0.0
    for name, tensor in ours.items():
        if name.startswith("model."):
            torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=0)
            first = start["model.diffusion_model." + name.removeprefix("model.")].float()
            moved = max(moved, (tensor - first).abs().max().item())
    assert moved > 1e-4  # and they did learn


@pytest.fixture(scope="module")
def from_nothing(tmp_path_factory) -> tuple[Path, dict]:
    """Four steps on drawn clips from drawn weights, with their average."""
    folder = tmp_path_factory.mktemp("toy")
    prepare_toy(folder / "cache", 6, ASSETS / "tiny.safetensors", ASSETS / "gemma", ASSETS / "faces")
    options = {"model__scratch": "true", "optim__ema": 0.5, "optim__decay": "linear"}
    options |= {"optim__steps": 4, "faces__pack": "", "log__save_every": 1, "log__keep": 9}
    torchrun(1, command(folder / "cache", folder / "run", **options))
    return folder, options


@pytest.mark.slow
def test_from_nothing_on_drawn_clips(from_nothing):
    """The first loss is that of v = 0 on the drawn clips' latents, and the clips are those of toy.py."""
    folder, _ = from_nothing
    cached = CachedClips(folder / "cache")
    assert {clip["caption"] for clip in cached} <= {toy_clip(0, k, 17, 64, 12.0)["caption"] for k in range(6)}
    assert len(cached) >= 5  # the detector may miss a face
    order = np.concatenate([epoch_order(len(cached), 0, epoch) for epoch in range(2)])
    expected = []
    for count in range(4):
        latents = cached[int(order[count])]["latents"].float()  # (C, T, h, w)
        z = latents.flatten(1).T.numpy()
        eps = draw_sample(0, count, tuple(latents.shape[1:]), len(latents), 0.05, 0.2, 2).eps.numpy()
        expected.append(np.square(eps - z).mean())
    assert losses(folder / "run")[0] == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.slow
def test_clips_of_another_world_are_not_trained_on(from_nothing, monkeypatch):
    """Drawn before toy.py changed, here how far a head is turned at rest."""
    monkeypatch.setitem(toy.POSE, "yaw", (0, 9, -36, 36))
    with pytest.raises(UserError, match="was begun with world"):
        prepare_toy(from_nothing[0] / "cache", 6, ASSETS / "tiny.safetensors", ASSETS / "gemma", ASSETS / "faces")


@pytest.mark.slow
def test_average_is_saved_continued_and_exported(from_nothing, tmp_path, monkeypatch):
    """After each step the saved average is the recursion over the saved weights; also in shards, also continued."""
    folder, options = from_nothing
    run = folder / "run"
    first = {n: first_weight(n, t.shape, 0) for n, t in load_file_of_dit().items()}
    mean = {name: tensor.double() for name, tensor in first.items()}
    for step in range(4):
        saved, d = weights(run, step + 1), min(0.5, (1 + step) / (10 + step))
        for name in mean:
            mean[name] = d * mean[name] + (1 - d) * saved[f"model.{name}"].double()
            torch.testing.assert_close(saved[f"ema.{name}"].double(), mean[name], atol=1e-6, rtol=0)

    other = tmp_path / "run"
    shutil.copytree(run, other)
    for step in (3, 4):
        shutil.rmtree(other / f"step-{step:06d}")
    torchrun(2, command(folder / "cache", other, **options, parallel__mode="fsdp"))
    ours, theirs = weights(other, 4), weights(run, 4)
    assert ours.keys() == theirs.keys()
    for name in mean:
        torch.testing.assert_close(ours[f"ema.{name}"], theirs[f"ema.{name}"], atol=1e-5, rtol=0)

    out = tmp_path / "toy.safetensors"
    assert run_here([*command(folder / "cache", run, **options), "--export", str(out)], monkeypatch) == 0
    exported = Checkpoint(out)
    name = "transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(exported.read("model.diffusion_model." + name), theirs["ema." + name].bfloat16())
    assert not torch.equal(exported.read("model.diffusion_model." + name), theirs["model." + name].bfloat16())


def load_file_of_dit() -> dict[str, torch.Tensor]:
    return LTXVideo.from_checkpoint(ASSETS / "tiny.safetensors").state_dict()


@pytest.mark.parametrize("decay, last", [("constant", 1.0), ("linear", 0.1)])
def test_learning_rate(decay, last):
    """A rise over 5 steps; then it stays, or falls to zero just after the last of 15."""
    config = read_config(None, ["optim.lr=2.0", "optim.warmup=5", "optim.steps=15", f"optim.decay={decay}"])
    rates = [train.learning_rate(config, step) / 2 for step in range(15)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[-1] == pytest.approx(last)
    assert np.diff(rates[5:]) == pytest.approx(np.full(9, (last - 1) / 9))


@pytest.mark.slow
def test_killed_and_continued(clips, one_process, tmp_path):
    """SIGKILL at a random moment: the next run goes on as if nothing had happened, no half checkpoint is left."""
    run = tmp_path / "run"
    words = [sys.executable, *command(clips, run, optim__steps=3, log__save_every=1)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as all other runs here: sums are in the same order
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    saved, delay = random.choice([1, 2]), random.uniform(0, 0.4)
    print(f"killed {delay:.3f} s after checkpoint {saved}")  # shown if the test fails
    for line in process.stdout:
        saved -= line.startswith("saved")
        if not saved:
            break
    time.sleep(delay)
    process.kill()
    process.wait()
    process.stdout.close()
    torchrun(1, command(clips, run, optim__steps=3, log__save_every=1))
    fixed = not torch.cuda.is_available()  # a GPU adds up in no fixed order
    assert losses(run) == pytest.approx(losses(one_process), abs=1e-6 if fixed else 1e-5)
    ours, theirs = weights(run, 3), weights(one_process, 3)
    for name, tensor in ours.items():
        off = (tensor - theirs[name]).abs()
        assert off.max() <= (1e-6 if fixed else QUICK["optim.lr"]) and (off > 1e-5).float().mean() < 0.01, name
    assert not list(run.glob(".*")), "a temporary folder was left"


@pytest.mark.slow
def test_two_ranks_checkpoint_continues_on_one(clips, one_process, tmp_path, monkeypatch, capsys):
    """Shards of two ranks become the whole model of one, optimizer included."""
    run = tmp_path / "run"
    torchrun(2, command(clips, run, optim__steps=2, parallel__mode="fsdp"))
    assert run_here(command(clips, run, optim__steps=3), monkeypatch) == 0
    assert "after step 2" in capsys.readouterr().out
    assert losses(run) == pytest.approx(losses(one_process), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "stop file"])
def test_asked_to_stop(how, clips, tmp_path):
    """A terminal and torchrun signal the whole group of processes, data workers included. Samples, which are due after
    every step here, do not delay the end."""
    run = tmp_path / "run"
    options = {"data__workers": 1, "log__sample_every": 1, "guidance__steps": 1, "faces__pack": ""}
    words = [sys.executable, *command(clips, run, optim__steps=1000, **options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, **pipes, start_new_session=True)
    for line in process.stdout:
        if line.startswith("drew"):  # the first step is done
            break
    if how == "stop file":
        (run / "stop").touch()
    else:
        os.killpg(process.pid, getattr(signal, how))
    output = line + process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    assert "run again to continue" in output and output.count("drew") == len(losses(run)) - 1
    (saved,) = run.glob("step-*")
    assert json.loads((saved / "progress.json").read_text())["step"] == len(losses(run))
    assert not (run / "stop").exists()


def test_last_checkpoints_are_kept(light_run):
    assert sorted(path.name for path in light_run.glob("step-*")) == ["step-000002", "step-000003"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_continues(clips, light_run, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(light_run, run)
    whole = weights(run, 3)
    shard = sorted((run / "step-000003").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-7])
    words = command(clips, run, **LIGHT)
    assert run_here(words, monkeypatch) == 2
    error = capsys.readouterr().err
    assert "step-000003 is damaged" in error and "--from-previous continues from" in error and error.count("\n") == 1
    assert run_here([*words, "--from-previous"], monkeypatch) == 0
    assert "it is step-000003.damaged now" in capsys.readouterr().out
    names = sorted(path.name for path in run.glob("step-*"))
    assert names == ["step-000002", "step-000003", "step-000003.damaged"]
    again = weights(run, 3)
    assert all(torch.equal(again[name], whole[name]) for name in whole)  # the same step once more


def test_saving_needs_memory_for_a_part_of_the_state(tmp_path):
    """torch copies the tensors of a file three times. The growth is far below the state's 384 MiB."""
    script = """
import sys, torch
from pathlib import Path
from torch import nn
from engine import state
from engine.parallel import join_processes

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) // 1024

join_processes()
model = nn.Sequential(*(nn.Linear(256, 2**11, bias=False) for _ in range(64)))
optimizer = torch.optim.AdamW(model.parameters())
sum(p.sum() for p in model.parameters()).backward()
optimizer.step()
optimizer.zero_grad()
state.save(Path(sys.argv[1]) / "small", 1, model[:2], torch.optim.AdamW(model[:2].parameters()), 1, None, [])
before = peak()
state.save(Path(sys.argv[1]) / "run", 1, model, optimizer, 1, None, [])
print(peak() - before)
"""
    run = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert written > 380 * 2**20 and int(done.stdout) < 200


@pytest.mark.slow
def test_export_is_the_base_with_the_trained_tensors_replaced(clips, one_process, tmp_path, monkeypatch, capsys):
    """So ComfyUI and ltx-core, which go by names and metadata, load it: everything untrained is equal byte for byte."""
    base = tmp_path / "base.safetensors"  # the embedded file and something of an audio branch
    tensors = load_file(ASSETS / "tiny.safetensors")
    tensors["model.diffusion_model.audio_adaln_single.linear.weight"] = torch.randn(6, 4).half()
    tensors["audio_vae.decoder.conv_in.conv.weight"] = torch.arange(7.0)
    metadata = Checkpoint(ASSETS / "tiny.safetensors").metadata | {"license": "as released"}
    save_file(tensors, base, metadata=metadata)
    out = tmp_path / "new" / "st-drc.safetensors"
    words = command(clips, one_process, model__ckpt=base, reference__placement="remote")
    reads, read = [], HuggingFaceStorageReader.read_metadata
    monkeypatch.setattr(HuggingFaceStorageReader, "read_metadata", lambda self: reads.append(1) or read(self))
    assert run_here([*words, "--export", str(out)], monkeypatch) == 0
    assert len(reads) == 1  # not for each tensor: with 32 ranks one reading takes seconds

    before, after = Checkpoint(base), Checkpoint(out)
    assert list(after.tensors) == list(before.tensors)
    trained = weights(one_process, 3)
    changed = 0
    for name, entry in before.tensors.items():
        assert {k: after.tensors[name][k] for k in ("dtype", "shape")} == {k: entry[k] for k in ("dtype", "shape")}
        ours = trained.get("model." + name.removeprefix("model.diffusion_model."))
        if ours is None:
            assert after.read_bytes(name) == before.read_bytes(name), name
        else:
            assert torch.equal(after.read(name), ours.to(torch.bfloat16)), name
            changed += after.read_bytes(name) != before.read_bytes(name)
    assert changed > 100
    assert {k: v for k, v in after.metadata.items() if k != OUR_METADATA} == {
        k: v for k, v in before.metadata.items() if k != OUR_METADATA
    }
    assert after.ours["placement"] == "remote"
    assert after.ours["training"]["optim"]["batch"] == 4
    assert after.ours["defaults"]["s_ref"] == before.ours["defaults"]["s_ref"]  # the run names the paper's own
    assert "weights" not in after.ours  # no longer random

    with safe_open(out, framework="pt") as file:  # the library's own reader takes it
        assert set(file.keys()) == set(before.tensors)
    sampled = tmp_path / "sample.mp4"
    words = ["sample.py", "--ckpt", str(out), "--gemma", str(ASSETS / "gemma"), "--prompt", "A man.", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--ref", str(ASSETS / "face.png"), "--out", str(sampled)])
    sample.main()
    assert sampled.exists()
    assert "random" not in capsys.readouterr().out


@pytest.mark.slow
def test_export_holds_one_tensor_at_a_time(clips, one_process, tmp_path):
    """46 GB must not need 46 GB: exporting over a base with 600 MB of other tensors stays far below that."""
    base = tmp_path / "base.safetensors"
    tensors = load_file(ASSETS / "tiny.safetensors")
    tensors |= {f"vocoder.weight_{k}": torch.zeros(50 * 2**20, dtype=torch.uint8) for k in range(12)}
    save_file(tensors, base, metadata=Checkpoint(ASSETS / "tiny.safetensors").metadata)
    del tensors
    script = (
        "import resource, sys; sys.argv = sys.argv[1:]; import train\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "train.main()\n"
        "print('grew', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    words = [*command(clips, one_process, model__ckpt=base), "--export", str(tmp_path / "out.safetensors")]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 250  # MB; the file is over 600
    assert (tmp_path / "out.safetensors").stat().st_size > 600 * 2**20


# ----------------------------------------------------------------------------------------------------------------------
# adapters on the frozen model

LORA = {"lora.rank": 4, "lora.alpha": 8.0, "lora.dropout": 0.1, "optim.batch": 2, "parallel.micro_batch": 1}
LORA |= {"reference.placement": "phase", "reference.source_id": 1, "reference.fit": "cover", "guidance.s_ref": 6.0}


def lora_command(clips: Path, run: Path, **options) -> list[str]:
    return command(clips, run, **{k.replace(".", "__"): v for k, v in LORA.items()} | options)


@pytest.fixture(scope="module")
def lora_run(clips, tmp_path_factory) -> Path:
    """Three undisturbed steps of adapters in one process, identity losses and dropout included."""
    run = tmp_path_factory.mktemp("lora") / "run"
    torchrun(1, lora_command(clips, run, optim__steps=3))
    return run


@pytest.mark.slow
def test_adapters_on_two_processes_are_as_on_one(clips, lora_run, tmp_path):
    torchrun(2, lora_command(clips, tmp_path / "run", optim__steps=3))
    assert losses(tmp_path / "run") == pytest.approx(losses(lora_run), abs=1e-5)
    ours, theirs = weights(tmp_path / "run", 3), weights(lora_run, 3)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=0)
    assert all(tensor.abs().max() > 1e-5 for name, tensor in ours.items() if name.endswith("lora_B"))  # from 0


@pytest.mark.slow
def test_adapters_are_all_that_is_trained_and_stored_and_continue(clips, lora_run, tmp_path, monkeypatch, capsys):
    """Stopped after two steps and continued, it ends where the undisturbed run does; the model stays to the bit."""
    built, build = [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *arguments: built.append(build(*arguments)) or built[-1])
    run = tmp_path / "run"
    assert run_here(lora_command(clips, run, optim__steps=2), monkeypatch) == 0
    assert run_here(lora_command(clips, run, optim__steps=3), monkeypatch) == 0
    assert "after step 2" in capsys.readouterr().out
    assert losses(run) == pytest.approx(losses(lora_run), abs=1e-5)
    ours, theirs = weights(run, 3), weights(lora_run, 3)
    assert ours.keys() == theirs.keys() and all(".lora_" in name for name in ours)
    assert sum(name.startswith("model.") for name in ours) * 3 == len(ours)  # each with two moments
    for name, tensor in ours.items():
        # AdamW divides a gradient by its size: where it is rounding and no more, two runs may step apart by the rate.
        off = (tensor - theirs[name]).abs()
        assert off.max() < QUICK["optim.lr"] and (off > 1e-5).float().mean() < 0.01, name

    base, frozen = Checkpoint(ASSETS / "tiny.safetensors"), 0
    for name, tensor in built[-1].module.state_dict().items():
        if ".lora_" not in name:
            name = name.replace(".base.", ".")
            assert torch.equal(tensor.cpu(), base.read(f"model.diffusion_model.{name}", dtype=torch.float32)), name
            frozen += 1
        else:
            assert torch.equal(tensor.cpu(), ours[f"model.{name}"])
    assert frozen > 100


@pytest.mark.slow
def test_adapters_export_as_a_lora_that_samples_like_the_trained_model(clips, lora_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "lora.safetensors"
    words = lora_command(clips, lora_run, lora__rank=0)  # what was trained is up to the run
    assert run_here([*words, "--export", str(out)], monkeypatch) == 0
    assert f"--lora {out}" in capsys.readouterr().out

    model = LTXVideo.from_checkpoint(ASSETS / "tiny.safetensors")
    file = LoRA(out, [model])
    layers = find_targets(model, TARGETS)
    assert (file.rank, file.audio) == (4, 0)
    assert file.changes.keys() == {f"model.diffusion_model.{layer}.weight" for layer in layers}
    want = {"placement": "phase", "source_id": 1, "phase_scale": 1.0, "fit": "cover", "ref_timestep": "clean"}
    want |= {"base": "tiny.safetensors", "defaults": {"s_text": 5.0, "s_ref": 6.0}}
    assert want.items() <= file.ours.items()
    assert file.ours["lora"]["rank"] == 4 and file.ours["lora"]["alpha"] == 8.0
    assert file.ours["training"]["optim"]["lr"] == QUICK["optim.lr"] and "weights" not in file.ours
    trained = weights(lora_run, 3)
    for name, tensor in load_file(out).items():  # alpha / rank is in B, so that alpha = rank
        layer, part = name.removeprefix("diffusion_model.").removesuffix(".weight").rsplit(".", 1)
        scale = 2 if part == "lora_B" else 1
        assert torch.equal(tensor, (scale * trained[f"model.{layer}.{part}"]).bfloat16()), name

    sampled = tmp_path / "sample.mp4"
    words = ["sample.py", "--lora", str(out), "--prompt", "A man.", "--steps", "2", "--out", str(sampled)]
    monkeypatch.setattr(sys, "argv", [*words, "--ref", str(ASSETS / "face.png")])
    sample.main()
    assert sampled.exists()
    assert "from the LoRA's metadata: placement 'phase', source_id 1" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_adapters_train_in_bf16_beside_a_model_in_bf16_or_fp8(fp8, clips, tmp_path, monkeypatch, capsys):
    """As on a GPU: frozen weights of two bytes or one, adapters of four, no autocast."""
    built, build = [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *arguments: built.append(build(*arguments)) or built[-1])
    options = {"parallel__precision": "bf16", "parallel__recompute": "all", "lora__fp8": str(fp8).lower()}
    options |= {"optim__batch": 1} | ({"faces__pack": ""} if fp8 else {})
    assert run_here([*lora_command(clips, tmp_path / "run", **options), "--dry-run"], monkeypatch) == 0
    assert "loss" in capsys.readouterr().out
    moved = [p for p in built[0].parameters() if p.requires_grad]
    assert {p.dtype for p in moved} == {torch.float32} and len(moved) == 2 * 10 * 8  # layers, blocks
    frozen = {name: p for name, p in built[0].named_parameters() if not p.requires_grad}
    assert frozen["module.proj_out.weight"].dtype == torch.bfloat16
    stored = frozen["module.transformer_blocks.0.attn1.to_q.base.weight"]
    assert stored.dtype == (torch.uint8 if fp8 else torch.bfloat16)


def poison(clips: Path, folder: Path, count: int = 1) -> str:
    """A copy of the cache in which the latents of the first `count` clips are not numbers; returns the first's name."""
    shutil.copytree(clips, folder)
    shard = folder / "shard-00000.safetensors"
    tensors = load_file(shard)
    names = [key for key in tensors if key.endswith(".latents")][:count]
    tensors |= {name: torch.full_like(tensors[name], float("nan")) for name in names}
    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, shard, metadata=metadata)
    clip = json.loads(metadata["cache"])["clips"][0]
    assert len(names) == count and names[0].startswith(f"{clip['row']:07d}")
    return clip["name"]


def test_a_damaged_clip_is_skipped_and_named_once(clips, tmp_path, monkeypatch, capsys):
    name = poison(clips, tmp_path / "cache")
    options = {"optim__steps": 9, "optim__batch": 1, "parallel__micro_batch": 1, "faces__pack": ""}
    assert run_here(command(tmp_path / "cache", tmp_path / "run", **options), monkeypatch) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"skipped {name}") == 1
    assert all(t.isfinite().all() for t in weights(tmp_path / "run", 9).values())
    progress = json.loads((tmp_path / "run" / "step-000009" / "progress.json").read_text())
    assert len(progress["skipped"]) in (2, 3)  # each epoch of four clips has it once


def test_too_many_damaged_clips_end_the_run(clips, tmp_path, monkeypatch, capsys):
    poison(clips, tmp_path / "cache", 3)  # of four
    options = {"optim__steps": 50, "optim__batch": 1, "parallel__micro_batch": 1, "faces__pack": ""}
    assert run_here(command(tmp_path / "cache", tmp_path / "run", **options), monkeypatch) == 2
    assert "11 samples are damaged, and data.max_bad allows 10" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("step-*"))


@pytest.mark.parametrize("broken", ["loss", "gradient", "weights"])
def test_numbers_that_are_not_finite_end_the_run(broken, clips, tmp_path, monkeypatch, capsys):
    """The second step breaks: by a first step of 1e12, by its gradient, by its update. The last checkpoint stays."""
    options = {"optim__steps": 3, "optim__batch": 1, "parallel__micro_batch": 1, "faces__pack": ""}
    options |= {"log__save_every": 1, "optim__warmup": 0}
    clip, rate, norms = torch.nn.utils.clip_grad_norm_, train.learning_rate, []

    def infinite_at_second_step(*arguments, **options):
        norms.append(clip(*arguments, **options))
        return norms[-1] if len(norms) == 1 else torch.tensor(math.inf)

    if broken == "loss":
        options["optim__lr"] = 1e12
    elif broken == "gradient":
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", infinite_at_second_step)
    else:
        monkeypatch.setattr(train, "learning_rate", lambda config, step: math.nan if step else rate(config, step))
    assert run_here(command(clips, tmp_path / "run", **options), monkeypatch) == 2
    error = capsys.readouterr().err
    assert "step 2: " in error and "not finite" in error and len(error.splitlines()) == 1
    assert {"loss": "the loss is", "gradient": "the gradient is", "weights": "nothing was saved"}[broken] in error
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-000001"]
    assert all(t.isfinite().all() for t in weights(tmp_path / "run", 1).values())


def test_dry_run_writes_nothing(clips, tmp_path, monkeypatch, capsys):
    assert run_here([*command(clips, tmp_path / "run"), "--dry-run"], monkeypatch) == 0
    assert not (tmp_path / "run").exists()
    line = capsys.readouterr().out.splitlines()[0]
    for figure in ("loss", "flow", "id", "tic", "faces", "grad", "lr", "tok/s", "TFLOP/s", "GiB"):
        assert figure in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optim__weightdecay": 0}, "did you mean optim.weight_decay"),
        ({"parallel__mode": "tpu"}, "input should be 'ddp' or 'fsdp'"),
        ({"lora__rank": 4, "parallel__mode": "fsdp"}, 'set parallel.mode = "ddp"'),
        ({"lora__rank": -1}, "lora.rank = -1: input should be greater than or equal to 0"),
        ({"lora__rank": 4, "lora__targets": ["to_q", "to_x"]}, "'to_x'"),
        ({"reference__fit": "stretch"}, "input should be 'letterbox' or 'cover'"),
        ({"data__cache": "nowhere"}, "prepare.py"),
        ({"faces__pack": "nowhere/at/all"}, "nowhere/at/all"),
        ({"model__ckpt": "missing.safetensors"}, "no checkpoint at missing.safetensors"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(options, says, clips, tmp_path, monkeypatch, capsys):
    assert run_here(command(clips, tmp_path / "run", **options), monkeypatch) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and says in error and "\n" not in error


def test_a_run_is_not_continued_as_another(clips, light_run, tmp_path, monkeypatch, capsys):
    """Said before a missing cache: who makes the cache first has waited for hours."""
    for cache in (clips, tmp_path / "missing" / clips.name):
        assert run_here(command(cache, light_run, **LIGHT | {"optim__lr": 0.5}), monkeypatch) == 2
        assert "optim.lr" in capsys.readouterr().err


@pytest.mark.slow
def test_samples_and_curves_are_drawn(clips, tmp_path, monkeypatch):
    """The fixed samples become contact sheets, and every figure is in TensorBoard."""
    samples = [[str(ASSETS / "face.png"), "A woman smiles."]]
    options = {"log__sample_every": 1, "log__samples": samples, "guidance__steps": 2, "log__tensorboard": "true"}
    assert run_here(command(clips, tmp_path / "run", optim__steps=1, **options), monkeypatch) == 0
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Image.open(tmp_path / "run" / "samples" / "step-000001-0.png") as sheet:
        assert sheet.width > 5 * sheet.height
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"loss", "flow", "id", "tic", "w_aux", "face_rate", "grad_norm", "lr"} <= set(board.Tags()["scalars"])
    (loss,) = board.Scalars("loss")
    assert loss.value == pytest.approx(losses(tmp_path / "run")[0], rel=1e-6)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"process number 2 here, for 1 GPU\(s\): --nproc-per-node=1"):
        join_processes()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_bf16_is_close_and_quiet(mode, clips, one_process, tmp_path):
    """bf16 computation over float32 weights: the same loss, nearly the same step, and no warning in a normal run.

    Only the first step is compared: a small change of a weight shows in its bf16 copy when a few have added up.
    """
    options = {"optim__steps": 1, "parallel__precision": "bf16", "parallel__mode": mode}
    done = torchrun(2, command(clips, tmp_path / "run", **options))
    assert losses(tmp_path / "run") == pytest.approx(losses(one_process)[:1], abs=1e-3)
    assert "Warning" not in done.stderr, done.stderr
    start = load_file(ASSETS / "tiny.safetensors")
    ours, theirs = weights(tmp_path / "run", 1), weights(one_process, 1)
    steps = []
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        if name.startswith("model."):
            first = start["model.diffusion_model." + name.removeprefix("model.")].float()
            steps.append(torch.stack([tensor - first, theirs[name] - first]).flatten(1))
    assert torch.nn.functional.cosine_similarity(*torch.cat(steps, dim=1), dim=0) > 0.9


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU adds up in no fixed order: no two runs agree to the bit")
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_bf16_weights_with_stochastic_rounding_continue_and_export(mode, clips, tmp_path, monkeypatch, capsys):
    """What is stored is bf16, a continued run is the whole one to the bit, and it compiles (a counting backend)."""
    options = {"optim__kind": "adamw-bf16", "parallel__precision": "bf16", "parallel__mode": mode, "faces__pack": '""'}
    options |= {"optim__batch": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_here(command(clips, whole, optim__steps=2, **options), monkeypatch) == 0
    assert run_here(command(clips, parts, optim__steps=1, **options), monkeypatch) == 0
    counter, plain = CompileCounter(), LTXVideo.compile_blocks
    monkeypatch.setattr(LTXVideo, "compile_blocks", lambda model: plain(model, counter))
    torch._dynamo.reset()
    changes = options | {"parallel__compile": str(mode == "ddp").lower()}
    assert run_here(command(clips, parts, optim__steps=2, **changes), monkeypatch) == 0
    assert mode == "fsdp" or 1 <= counter.frame_count <= 3  # samples with reference, without, or some of both
    ours, theirs = (weights(run, 2) for run in (parts, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16}
    out = tmp_path / "trained.safetensors"
    assert run_here([*command(clips, whole, **options), "--export", str(out)], monkeypatch) == 0
    name = "transformer_blocks.0.attn1.to_q.weight"
    exported = Checkpoint(out).read(f"model.diffusion_model.{name}")
    assert torch.equal(exported.bfloat16(), theirs[f"model.{name}"])


def test_only_safetensors_and_json_are_written(light_run):
    """A checkpoint that had to be unpickled could run code when it is loaded."""
    kinds = {path.suffix for path in light_run.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json", ".jsonl"}

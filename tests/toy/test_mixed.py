"""Sixty drawn clips of nine shapes and five lengths: what arrives in a cache, and a training on it."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import shallow_checkpoint
from test_train import ASSETS, QUICK, command, losses, run_here, torchrun, weights

import train
from checkpoint import Checkpoint
from clips.cache import prepare
from common.cache import CachedClips
from common.media import count_frames, read_video
from config import read_config
from data import TrainingClips, draw_sample, letterbox, share_of_rank
from engine.parallel import build_model, join_processes
from engine.plan import plan_of
from toy.mixed import LENGTHS, SHAPES, write_mixed

COUNT, WINDOWS, FPS = 60, 4, 12
MODELS = {"ckpt": ASSETS / "tiny.safetensors", "gemma": ASSETS / "gemma", "faces": ASSETS / "faces"}
STEPS, BATCH, SEED = 4, 4, 7


def test_shapes_lengths_and_rates_of_the_set(tmp_path):
    write_mixed(tmp_path, 3, seed=1)
    for index, rate in enumerate((12, 24, 30)):
        (width, height), seconds = SHAPES[index], LENGTHS[index]
        assert count_frames(tmp_path / f"{index:03d}.mp4") == round(seconds * rate)
        frames = read_video(tmp_path / f"{index:03d}.mp4", 2, FPS, height, width).astype(float)
        if width > height:  # the wall goes on to both sides
            side = (width - height) // 2
            assert np.ptp(frames[0, :, : side - 4], axis=1).max() < 40
    assert len(set(SHAPES)) == 9 and len({width / height for width, height in SHAPES}) == 9 and len(set(LENGTHS)) == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    write_mixed(folder / "clips", COUNT, seed=0)
    prepare(folder / "clips" / "manifest.csv", out=folder / "cache", windows=WINDOWS, **MODELS)
    return folder


def truth(index: int) -> tuple[int, int, float]:
    """Width, height, seconds of a clip; its length is a whole number of frames at 12, 24 or 30 fps."""
    rate = (12, 24, 30)[index % 3]
    return *SHAPES[index % 9], round(LENGTHS[index % 5] * rate) / rate


def rule(buckets: list[dict], width: int, height: int, frames: int) -> tuple[float, int]:
    """What the best bucket keeps of the picture, and its number; the number is -1 if none fits."""
    best, most, kept = -1, 0.0, 0.0
    for k, b in enumerate(buckets):
        scale = max(b["width"] / width, b["height"] / height)
        area = b["width"] * b["height"] / scale**2 / (width * height)
        if scale <= 1.5 and b["frames"] <= frames and area * b["frames"] > most + 1e-9:
            best, most, kept = k, area * b["frames"], area
    return kept, best


@pytest.mark.slow
def test_every_clip_is_in_its_bucket_and_most_of_the_set_arrives(folder, tmp_path):
    cached = CachedClips(folder / "cache")
    buckets, expected, areas, frames = cached.settings["buckets"], {}, [], 0
    for index in range(COUNT):
        width, height, seconds = truth(index)
        left = math.ceil((seconds - 1e-3) * FPS)
        for number in range(WINDOWS):
            area, best = rule(buckets, width, height, left)
            if best < 0:
                break
            expected[f"{index:03d}:{index + 2}" + (f".{number + 1}" if number else "")] = best
            areas.append(area)
            left, frames = left - buckets[best]["frames"], frames + buckets[best]["frames"]
    assert dict(zip(cached.names, cached.bucket_of.tolist())) == expected
    assert len(set(expected.values())) > 8 and not cached.report
    seconds = sum(truth(index)[2] for index in range(COUNT))
    assert np.mean(areas) > 0.9 and frames / FPS / seconds > 0.9
    for item in (cached[0], cached[50]):
        assert list(item["latents"].shape) == buckets[expected[item["name"]]]["latent_shape"]


def hand_made_losses(cached: CachedClips, words: list[str]) -> list[float]:
    """The training written as a plain loop over buckets, in this process: no micro-batches, no workers."""
    config = read_config(None if not words[1].endswith(".toml") else words[1], words[3::2])
    device = join_processes()
    base = Checkpoint(shallow_checkpoint())
    plan = plan_of(config, base.config, cached.settings)
    objective = train.build_objective(config, base, cached, device, plan.autocast)
    model = build_model(config, base, device, "none")
    optimizer = torch.optim.AdamW(model.parameters(), QUICK["optim.lr"], betas=(0.9, 0.999), weight_decay=0.01)
    members = [[i for i, b in enumerate(cached.bucket_of) if b == bucket] for bucket in range(len(cached.buckets))]
    start = np.random.default_rng(np.random.SeedSequence(SEED, spawn_key=(3,))).random()
    queues, epochs, found = {b: [] for b in range(len(members))}, [0] * len(members), []
    for step in range(STEPS):
        point, bucket = (start + step * (5**0.5 - 1) / 2) % 1 * len(cached), 0
        while point >= len(members[bucket]):
            point, bucket = point - len(members[bucket]), bucket + 1
        while len(queues[bucket]) < BATCH:
            rng = np.random.default_rng(np.random.SeedSequence(SEED, spawn_key=(1, epochs[bucket])))
            queues[bucket] += [members[bucket][k] for k in rng.permutation(len(members[bucket]))]
            epochs[bucket] += 1
        indices, queues[bucket] = queues[bucket][:BATCH], queues[bucket][BATCH:]
        items, size = [cached[i] for i in indices], cached.settings["buckets"][bucket]
        photos = [np.asarray(letterbox(item["image"], size["height"], size["width"])) for item in items]
        channels, *grid = size["latent_shape"]
        draws = [draw_sample(SEED, step * BATCH + k, tuple(grid), channels, 0.05, 0.2, 2, 2048) for k in range(BATCH)]
        batch = {
            "latents": torch.stack([item["latents"] for item in items]),
            "features": [item["features"] for item in items],
            "e_ref": torch.stack([item["e_ref"] for item in items]),
            "ref_images": torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).float() / 127.5 - 1,
        }
        loss = objective(model, batch, draws)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = QUICK["optim.lr"] * min(1, (step + 1) / QUICK["optim.warmup"])
        optimizer.step()
        found.append(loss.item())
    dist.destroy_process_group()
    return found


def words_of(folder: Path, run: Path) -> list[str]:
    options = {"optim__steps": STEPS, "optim__batch": BATCH, "run__seed": SEED, "reference__augment": "false"}
    options |= {"model__ckpt": shallow_checkpoint()}
    return command(folder / "cache", run, log__save_every=2, **options)


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    torchrun(1, words_of(folder, run))
    return run


@pytest.mark.slow
def test_one_process_is_a_plain_loop_over_buckets(folder, one_process, tmp_path):
    cached = CachedClips(folder / "cache")
    assert losses(one_process) == pytest.approx(hand_made_losses(cached, words_of(folder, tmp_path)), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_are_one(mode, folder, one_process, tmp_path):
    torchrun(2, [*words_of(folder, tmp_path / "run"), "--set", f"parallel.mode={mode}"])
    assert losses(tmp_path / "run") == pytest.approx(losses(one_process), abs=1e-5)
    for name, tensor in weights(tmp_path / "run", STEPS).items():
        if name.startswith("model."):
            torch.testing.assert_close(tensor, weights(one_process, STEPS)[name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_killed_continued_and_exported(folder, one_process, tmp_path, monkeypatch):
    run = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, *words_of(folder, run)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("saved"):
            break
    time.sleep(0.2)
    process.kill()
    process.communicate()
    torchrun(1, words_of(folder, run))
    fixed = not torch.cuda.is_available()  # a GPU adds up in no fixed order
    assert losses(run) == pytest.approx(losses(one_process), abs=1e-6 if fixed else 1e-5)
    assert run_here([*words_of(folder, run), "--export", str(tmp_path / "model.safetensors")], monkeypatch) == 0
    exported, trained = Checkpoint(tmp_path / "model.safetensors"), weights(run, STEPS)
    name = next(name for name in trained if name.endswith("attn1.to_q.weight") and name.startswith("model."))
    same = exported.read("model.diffusion_model." + name.removeprefix("model."))
    assert torch.equal(same, trained[name].to(same.dtype))


@pytest.mark.slow
def test_work_of_the_ranks_is_equal(folder):
    """Operations by the plan of what each rank computes in each step, one sample after the other. A sample without
    reference has a shorter sequence."""
    cached, ltx = CachedClips(folder / "cache"), Checkpoint(ASSETS / "tiny.safetensors").config

    def config(*changes):
        return read_config(None, ["optim.batch=32", "data.workers=0", f"run.seed={SEED}", "faces.pack=", *changes])

    plans = {drop: plan_of(config(f"dropout.reference={drop}"), ltx, cached.settings) for drop in (0, 0.2, 1)}
    cost = {drop: {p.grid: p.flops_per_sample() for p, _ in plan.buckets} for drop, plan in plans.items()}
    clips = [cost[0.2][cached.buckets[k].latent_shape[1:]] for k in cached.bucket_of]
    assert plans[0.2].mean_flops() == pytest.approx(np.mean(clips))
    training, worst = TrainingClips(cached, config()), 0.0
    for step in range(20):
        numbers = range(step * 32, step * 32 + 32)
        for ranks in (2, 4, 8):
            work = np.zeros(ranks)
            for rank in range(ranks):
                for number in share_of_rank(numbers, rank, ranks, SEED, 0.2):
                    training.place(number)
                    channels, *grid = cached.buckets[training.bucket].latent_shape
                    drop = draw_sample(SEED, number, tuple(grid), channels, 0.05, 0.2, 2).drop_ref
                    work[rank] += cost[int(drop)][tuple(grid)]
            worst = max(worst, np.ptp(work) / work.mean())
    assert worst < 0.1

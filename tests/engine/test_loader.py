"""loader.py: what a worker hands over is what a plain loop over the clips makes, in few tensors."""

import json

import pytest
import torch

from clips.cache import prepare
from config import read_config
from data import CachedClips, TrainingClips, collate
from engine import loader
from engine.loader import pack, throw, training_batches
from objective import roll

BATCH = 6


@pytest.fixture(scope="module")
def clips(root, tmp_path_factory):
    """The four clips of assets/ as a cache of several shards."""
    folder, assets = tmp_path_factory.mktemp("loader") / "cache", root / "assets"
    models = {"ckpt": assets / "tiny.safetensors", "gemma": assets / "gemma", "faces": assets / "faces"}
    prepare(assets / "clips" / "manifest.csv", out=folder, shard_gb=1e-4, **models)
    assert json.loads((folder / "cache.json").read_text())["shards"] > 1
    return CachedClips(folder)


@pytest.fixture(scope="module")
def config():
    return read_config(None, [f"optim.batch={BATCH}", "parallel.micro_batch=2", "run.seed=3", "data.workers=0"])


def tensors(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in tensors(one)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_batches_are_those_of_a_plain_loop(rank, world, clips, config, monkeypatch):
    monkeypatch.setattr(loader.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(loader.dist, "get_world_size", lambda: world)
    batches = list(training_batches(config, clips, 2, 4))
    numbers = [n for n in range(2 * BATCH, 4 * BATCH) if n % world == rank]
    assert [n for batch in batches for n in batch["counts"]] == numbers
    assert all(len(batch["counts"]) <= 2 for batch in batches)
    plain = TrainingClips(clips, seed=3)
    for batch in batches:
        want = collate([plain[n] for n in batch["counts"]])
        for key in ("latents", "references", "e_ref"):
            assert torch.equal(batch[key], want[key])
        assert all(torch.equal(a, b) for a, b in zip(batch["features"], want["features"], strict=True))
        channels, frames, *sides = clips.latent_shape
        for n, dice in zip(batch["counts"], batch["dice"], strict=True):
            same = roll(3, n, frames * sides[0] * sides[1], channels, frames - 1, 0.05, 0.2)  # a window of 2
            assert torch.equal(dice.eps, same.eps) and dice.t == same.t and dice.window == same.window
            assert (dice.drop_text, dice.drop_reference) == (same.drop_text, same.drop_reference)


def test_noise_levels_are_those_the_config_asks_for(clips):
    config = read_config(None, ["optim.noise_tokens=2048"])
    channels, frames, height, width = clips.latent_shape
    own, other = (roll(0, 7, frames * height * width, channels, frames - 1, 0.05, 0.2, n) for n in (0, 2048))
    assert throw(config, clips.latent_shape, 7).t == other.t != own.t


@pytest.mark.slow
def test_workers_change_nothing(clips, config, monkeypatch):
    monkeypatch.setattr(loader.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(loader.dist, "get_world_size", lambda: 1)
    with_workers = config | {"data": config["data"] | {"workers": 2}}
    here, there = (list(training_batches(c, clips, 0, 2)) for c in (config, with_workers))
    assert len(here) == len(there) == BATCH
    for a, b in zip(here, there):
        assert a["names"] == b["names"] and torch.equal(a["references"], b["references"])
        assert all(torch.equal(x.eps, y.eps) and x.t == y.t for x, y in zip(a["dice"], b["dice"], strict=True))
        assert all(torch.equal(x, y) for x, y in zip(a["features"], b["features"], strict=True))


def test_a_larger_batch_has_no_more_tensors(clips, config):
    """Each would be a file of its own between a worker and the training loop."""
    plain = TrainingClips(clips, seed=3)
    few, many = (pack(config, clips.latent_shape, [plain[n] for n in range(size)]) for size in (1, 16))
    assert len(tensors(few)) == len(tensors(many)) == 5
    assert len(many["eps"]) == 16 and torch.equal(many["eps"][5], throw(config, clips.latent_shape, 5).eps)

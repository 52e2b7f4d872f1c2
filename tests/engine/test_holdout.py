"""Held-out people: who they are, the figures on them against a loop by hand, many processes and one, the best step."""

import hashlib
import json
import math
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shallow_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import ROOT, command, run_here, torchrun, weights

import train
from checkpoint import Checkpoint
from common.cache import CachedClips
from common.errors import UserError
from common.images import to_tensor
from config import LEVELS
from data import letterbox
from engine import state
from engine.holdout import figures, hold_out, read
from engine.samples import intact_clips
from model import LTXVideo
from objective import decode_window
from rope import reference_positions, video_positions
from text import TextConnector, pad_features
from toy.cache import prepare_toy
from vae import VideoVAE

ASSETS = ROOT / "assets"
TINY = ASSETS / "tiny.safetensors"


class Clips:
    """People and names of clips, all that hold_out reads."""

    folder = Path("cache")

    def __init__(self, people):
        self.identities, self.names = list(people), [f"{person}:{k}" for k, person in enumerate(people)]

    def __len__(self):
        return len(self.names)

    def subset(self, numbers):
        part = Clips([])
        part.identities, part.names = ([column[k] for k in numbers] for column in (self.identities, self.names))
        return part


def population(count, seed=0):
    """Clips of people who have one to nine clips each."""
    rng = np.random.default_rng(seed)
    return [f"person {k}" for k in range(count) for _ in range(rng.integers(1, 10))]


def test_nobody_is_in_both_parts_and_every_other_clip_is_trained_on():
    clips = Clips(population(500))
    rest, held = hold_out(clips, 200)
    assert len(held) == 200 and not set(held.identities) & set(rest.identities)
    others = {name for name, person in zip(clips.names, clips.identities) if person not in set(held.identities)}
    assert set(rest.names) == others
    assert max(held.identities.count(person) for person in set(held.identities)) <= 9


def test_one_person_with_most_clips_is_at_most_an_eighth():
    for seed in range(5):
        people = [f"rare {seed} {k}" for k in range(100)] + ["frequent"] * 5000
        _, held = hold_out(Clips(people), 80)
        assert len(held) == 80 and held.identities.count("frequent") in (0, 10)


def test_more_data_never_hold_out_a_person_who_was_trained_on():
    people = population(300)
    before, first = hold_out(Clips(people), 100)
    _, second = hold_out(Clips(people + [f"new {person}" for person in population(150, seed=1)]), 100)
    assert not set(second.identities) & set(before.identities)
    stayed = set(first.identities) & set(second.identities)
    assert 0.4 < len(stayed) / len(set(first.identities)) < 0.95  # about two of three, as the people are


def test_the_order_of_the_clips_does_not_matter():
    clips = Clips(population(100))
    order = np.random.default_rng(1).permutation(len(clips))
    assert hold_out(clips, 50)[1].names == hold_out(clips.subset(order), 50)[1].names


def test_no_holdout_changes_nothing():
    clips = Clips(population(10))
    assert hold_out(clips, 0) == (clips, None)


def test_a_cache_of_too_few_people_is_refused():
    with pytest.raises(
        UserError, match=r"data\.holdout = 50 leaves no clip to train on: cache has 5 clips of 1 people"
    ):
        hold_out(Clips(["one"] * 5), 50)


def test_samples_are_drawn_of_intact_clips():
    class Damaged(list):
        def __getitem__(self, k):
            if k in (0, 2):
                raise UserError("damaged")
            return {"name": k}

    assert [clip["name"] for clip in intact_clips(Damaged(range(5)))] == [1, 3, 4]


# ---------------------------------------------------------------------------------------------------------------------
# a cache of drawn people


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("held") / "cache"
    prepare_toy(folder, 12, TINY, ASSETS / "gemma", ASSETS / "faces")
    return folder


def options(**changes):
    """Adapters, because their checkpoints are small."""
    adapters = {"lora__rank": 1, "lora__targets": ["attn1.to_q"]}
    return adapters | {"data__holdout": 2, "optim__steps": 1, "optim__batch": 2, "log__eval_every": 1} | changes


def held_out(run):
    return [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]


def test_a_cache_knows_its_people(drawn):
    """By the manifest's identity, else by the file; a cache of an older version has names alone."""
    clips = CachedClips(drawn)
    assert clips.identities == [f"{int(name.split(':')[1]) - 1}" for name in clips.names]
    part = clips.subset([3, 1])
    assert part.names == [clips.names[3], clips.names[1]] and len(part) == 2 and len(clips) > 10
    assert torch.equal(part[0]["e_ref"], clips[3]["e_ref"])


def test_a_cache_of_an_older_version_groups_by_file(drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "old")
    shard = tmp_path / "old" / "shard-00000.safetensors"
    with safe_open(shard, "pt") as file:
        metadata = json.loads(file.metadata()["cache"])
    for k, clip in enumerate(metadata["clips"]):
        del clip["identity"]
        clip["name"] = f"film: {k // 2}:{k}"
    save_file(load_file(shard), shard, {"cache": json.dumps(metadata)})
    assert CachedClips(tmp_path / "old").identities[:4] == ["film: 0", "film: 0", "film: 1", "film: 1"]


@pytest.fixture(scope="module")
def run(drawn, tmp_path_factory):
    """A step with a look before and after it; also the clips that it was drawn from."""
    folder, trained, batches = tmp_path_factory.mktemp("held") / "run", [], train.training_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train, "training_batches", lambda c, clips, *steps: trained.append(clips) or batches(c, clips, *steps)
        )
        assert run_here(command(drawn, folder, **options()), patch) == 0
    return folder, trained[0]


def test_held_out_people_are_not_trained_on(run, drawn):
    _, trained = run
    _, held = hold_out(CachedClips(drawn), 2)
    assert len(trained) + len(held) == len(CachedClips(drawn)) and not set(trained.names) & set(held.names)


@cache
def parts():
    ours = Checkpoint(TINY).ours["defaults"]
    model, vae = LTXVideo.from_checkpoint(TINY), VideoVAE.from_checkpoint(TINY)
    return model, vae, TextConnector.from_checkpoint(TINY).connector, ours["fps"]


def by_hand(clip, level, with_reference):
    """A clip's flow loss at one noise level, with the clean estimate, from the modules alone."""
    (model, vae, connector, fps), t = parts(), (level + 0.5) / 8
    latents, grid = clip["latents"][None].float(), clip["latents"].shape[1:]
    z_0 = latents.flatten(2).mT  # (1, N, C)
    digest = hashlib.sha256(clip["name"].encode()).hexdigest()
    generator = torch.Generator().manual_seed(int(digest[:14], 16))
    eps = torch.randn(8, *z_0.shape[1:], generator=generator)[level][None]
    x, levels = (1 - t) * z_0 + t * eps, [t] * z_0.shape[1]
    positions = [video_positions(*grid, fps, vae.scale)]
    if with_reference:
        size = [cells * side for cells, side in zip(grid[1:], vae.scale[1:])]
        ref_image = to_tensor(letterbox(clip["image"], *size))
        z_ref = vae.encode(ref_image[None, :, None]).flatten(2).mT  # (1, R, C)
        x, levels = torch.cat([x, z_ref], dim=1), levels + [0.0] * z_ref.shape[1]
        positions.append(reference_positions(*grid, fps, vae.scale))
    context = connector(*pad_features([clip["features"].float()], clip["slots"]))
    v = model(x, torch.tensor([levels]), torch.tensor([t]), context, torch.cat(positions, dim=1)[None])
    v = v[:, : z_0.shape[1]]
    estimate = ((1 - t) * z_0 + t * eps - t * v).mT.unflatten(2, grid)
    return (v - (eps - z_0)).square().mean().item(), decode_window(vae, estimate, (grid[0] - 2) // 2, 2)


@torch.no_grad()
def test_figures_are_those_of_a_loop_by_hand(run, drawn, insightface_embeddings):
    """Before the first step, two of eight levels; faces by insightface, from pixels rounded to bytes."""
    clips = CachedClips(drawn)
    _, held = hold_out(clips, 3)
    got = held_out(run[0])[0]
    for level in (2, 6):
        rows, similar = [], []
        for k in range(2):
            clip = held[k] | {"slots": clips.settings["max_tokens"]}
            without, _ = by_hand(clip, level, False)
            flow, video = by_hand(clip, level, True)
            rows.append((flow, without))
            frames = ((video[0].permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
            e_ref = clip["e_ref"].numpy()
            for e in insightface_embeddings(frames):
                similar.append(0 if e is None else e @ e_ref / np.linalg.norm(e) / np.linalg.norm(e_ref))
        flow, without = np.mean(rows, axis=0)
        assert got["flow_by_t"][level] == pytest.approx(flow, rel=1e-4)
        assert got["no_reference_by_t"][level] == pytest.approx(without, rel=1e-4)
        assert got["similarity_by_t"][level] == pytest.approx(np.mean(similar), abs=0.03)
    assert got["flow"] == pytest.approx(np.mean(got["flow_by_t"]))
    assert (got["step"], got["clips"]) == (0, 2) and len(got["flow_by_t"]) == len(LEVELS) == 8


def test_the_mean_its_error_and_the_faces():
    """Three clips by hand: no face at the second level, one of two frames at the first."""
    table = torch.zeros(3, 2, 2, 3)
    table[:, 0, :, 0], table[:, 1, :, 0] = 5.0, torch.tensor([[1.0, 3.0], [2.0, 4.0], [6.0, 8.0]])
    table[:, 1, :, 2] = 2.0
    table[:, 1, 0, 1] = torch.tensor([0.9, 0.6, 0.3])  # sums over two frames
    got = figures(table, use_reference=True)
    assert (got["flow"], got["no_reference"]) == (4.0, 5.0) and got["flow_by_t"] == [3.0, 5.0]
    assert got["flow_error"] == pytest.approx(np.std([2, 3, 7], ddof=1) / 3**0.5)
    assert got["similarity_by_t"] == pytest.approx([0.3, 0.0]) and got["similarity"] == pytest.approx(0.15)
    without = figures(table, use_reference=False)
    assert without["flow"] == 5.0 and "no_reference" not in without


def test_a_damaged_clip_is_left_out_and_named(drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / "cache")
    shard, (_, held) = tmp_path / "cache" / "shard-00000.safetensors", hold_out(CachedClips(drawn), 2)
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    damaged = load_file(shard)
    damaged[f"{held.places[1, 1]:07d}.latents"][:] = math.nan
    save_file(damaged, shard, metadata=metadata)
    _, held = hold_out(CachedClips(tmp_path / "cache"), 2)
    for number, intact in ((1, False), (0, True)):
        clip, is_intact = read(held, number)
        assert (clip["name"], is_intact) == (held.names[0], intact)
    printed = capsys.readouterr().out
    assert printed.startswith(f"held out, skipped: clip {held.names[1]} in ") and printed.count("\n") == 1
    assert figures(torch.stack([torch.ones(2, 8, 3), torch.full((2, 8, 3), math.nan)]), True)["clips"] == 1


def test_the_best_checkpoint_stays_and_is_exported(drawn, tmp_path, monkeypatch, capsys):
    """The last one stays, and the best of all; a continued run looks at step 0 no second time."""
    losses = iter([9.0, 3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: {"clips": 3, "flow": next(losses), "flow_error": 0.0})
    changes = options(log__keep=1, optim__batch=1, faces__pack='""')
    for steps in (2, 4):
        assert run_here(command(drawn, tmp_path / "run", **changes | {"optim__steps": steps}), monkeypatch) == 0
    assert "with --best that of step-000002" in capsys.readouterr().out
    assert [(line["step"], line["flow"]) for line in held_out(tmp_path / "run")] == list(enumerate([9, 3, 1, 2, 4]))
    assert [folder.name for folder in state.checkpoints(tmp_path / "run")] == ["step-000002", "step-000004"]
    export = ["--export", str(tmp_path / "best.safetensors"), "--best"]
    assert run_here([*command(drawn, tmp_path / "run", **changes), *export], monkeypatch) == 0
    name = "transformer_blocks.0.attn1.to_q.lora_B"
    weight = load_file(tmp_path / "best.safetensors")[f"diffusion_model.{name}.weight"]
    assert torch.equal(weight, weights(tmp_path / "run", 2)[f"model.{name}"].bfloat16())
    assert not torch.equal(weight, weights(tmp_path / "run", 4)[f"model.{name}"].bfloat16())


def test_a_run_without_held_out_clips_has_no_best(drawn, run, tmp_path, monkeypatch, capsys):
    words = command(drawn, tmp_path / "run", **options(data__holdout=0, faces__pack='""'))
    assert run_here(words, monkeypatch) == 0
    assert not (tmp_path / "run" / "held_out.jsonl").exists()
    assert run_here([*words, "--export", str(tmp_path / "a.safetensors"), "--best"], monkeypatch) == 2
    assert "has a loss on held-out clips" in capsys.readouterr().err
    assert run_here(command(drawn, run[0], **options(data__holdout=3)), monkeypatch) == 2
    assert "was started with data.holdout = 2" in capsys.readouterr().err


def three_held_out(**changes):
    return options(lora__rank=0, data__holdout=3, model__ckpt=shallow_checkpoint(), **changes)


@pytest.fixture(scope="module")
def one_process(drawn, tmp_path_factory) -> Path:
    """A step on one process, with looks at three held-out clips before and after it."""
    run = tmp_path_factory.mktemp("one") / "run"
    torchrun(1, command(drawn, run, **three_held_out()))
    return run


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_look_as_one_does(mode, drawn, one_process, tmp_path):
    """Three clips on two processes; samples of two held-out people are drawn on the way."""
    changes = three_held_out(parallel__mode=mode, log__sample_every=1, guidance__steps=2)
    torchrun(2, command(drawn, tmp_path / "run", **changes))
    for ours, theirs in zip(held_out(tmp_path / "run"), held_out(one_process), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, abs=1e-5), key
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "step-000001-0.png",
        "step-000001-1.png",
    ]


def shuffle_references(drawn: Path, out: Path, kept: set[str]) -> None:
    """A copy of a cache of one shard in which each clip but those `kept` has another person's photo and e_ref."""
    shutil.copytree(drawn, out)
    shard, clips = out / "shard-00000.safetensors", CachedClips(drawn)
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    rows = [row for (_, row), name in zip(clips.places, clips.names) if name not in kept]
    for part in ("image", "e_ref"):
        moved = {f"{to:07d}.{part}": tensors[f"{row:07d}.{part}"] for row, to in zip(rows, [*rows[1:], rows[0]])}
        tensors |= moved
    save_file(tensors, shard, metadata=metadata)


@pytest.mark.slow
def test_the_loss_falls_and_tells_shuffled_references_from_true_ones(tmp_path, monkeypatch):
    """From nothing the loss falls at every look. From the weights in assets/, the gain by a reference stays where each
    clip has its own person's photo, and shrinks where the photos of the clips trained on are shuffled."""
    prepare_toy(tmp_path / "true", 100, TINY, ASSETS / "gemma", ASSETS / "faces")
    _, held = hold_out(CachedClips(tmp_path / "true"), 8)
    shuffle_references(tmp_path / "true", tmp_path / "shuffled", set(held.names))
    common = options(lora__rank=0, data__holdout=8, faces__pack='""', optim__batch=8, parallel__micro_batch=8)
    changes = common | {"model__ckpt": shallow_checkpoint(), "model__scratch": "true", "optim__lr": 1.5e-3}
    changes |= {"optim__steps": 20, "log__eval_every": 5}
    assert run_here(command(tmp_path / "true", tmp_path / "new", **changes), monkeypatch) == 0
    flow = [line["flow"] for line in held_out(tmp_path / "new")]
    assert len(flow) == 5 and (np.diff(flow) < 0).all()

    changes = common | {"optim__steps": 20, "log__eval_every": 20, "optim__lr": 6e-4}
    gain = {}
    for name in ("true", "shuffled"):
        assert run_here(command(tmp_path / name, tmp_path / f"{name}-run", **changes), monkeypatch) == 0
        gain[name] = [line["no_reference"] - line["flow"] for line in held_out(tmp_path / f"{name}-run")]
    print(gain)
    assert gain["true"][0] == pytest.approx(gain["shuffled"][0])  # the same people, the same weights
    assert gain["true"][1] > 0.8 * gain["true"][0] and gain["shuffled"][1] < 0.7 * gain["true"][1]

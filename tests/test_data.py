"""Eq. 5 by measuring what comes out, the randomness of a sample, and batches compared with a plain loop."""

import colorsys
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import data
from clips.cache import prepare
from common.errors import UserError
from common.media import to_tensor
from config import read_config
from data import (
    AUGMENT,
    CachedClips,
    TrainingClips,
    augment_reference,
    collate,
    draw_sample,
    epoch_order,
    letterbox,
    reference_tensor,
    sample_rng,
    training_batches,
)
from losses import shifted_logit_normal

OFF = {"flip": 0, "rotate": 0, "crop": 0, "jitter": 0}


def rngs(count):
    return [sample_rng(0, 0, k) for k in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.1: letterbox


def test_letterbox_is_symmetric_keeps_the_ratio_and_touches_the_frame():
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(16, 200, 2)
        image = Image.new("RGB", tuple(rng.integers(8, 300, 2)), "white")
        boxed = np.asarray(letterbox(image, height, width))
        assert boxed.shape == (height, width, 3) and set(np.unique(boxed)) <= {0, 255}
        rows, columns = (np.flatnonzero(boxed[..., 0].any(axis)) for axis in (1, 0))
        top, left, bottom, right = rows[0], columns[0], height - 1 - rows[-1], width - 1 - columns[-1]
        assert abs(top - bottom) <= 1 and abs(left - right) <= 1
        assert (top == bottom == 0) or (left == right == 0)
        scale = min(width / image.width, height / image.height)
        assert abs(len(columns) - image.width * scale) <= 0.51 or len(columns) == 1
        assert abs(len(rows) - image.height * scale) <= 0.51 or len(rows) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 5: augmentation


def portrait(width=60, height=80):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.uint8))


def test_without_any_operation_nothing_changes_and_a_flip_is_a_mirror():
    image = portrait()
    for rng in rngs(5):
        assert np.array_equal(augment_reference(image, rng, **OFF), image)
    for rng in rngs(5):
        flipped = augment_reference(image, rng, **OFF | {"flip": 1})
        assert np.array_equal(np.asarray(flipped), np.asarray(image)[:, ::-1])


def test_each_operation_has_its_own_chance():
    """Who did what, told apart by its traces; the four are independent, so each pair occurs as often as its product."""
    ground = np.full((60, 60, 3), 100, np.uint8)
    ground[:, 10:20] = (60, 90, 200)  # left of the middle, unless flipped
    image, n = Image.fromarray(ground), 1500
    done = []
    for rng in rngs(n):
        out = augment_reference(image, rng)
        pixels = np.asarray(out).astype(int)
        blue = np.flatnonzero((pixels[..., 2] - pixels[..., 0] > 20)[len(pixels) // 2])
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        plain = np.median(pixels.reshape(-1, 3), axis=0)
        done.append((
            blue.mean() > out.width / 2,
            (corners.max(1) < 70).any() or (out.size == image.size and len(np.unique(pixels[..., 0])) > 4),
            out.size != image.size,
            (plain != 100).any(),
        ))  # fmt: skip
    done = np.array(done)
    flip, _, crop, jitter = done.mean(0)
    tolerance = 4 * math.sqrt(0.25 / n)
    assert abs(flip - AUGMENT["flip"]) < tolerance
    assert abs(crop - AUGMENT["crop"]) < tolerance + 0.01
    assert abs(jitter - AUGMENT["jitter"]) < tolerance + 0.02  # some jitter leaves grey 100 at 100
    uncropped = done[~done[:, 2]]  # a crop may cut the black corners away
    assert abs(uncropped[:, 1].mean() - AUGMENT["rotate"]) < 2 * tolerance
    for a, b in ((0, 2), (0, 3), (2, 3)):
        assert abs((done[:, a] & done[:, b]).mean() - done[:, a].mean() * done[:, b].mean()) < tolerance


def test_rotation_is_slight_and_leaves_black_corners():
    half = np.full((101, 101, 3), 250, np.uint8)
    half[50:] = 120
    angles = []
    for rng in rngs(200):
        out = augment_reference(Image.fromarray(half), rng, **OFF | {"rotate": 1})
        assert out.size == (101, 101)
        pixels = np.asarray(out)[..., 0].astype(float)
        edges = [np.interp(-185, -pixels[25:76, x], np.arange(25, 76)) for x in (30, 70)]  # where 250 turns into 120
        angles.append(math.degrees(math.atan2(edges[0] - edges[1], 40)))  # counter-clockwise is positive
        if abs(angles[-1]) > 3:
            assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()
    angles = np.array(angles)
    assert np.abs(angles).max() < 10.2 and angles.min() < -9 and angles.max() > 9
    assert np.abs(np.quantile(angles, [0.25, 0.5, 0.75]) - [-5, 0, 5]).max() < 1.7  # uniform


def test_crop_is_a_part_of_the_image_and_keeps_enough():
    width, height = 200, 100
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))  # each pixel says where it was
    kept, corners = [], []
    for rng in rngs(300):
        out = np.asarray(augment_reference(image, rng, **OFF | {"crop": 1})).astype(int)
        left, top = out[0, 0, :2]
        assert np.array_equal(out, np.asarray(image)[top : top + out.shape[0], left : left + out.shape[1]])
        kept.append((out.shape[1] / width, out.shape[0] / height))
        corners.append((left == 0, left + out.shape[1] == width))
    kept = np.array(kept)
    assert kept.min() >= 0.85 and kept.min(0).max() < 0.87 and kept.max(0).min() > 0.98
    assert abs(np.corrcoef(kept.T)[0, 1]) < 0.25  # width and height by themselves
    assert np.array(corners).any(0).all()  # and from either end


def test_jitter_stays_within_its_bounds():
    color = (180, 120, 90)
    hue, _, value = colorsys.rgb_to_hsv(*[c / 255 for c in color])
    flat = Image.new("RGB", (8, 8), color)

    def outputs(**only):
        strength = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0} | only
        results = [augment_reference(flat, rng, **OFF | {"jitter": 1} | strength) for rng in rngs(300)]
        return np.array([np.asarray(result)[0, 0] for result in results], float)

    plain = outputs()
    assert np.abs(plain - color).max() <= 2  # to HSV and back costs a level or two
    factors = outputs(brightness=0.2)[:, 0] / color[0]
    assert 0.78 < factors.min() < 0.82 and 1.18 < factors.max() < 1.22
    assert np.abs(outputs(contrast=0.2) - color).max() < 20  # a flat image has no contrast but to its own grey
    chroma = outputs(saturation=0.2)
    chroma = (chroma.max(1) - chroma.min(1)) / (180 - 90)
    assert 0.76 < chroma.min() < 0.84 and 1.16 < chroma.max() < 1.24
    turned = outputs(hue=0.02)
    shift = np.array([colorsys.rgb_to_hsv(*(row / 255))[0] for row in turned]) - hue
    shift = (shift + 0.5) % 1 - 0.5
    assert shift.min() > -0.024 and shift.max() < 0.024 and shift.min() < -0.01 and shift.max() > 0.01
    assert np.abs(turned.max(1) / 255 - value).max() < 0.01
    two = Image.fromarray(np.repeat([[[100] * 3, [200] * 3]], 4, axis=1).astype(np.uint8))
    strength = OFF | {"jitter": 1, "brightness": 0, "saturation": 0, "hue": 0}
    ranges = [np.ptp(np.asarray(augment_reference(two, rng, **strength)).astype(int)) / 100 for rng in rngs(200)]
    assert 0.78 < min(ranges) < 0.83 and 1.17 < max(ranges) < 1.22


def test_one_strength_does_not_change_the_other_draws():
    image = portrait()
    for k in range(20):
        with_crop = augment_reference(image, sample_rng(0, 0, k), rotate=0, jitter=0, crop=1)
        without = augment_reference(image, sample_rng(0, 0, k), rotate=0, jitter=0, crop=0)
        size = with_crop.size
        places = [(x, y) for x in range(61 - size[0]) for y in range(81 - size[1])]
        assert any(np.array_equal(without.crop((x, y, x + size[0], y + size[1])), with_crop) for x, y in places)
    with pytest.raises(UserError, match="blur"):
        augment_reference(image, sample_rng(0, 0, 0), blur=1)


def test_augmentation_is_a_function_of_seed_epoch_and_index_and_off_without_rng():
    image, seen = portrait(), set()
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (2, 3, 4)]:
        one, two = (reference_tensor(image, 64, 64, sample_rng(*key)) for _ in range(2))
        assert torch.equal(one, two) and one.shape == (3, 64, 64)
        seen.add(one.numpy().tobytes())
    assert len(seen) == 6
    plain = reference_tensor(image, 48, 96)
    assert torch.equal(plain, to_tensor(letterbox(image, 48, 96)))
    mirrored = reference_tensor(image, 48, 96, sample_rng(0, 0, 0), **OFF | {"flip": 1})
    assert torch.equal(mirrored, plain.flip(2)) and not torch.equal(mirrored, plain)


def test_cover_fills_the_frame_with_the_photos_middle():
    """No bars, and as much of the photo as fits: what LTX-Best-Face-ID was trained with."""
    photo = Image.new("RGB", (200, 100), (255, 0, 0))
    photo.paste((0, 255, 0), (50, 0, 150, 100))  # the middle square
    green = to_tensor(Image.new("RGB", (64, 64), (0, 255, 0)))
    covered = reference_tensor(photo, 64, 64, fit="cover")
    assert torch.equal(covered[:, :, 4:-4], green[:, :, 4:-4])
    assert (covered - green).abs().mean() < 0.05  # columns at the edge blend
    upright = reference_tensor(photo.transpose(Image.Transpose.ROTATE_90), 64, 64, fit="cover")
    assert torch.equal(upright[:, 4:-4], green[:, 4:-4])
    assert not torch.equal(reference_tensor(photo, 64, 64), covered)


def test_epoch_order_visits_each_once():
    orders = [epoch_order(50, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert len({order.tobytes() for order in orders}) == 4
    assert np.array_equal(epoch_order(50, 1, 0), orders[2])
    assert sample_rng(5, 0, 0).random() != np.random.default_rng(np.random.SeedSequence(5, spawn_key=(1, 0))).random()


# ---------------------------------------------------------------------------------------------------------------------
# The randomness of a sample


def draws(seed, number, grid=(5, 2, 3), channels=4, p_text=0.05, p_ref=0.2, window=2, noise_tokens=0):
    return draw_sample(seed, number, grid, channels, p_text, p_ref, window, noise_tokens)


@pytest.mark.parametrize(("seed", "number", "window", "tokens"), [(0, 0, 2, 0), (3, 17, 1, 2048), (7, 2**40, 9, 0)])
def test_draws_are_those_of_one_generator_in_this_order(seed, number, window, tokens):
    """Level, three uniform numbers, noise; a run that was begun with earlier code continues with the same numbers."""
    state = torch.get_rng_state()
    a = draws(seed, number, window=window, noise_tokens=tokens, p_text=0.5, p_ref=0.5)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    word = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(word // 2)
    assert a.t == shifted_logit_normal(1, tokens or 30, generator).item()
    text, ref, place = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    assert (a.drop_text, a.drop_ref) == (text < 0.5, ref < 0.5)
    assert a.window_start == math.floor(place * max(1, 5 - window + 1))
    assert torch.equal(a.eps, torch.randn(30, 4, generator=generator)) and a.eps.dtype == torch.float32


def test_every_window_fits_the_video_and_occurs():
    for window in range(1, 8):
        firsts = {draws(0, number, window=window).window_start for number in range(100)}
        assert firsts == set(range(max(1, 5 - window + 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Batches

BATCH = 6


@pytest.fixture(scope="module")
def clips(root, tmp_path_factory):
    """The clips of assets/ as a cache of several shards."""
    folder, assets = tmp_path_factory.mktemp("batches") / "cache", root / "assets"
    models = {"ckpt": assets / "tiny.safetensors", "gemma": assets / "gemma", "faces": assets / "faces"}
    prepare(assets / "clips" / "manifest.csv", out=folder, shard_gb=1e-4, **models)
    assert json.loads((folder / "cache.json").read_text())["shards"] > 1
    return CachedClips(folder)


def options(*changes):
    return read_config(
        None, [f"optim.batch={BATCH}", "parallel.micro_batch=2", "run.seed=3", "data.workers=0", *changes]
    )


def on_rank(rank, world, monkeypatch):
    monkeypatch.setattr(data.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(data.dist, "get_world_size", lambda: world)


def tensors(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in tensors(one)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_batches_are_those_of_a_plain_loop(rank, world, clips, monkeypatch):
    on_rank(rank, world, monkeypatch)
    batches = list(training_batches(options(), clips, 2, 4))
    numbers = []
    for step in (2, 3):
        whole = range(step * BATCH, (step + 1) * BATCH)
        dropped = [draws(3, n).drop_ref for n in whole]
        order = [n for drop in (False, True) for n, own in zip(whole, dropped) if own == drop]
        numbers += sorted(order[k] for k in range(rank, BATCH, world))
    assert [n for batch in batches for n in batch["numbers"]] == numbers
    assert all(len(batch["numbers"]) <= 2 for batch in batches)
    channels, frames, *sides = clips.buckets[0].latent_shape
    for batch in batches:
        assert set(batch) == {
            "latents", "ref_images", "e_ref", "features", "draws", "names", "numbers", "problems"
        }  # fmt: skip
        for k, n in enumerate(batch["numbers"]):
            epoch, place = divmod(n, len(clips))
            index = int(epoch_order(len(clips), 3, epoch)[place])
            clip = clips[index]
            assert (batch["names"][k], batch["problems"][k]) == (clip["name"], "")
            for key in ("latents", "e_ref", "features"):
                assert torch.equal(batch[key][k], clip[key])
            rng = sample_rng(3, epoch, index)
            size = clips.settings["height"], clips.settings["width"]
            assert torch.equal(batch["ref_images"][k], reference_tensor(clip["image"], *size, rng))
            same, own = draw_sample(3, n, (frames, *sides), channels, 0.05, 0.2, 2), batch["draws"][k]
            assert torch.equal(own.eps, same.eps) and own._replace(eps=None) == same._replace(eps=None)


def test_augmentation_and_noise_levels_are_those_of_the_config(clips, monkeypatch):
    on_rank(0, 1, monkeypatch)
    changes = ["optim.noise_tokens=2048", *(f"augment.{key}=0" for key in ("rotate", "crop", "jitter"))]
    (first, *_) = training_batches(options(*changes, "augment.flip=1"), clips, 0, 1)
    channels, *grid = clips.buckets[0].latent_shape
    size = clips.settings["height"], clips.settings["width"]
    for k, n in enumerate(first["numbers"]):
        image = clips[int(epoch_order(len(clips), 3, 0)[n])]["image"]
        assert torch.equal(first["ref_images"][k], to_tensor(letterbox(image, *size)).flip(2))
        assert first["draws"][k].t == draw_sample(3, n, tuple(grid), channels, 0, 0, 2, 2048).t


@pytest.mark.slow
def test_workers_change_nothing(clips, monkeypatch):
    on_rank(0, 1, monkeypatch)
    here, there = (list(training_batches(options(f"data.workers={w}"), clips, 0, 2)) for w in (0, 2))
    assert len(here) == len(there) == BATCH
    for a, b in zip(here, there):
        assert a["names"] == b["names"] and torch.equal(a["ref_images"], b["ref_images"])
        assert all(torch.equal(x.eps, y.eps) and x.t == y.t for x, y in zip(a["draws"], b["draws"], strict=True))
        assert all(torch.equal(x, y) for x, y in zip(a["features"], b["features"], strict=True))


def test_a_larger_batch_has_no_more_tensors(clips):
    """Each would be a file of its own between a worker and the training loop."""
    samples = TrainingClips(clips, options())
    few, many = (collate([samples[n] for n in range(size)]) for size in (1, 16))
    assert len(tensors(few)) == len(tensors(many)) == 5
    assert len(many["eps"]) == 16 and torch.equal(many["eps"][5], samples[5]["draws"].eps)


def test_a_jitter_of_strength_zero_leaves_the_photo_as_it_is():
    """Also its hue: on the way to HSV and back numbers are rounded."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    nothing = dict.fromkeys(("flip", "rotate", "crop", "brightness", "contrast", "saturation", "hue"), 0.0)
    for k in range(5):
        same = augment_reference(photo, np.random.default_rng(k), **nothing, jitter=1.0)
        assert np.array_equal(np.asarray(same), np.asarray(photo))

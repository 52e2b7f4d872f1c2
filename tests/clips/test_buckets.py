"""Each clip goes to the bucket that loses the least of it, whatever is odd about its file.

The rule is written here a second time (`rule`), over the true size and length of videos that are made here.
"""

import json
import math
import shutil
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_cache import draw, everything, rewrite
from test_face import build_detector, build_iresnet

import data
from clips.buckets import default_buckets, fitting, kept_area, read_bucket, window
from clips.cache import prepare
from clips.manifest import Clip, Rejected, read_manifest, read_window
from common.cache import CachedClips
from common.errors import UserError
from common.media import read_video, to_tensor, write_video
from config import read_config
from data import (
    TrainingClips,
    bucket_of_steps,
    check_cache_fits,
    draw_sample,
    letterbox,
    training_batches,
)
from vae import VideoVAE


def sizes(*triples):
    return [dict(zip(("height", "width", "frames"), triple)) for triple in triples]


def rule(buckets, width, height, frames, enlarge):
    """The bucket with the largest kept part of picture times frames, of equals the one with more pixels; or None."""
    best, most = None, (0, 0)
    for k, bucket in enumerate(buckets):
        scale = max(bucket["width"] / width, bucket["height"] / height)  # until the picture covers the bucket
        kept = bucket["width"] / (width * scale) * bucket["height"] / (height * scale)
        if scale <= enlarge and bucket["frames"] <= frames:
            score = round(kept * bucket["frames"], 9), bucket["width"] * bucket["height"]
            if score > most:
                best, most = k, score
    return best


SHAPES = (16, 9), (9, 16), (1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (4, 5), (21, 9)
RELEASED = default_buckets({"height": 480, "width": 832, "frames": 121}, (8, 32, 32))


def test_the_default_list():
    shapes = [(480, 832), (544, 736), (640, 640), (736, 544), (832, 480)]
    expected = [(*shape, frames) for frames in (121, 97, 49) for shape in shapes]
    assert [tuple(size.values()) for size in RELEASED] == expected
    for size, scale in (((64, 64, 17), (4, 8, 8)), ((64, 64, 17), (4, 16, 16)), ((512, 768, 97), (8, 32, 32))):
        buckets = default_buckets(sizes(size)[0], scale)
        assert buckets[0] == sizes(size)[0] and len({tuple(b.values()) for b in buckets}) == len(buckets)
        for b in buckets:
            assert b["frames"] % scale[0] == 1 and b["height"] % scale[1] == b["width"] % scale[2] == 0
            assert abs(b["height"] * b["width"] / (size[0] * size[1]) - 1) < (0.1 if scale[1] == 8 else 0.26)
        shares = [max(kept_area(b, width, height) for b in buckets) for width, height in SHAPES]
        assert np.mean(shares) > 0.9  # of the picture of any usual shape; one shape alone keeps 0.7
    assert {b["frames"] for b in default_buckets(sizes((32, 32, 1))[0], (8, 32, 32))} == {1}


def test_every_clip_goes_where_the_rule_says():
    rng = np.random.default_rng(0)
    lists = [RELEASED, RELEASED[::-1], sizes((64, 64, 9), (128, 128, 9), (64, 96, 25), (128, 192, 17), (320, 32, 33))]
    outcomes = set()
    for _ in range(1000):
        buckets, enlarge = lists[rng.integers(3)], float(rng.choice([1, 1.5, math.inf]))
        width, height, frames = int(2 ** rng.uniform(4, 12)), int(2 ** rng.uniform(4, 12)), int(rng.integers(0, 200))
        order = fitting(buckets, width, height, frames, enlarge)
        best = rule(buckets, width, height, frames, enlarge)
        assert (order[0] if order else None) == best
        for k in order:
            cut = Image.new("L", (width, height))
            scale = max(buckets[k]["width"] / cut.width, buckets[k]["height"] / cut.height)
            area = buckets[k]["width"] * buckets[k]["height"] / scale**2
            assert kept_area(buckets[k], width, height) == pytest.approx(area / (width * height))
        outcomes.add(best)
    assert None in outcomes and len(outcomes) > 12


def test_windows_follow_each_other_and_never_overlap():
    for frames in (0, 8, 9, 40, 121, 130, 241, 400):
        first, left = 0, frames
        for number in range(6):
            start, order = window(number, RELEASED, 1280, 720, frames, 1.5)
            best = rule(RELEASED, 1280, 720, left, 1.5)
            assert (order[0] if order else None) == best
            if best is None:
                break
            assert start == first
            first, left = first + RELEASED[best]["frames"], left - RELEASED[best]["frames"]
        assert left < 49 or number == 5


def test_a_bucket_on_the_command_line():
    assert read_bucket("480x832x121") == sizes((480, 832, 121))[0]
    for text in ("480x832", "480x832x121x1", "ax1x1", "-1x2x3", "1x2x9999999", "1 x2x3", "١x2x3", "1x2x3\n"):
        with pytest.raises(UserError, match="480x832x121"):
            read_bucket(text)


# ---------------------------------------------------------------------------------------------------------------------
# Faults of real video. Each maker writes a file and returns its true size, upright, and its length in seconds.

PLAIN = (np.indices((72, 128)).sum(0)[..., None] + np.zeros(3)).astype(np.uint8)  # 128 wide, 72 high


def encode(path, count, codec="libx264", rate=24, format="yuv420p", times=None, pixels=PLAIN, container=(), **options):
    with av.open(str(path), "w", options=dict(container)) as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], format
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(np.roll(pixels, k, 1), format="rgb24").reformat(format=format)
            if times:
                frame.pts, frame.time_base = times[k], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path, pixels.shape[1], pixels.shape[0], count / rate


def sideways(folder):
    path, width, height, seconds = encode(folder / "sideways.mp4", 40)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path, height, width, seconds


def variable_rate(folder):
    times = np.cumsum([0, *np.random.default_rng(0).choice([20, 40, 150], 39)]).tolist()
    path, width, height, _ = encode(folder / "variable.mkv", 40, times=times)
    return path, width, height, times[-1] / 1000


def odd(folder):
    pixels = np.zeros((97, 161, 3), np.uint8)
    return encode(folder / "odd.mkv", 40, "ffv1", format="bgr0", pixels=pixels)


def ten_bit(folder):
    return encode(folder / "ten.mkv", 30, "ffv1", format="yuv420p10le")


def alpha(folder):
    return encode(folder / "alpha.mov", 24, "png", format="rgba")


def interlaced(folder):
    return encode(folder / "interlaced.ts", 50, "mpeg2video", rate=25, flags="+ildct+ilme")


def no_length(folder):
    """As a live stream is written: the header says neither how long it is nor where a moment lies."""
    return encode(folder / "live.webm", 30, "libvpx-vp9", container={"live": "1"})


def no_times(folder):
    return encode(folder / "frames.avi", 45, "mpeg4", bf="2")


def late(folder):
    """The first frame is stamped 5 s."""
    times = (5000 + np.arange(40) * 1000 // 24).tolist()
    return encode(folder / "late.ts", 40, times=times)


def animation(folder):
    images = [Image.fromarray(np.roll(PLAIN, k, 1)) for k in range(20)]
    images[0].save(folder / "a.gif", save_all=True, append_images=images[1:], duration=100)
    return folder / "a.gif", 128, 72, 2.0


FAULTS = [sideways, variable_rate, odd, ten_bit, alpha, interlaced, no_length, no_times, late, animation]
SMALL = sizes(*((*shape, frames) for frames in (17, 13, 9) for shape in ((64, 64), (48, 88), (88, 48))))


@pytest.mark.parametrize("make", FAULTS, ids=lambda make: make.__name__)
def test_faults_of_real_video_are_bucketed_right(make, tmp_path):
    path, width, height, seconds = make(tmp_path)
    settings = {"buckets": SMALL, "enlarge": 1.5, "fps": 12.0}
    for end in (None, seconds - 0.3):
        length = end or seconds
        bucket, frames, source = read_window(Clip(line=1, video=path, end=end), settings)
        # the last frame's own duration is not known in every container, hence two answers at the edge of a bucket
        counts = {math.ceil((length + extra) * 12) for extra in (-0.06, -0.001, 0.05)}
        assert bucket in {rule(SMALL, width, height, count, 1.5) for count in counts}
        size = SMALL[bucket]
        assert frames.shape == (size["frames"], size["height"], size["width"], 3)
        truth = read_video(path, size["frames"], 12, size["height"], size["width"], 0.0, end)
        assert np.array_equal(frames, truth)
        assert (source["width"], source["height"]) == (width, height)
        assert source["seconds"] == pytest.approx(length, abs=0.1) or (source["seconds"] == 0 and make is no_length)


def test_stills_are_no_clips(tmp_path):
    settings = {"buckets": SMALL, "enlarge": 1.5, "fps": 12.0}
    Image.fromarray(PLAIN).save(tmp_path / "one.gif")
    Image.fromarray(PLAIN).save(tmp_path / "photo.jpg")
    one, *_ = encode(tmp_path / "one.mp4", 1)
    for path, says in ((tmp_path / "one.gif", "too short"), (one, "too short"), (tmp_path / "photo.jpg", "as a video")):
        with pytest.raises(UserError, match=says):
            read_window(Clip(line=1, video=path), settings)
        assert path.suffix == ".jpg" or read_window(Clip(line=1, video=path, window=1), settings) is None


def test_a_picture_too_small_for_all_buckets_is_left_out(tmp_path):
    path, *_ = encode(tmp_path / "small.mp4", 40, pixels=PLAIN[:32, :32])
    settings = {"buckets": SMALL, "enlarge": 1.5, "fps": 12.0}
    with pytest.raises(Rejected, match=r"small\.mp4 is 32x32, and --enlarge 1\.5") as caught:
        read_window(Clip(line=1, video=path), settings)
    assert caught.value.args[0] == "too small"
    assert read_window(Clip(line=1, video=path), settings | {"enlarge": 2.0})[0] == 0
    one_size = {"height": 96, "width": 96, "frames": 9, "fps": 12.0}  # as before there were buckets: no limit
    assert read_window(Clip(line=1, video=path), one_size)[1].shape == (9, 96, 96, 3)


# ---------------------------------------------------------------------------------------------------------------------
# A cache of several buckets

FILMS = [
    ((64, 64), 40),
    ((112, 64), 40),
    ((64, 112), 40),
    ((96, 64), 24),
    ((64, 64), 12),
    ((112, 64), 100),
]  # (w, h), n
FPS = 12


@pytest.fixture(scope="module")
def mixed(root, small, tmp_path_factory):
    """Options of `prepare` for films of several shapes and lengths at 12 fps, each frame of its own brightness."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("mixed")
    shutil.copytree(root / "assets" / "gemma", folder / "gemma")
    AutoTokenizer.from_pretrained(root / "assets" / "gemma", add_bos_token=True).save_pretrained(folder / "gemma")
    (folder / "pack").mkdir()
    build_detector(folder / "pack" / "det.onnx")
    build_iresnet(folder / "pack" / "rec.onnx")
    Image.fromarray(draw("grey", 0)).save(folder / "photo.png")
    rows = []
    for k, ((width, height), count) in enumerate(FILMS):
        pixels = np.broadcast_to(np.arange(count)[:, None, None, None] + 60, (count, height, width, 3)).astype(np.uint8)
        write_video(folder / f"{k}.mp4", pixels, FPS)
        rows.append({"video": f"{k}.mp4", "caption": f"Film {k}.", "reference": "photo.png"})
    (folder / "broken.mp4").write_bytes((folder / "0.mp4").read_bytes()[:600])
    rows.append({"video": "broken.mp4", "caption": "x", "reference": "photo.png"})
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {"ckpt": small, "gemma": folder / "gemma", "faces": folder / "pack"}
    return {"manifest": folder / "m.jsonl", "windows": 3, "shard_gb": 1e-3, "seed": 3} | models


@pytest.fixture(scope="module")
def cached(mixed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached") / "cache"
    prepare(out=folder, **mixed)
    return CachedClips(folder)


def test_windows_and_buckets_of_a_cache(cached, mixed):
    buckets, vae = cached.settings["buckets"], VideoVAE.from_checkpoint(mixed["ckpt"])
    expected = []  # (name, bucket, first frame)
    for line, ((width, height), count) in enumerate(FILMS, start=1):
        first = 0
        for number in range(3):
            if (best := rule(buckets, width, height, count - first, 1.5)) is None:
                break
            expected.append((f"{line - 1}:{line}" + (f".{number + 1}" if number else ""), best, first))
            first += buckets[best]["frames"]
    assert list(zip(cached.names, cached.bucket_of.tolist())) == [row[:2] for row in expected]
    assert len({row[1] for row in expected}) > 4 and len(expected) == 11
    rows = read_manifest(mixed["manifest"])
    for k, (name, number, first) in enumerate(expected):
        row, b = rows[int(name.split(":")[1].split(".")[0]) - 1], buckets[number]
        video = read_video(row.video, b["frames"], FPS, b["height"], b["width"], first / FPS)
        assert abs(video[0].mean() - 60 - first) < 4  # its frames say which they are
        pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(pixels)[0].bfloat16()
        torch.testing.assert_close(cached[k]["latents"], latents, rtol=2**-7, atol=1e-6)  # encoded in pieces, bf16
        assert cached[k]["caption"] == row.caption
        assert list(latents.shape) == b["latent_shape"]
    assert [(line["line"], line["reason"]) for line in cached.report] == [(7, "unreadable video")]  # once, of 3 windows
    assert cached.settings["rows_per_shard"] % 3 == 0 and cached.settings["shards"] > 1


def test_a_cache_is_of_its_buckets(cached, mixed, tmp_path):
    shutil.copytree(cached.folder, tmp_path / "c")
    for change in ({"windows": 2}, {"enlarge": 2.0}, {"buckets": sizes((64, 64, 17))}, {"height": 64, "windows": 1}):
        with pytest.raises(UserError, match="was begun with"):
            prepare(out=tmp_path / "c", **mixed | change)
    (tmp_path / "c" / "shard-00001.safetensors").unlink()
    prepare(out=tmp_path / "c", **mixed)
    assert everything(tmp_path / "c") == everything(cached.folder)
    with pytest.raises(UserError, match="one size"):
        prepare(out=tmp_path / "d", **mixed | {"height": 64, "buckets": sizes((64, 64, 17))})
    with pytest.raises(UserError, match="multiple of 8"):
        prepare(out=tmp_path / "d", **mixed | {"buckets": sizes((64, 64, 17), (64, 60, 17))})
    assert not (tmp_path / "d").exists()


def test_a_cache_of_one_size_has_the_fields_it_always_had(mixed, tmp_path):
    prepare(out=tmp_path / "c", **mixed | {"frames": 17, "windows": 1})
    fields = "height width frames fps reference require_face_in_video seed manifest manifest_sha256 latent_shape dtype"
    fields += " checkpoint gemma faces rows_per_shard shards"
    assert list(json.loads((tmp_path / "c" / "cache.json").read_text())) == fields.split()
    clips = CachedClips(tmp_path / "c")
    assert len(clips.buckets) == 1 and not clips.bucket_of.any()
    assert {line["reason"] for line in clips.report} == {"unreadable video", "too short"}


def test_clips_of_another_bucket_than_written_are_refused(cached, tmp_path):
    def elsewhere(metadata, bucket):
        return metadata | {"clips": [clip | {"bucket": bucket} for clip in metadata["clips"]]}

    for bucket in (1, 99):
        folder = tmp_path / str(bucket)
        shutil.copytree(cached.folder, folder)
        rewrite(folder / "shard-00000.safetensors", change_metadata=lambda m, b=bucket: elsewhere(m, b))
        with pytest.raises(UserError, match=r"cache\.json has latent_shape = .*and the clips have"):
            CachedClips(folder)


def test_a_reference_of_another_person_is_left_out(root, tmp_path, insightface_embeddings):
    clips = root / "assets" / "clips"
    pairs = [(0, 0), (1, 1), (0, 1), (1, 0)]
    rows = [f"{clips}/{video}.mp4,x,{clips}/{photo}.png" for video, photo in pairs]
    (tmp_path / "m.csv").write_text("\n".join(["video,caption,reference", *rows]))
    assets = root / "assets"
    models = {"ckpt": assets / "tiny.safetensors", "gemma": assets / "gemma", "faces": assets / "faces"}
    prepare(tmp_path / "m.csv", out=tmp_path / "c", min_similarity=0.4, **models)
    kept = CachedClips(tmp_path / "c")
    similarities = []
    for video, photo in pairs:
        frames = read_video(clips / f"{video}.mp4", 17, 12, 64, 64)[[0, 8, 16]]
        (e_ref,) = insightface_embeddings(np.asarray(Image.open(clips / f"{photo}.png").convert("RGB"))[None])
        found = [e for e in insightface_embeddings(frames) if e is not None]
        similarities.append(max(e @ e_ref / np.linalg.norm(e) / np.linalg.norm(e_ref) for e in found))
    assert kept.names == [f"{pairs[k][0]}:{k + 2}" for k in range(4) if similarities[k] >= 0.4] == ["0:2", "1:3"]
    assert [(line["line"], line["reason"]) for line in kept.report] == [(4, "another person"), (5, "another person")]
    for line, similarity in zip(kept.report, similarities[2:]):
        assert float(line["detail"].split()[-1]) == pytest.approx(similarity, abs=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# Batches

BATCH = 6


def on_rank(rank, ranks, monkeypatch):
    monkeypatch.setattr(data.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(data.dist, "get_world_size", lambda: ranks)


def options(*changes):
    few = [f"optim.batch={BATCH}", "parallel.micro_batch=2", "run.seed=3", "data.workers=0", "reference.augment=false"]
    return read_config(None, [*few, *changes])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_step_has_one_bucket_on_all_ranks(ranks, cached, monkeypatch):
    first, steps = 2, 9
    by_step, counts = [[] for _ in range(steps)], np.zeros((ranks, steps, 2), int)  # samples, dropped references
    for rank in range(ranks):
        on_rank(rank, ranks, monkeypatch)
        for batch in training_batches(options(), cached, first, steps):
            (step,) = {number // BATCH for number in batch["numbers"]}
            by_step[step].append(batch)
            counts[rank, step] += len(batch["numbers"]), sum(draw.drop_ref for draw in batch["draws"])
    assert (counts[:, first:, 0] == BATCH // ranks).all() and np.ptp(counts[..., 1], axis=0).max() <= 1
    shapes = set()
    for step in range(first, steps):
        assert sorted(n for batch in by_step[step] for n in batch["numbers"]) == [*range(step * 6, step * 6 + 6)]
        (number,) = {cached.bucket_of[cached.names.index(name)] for batch in by_step[step] for name in batch["names"]}
        bucket = cached.buckets[number]
        channels, *grid = bucket.latent_shape
        shapes.add(bucket.latent_shape)
        for batch in by_step[step]:
            assert batch["latents"].shape[1:] == bucket.latent_shape
            for k, (name, n) in enumerate(zip(batch["names"], batch["numbers"])):
                clip = cached[cached.names.index(name)]
                assert torch.equal(batch["latents"][k], clip["latents"])
                photo = to_tensor(letterbox(clip["image"], bucket.height, bucket.width))
                assert torch.equal(batch["ref_images"][k], photo)
                same = draw_sample(3, n, tuple(grid), channels, 0.05, 0.2, 2)
                assert batch["draws"][k].t == same.t and torch.equal(batch["draws"][k].eps, same.eps)
    assert len(shapes) > 2


def test_every_clip_is_trained_on_equally_often(cached):
    training, seen, steps = TrainingClips(cached, options()), np.zeros(len(cached), int), 400
    numbers = np.arange(steps * BATCH)
    for number in numbers:
        seen[training.place(int(number))[1]] += 1
    per_bucket = np.bincount(cached.bucket_of, seen)
    share = np.bincount(cached.bucket_of) / len(cached)
    assert np.abs(per_bucket - share * len(numbers)).max() <= 3 * BATCH
    for bucket in np.unique(cached.bucket_of):
        assert np.ptp(seen[cached.bucket_of == bucket]) <= 1
    there, back = ([training.place(n) for n in order] for order in (range(60), range(59, -1, -1)))
    assert there == back[::-1]  # a resumed run and any worker see the same


def test_steps_of_each_bucket_are_in_proportion_at_any_moment():
    clips = [50, 0, 900, 3, 47]
    order = bucket_of_steps(clips, 1, 20_000)
    assert order[:777] == bucket_of_steps(clips, 1, 777) and order != bucket_of_steps(clips, 2, 20_000)
    for steps in (100, 1000, 7777, 20_000):
        counts = np.bincount(order[:steps], minlength=5)
        assert counts[1] == 0 and np.abs(counts - np.array(clips) / 1000 * steps).max() < 4
    assert bucket_of_steps([7], 5, 50) == [0] * 50


def test_a_damaged_clip_has_zeros_of_its_bucket(cached, tmp_path):
    shutil.copytree(cached.folder, tmp_path / "c")
    rewrite(tmp_path / "c" / "shard-00001.safetensors", lambda t: t["0000003.latents"].fill_(math.nan))
    clips = CachedClips(tmp_path / "c")
    training, bad = TrainingClips(clips, options()), clips.names.index("1:2")
    number = next(n for n in range(1000) if training.place(n)[1] == bad)
    item = training[number]
    assert item["problem"] and not item["latents"].any()
    assert item["latents"].shape == clips.buckets[clips.bucket_of[bad]].latent_shape


def test_a_cache_of_buckets_beside_other_models(cached, mixed, small):
    from checkpoint import Checkpoint

    check_cache_fits(cached.settings, Checkpoint(small))
    buckets = cached.settings["buckets"]
    other = [*buckets[:-1], buckets[-1] | {"latent_shape": [16, 5, 8, 9]}]
    with pytest.raises(UserError, match="buckets"):
        check_cache_fits(cached.settings | {"buckets": other}, Checkpoint(small))

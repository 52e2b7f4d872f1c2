"""A cache that is killed, shared and resumed holds what the parts compute, and each bad row costs only itself.

The clips are red squares (the hand-made detector of test_face takes red for a face) on a ground whose color says whose
clip it is and whose brightness says which frame.
"""

import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_face import build_detector, build_iresnet

import data
from checkpoint import Checkpoint
from clips import cache, manifest
from clips.cache import prepare
from clips.manifest import crop_face, read_manifest
from common.cache import digest
from common.errors import UserError
from common.media import read_frame, read_image, read_video, to_tensor, write_video
from config import read_config
from data import (
    CachedClips,
    TrainingClips,
    check_cache_fits,
    collate,
    epoch_order,
    fingerprint,
    reference_tensor,
    sample_rng,
    training_batches,
    unpack,
)
from face import ArcFace, FaceDetector, align, recognition_file
from text import TextEncoder
from vae import VideoVAE

# ---------------------------------------------------------------------------------------------------------------------
# The cache

SIZE, FRAMES, FPS = 64, 17, 12
GROUNDS = {"green": (20, 120, 40), "blue": (20, 60, 130), "grey": (90, 90, 90)}


def draw(ground, number, face=True):
    pixels = np.full((SIZE, SIZE, 3), GROUNDS[ground], np.uint8) + np.uint8(number)
    if face:
        x = 8 * (number % 5)
        pixels[16:48, x : x + 32] = (255, 0, 0)
    return pixels


def film(path, ground, count=60, face=True, start=0):
    write_video(path, np.stack([draw(ground, start + k, face) for k in range(count)]), 30)


@pytest.fixture(scope="module")
def world(root, tmp_path_factory):
    """A folder with clips of every kind, a manifest, a pack of face models, a Gemma: what `prepare` takes."""
    folder = tmp_path_factory.mktemp("world")
    film(folder / "own.mp4", "green", 90)
    film(folder / "anna1.mp4", "green")
    film(folder / "anna2.mp4", "blue")
    film(folder / "faceless.mp4", "grey", face=False)
    film(folder / "short.mp4", "blue", 20)
    (folder / "corrupt.mp4").write_bytes((folder / "own.mp4").read_bytes()[:700])
    Image.fromarray(draw("grey", 0)).resize((96, 96), Image.Resampling.NEAREST).save(folder / "photo.png")
    Image.fromarray(draw("blue", 3)).save(folder / "photo.jpg", quality=95)
    Image.fromarray(draw("grey", 0, face=False)).save(folder / "wall.png")
    (folder / "zero.png").write_bytes(b"")
    rows = [
        {"video": "own.mp4", "caption": "A woman smiles.", "reference": "photo.png", "start": 1.2},
        {"video": "own.mp4", "caption": "The whole video, and a much longer caption than the other one has."},
        {"video": "corrupt.mp4", "caption": "x"},
        {"video": "own.mp4", "caption": "x", "reference": "zero.png"},
        "{ not json",
        {"video": "own.mp4", "caption": "  "},
        {"video": "anna1.mp4", "caption": "Anna turns.", "identity": "anna"},
        {"video": "anna2.mp4", "caption": "Anna again.", "identity": "anna"},
        {"video": "short.mp4", "caption": "x", "reference": "photo.png"},
        {"video": "own.mp4", "caption": "x", "reference": "wall.png"},
        {"video": "faceless.mp4", "caption": "An empty room.", "reference": "photo.jpg"},
        {"video": "faceless.mp4", "caption": "x"},
        {"video": "anna2.mp4", "caption": "Ünal, from a box.", "reference_video": "own.mp4", "reference_time": 0.51,
         "reference_box": [0.125, 0.25, 0.625, 0.75]},
        {"video": "own.mp4", "caption": "Bob alone.", "identity": "bob", "start": 0.5, "end": 2.5},
    ]  # fmt: skip
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "clips.jsonl").write_text(text + "\n")
    (folder / "pack").mkdir()
    build_detector(folder / "pack" / "det.onnx")
    build_iresnet(folder / "pack" / "rec.onnx")
    from transformers import AutoTokenizer

    shutil.copytree(root / "assets" / "gemma", folder / "gemma")
    AutoTokenizer.from_pretrained(root / "assets" / "gemma", add_bos_token=True).save_pretrained(folder / "gemma")
    return folder


SHARD_GB = 4e-3 / 4  # 3 rows a shard


@pytest.fixture(scope="module")
def options(small, world):
    return {
        "manifest": world / "clips.jsonl",
        "ckpt": small,
        "gemma": world / "gemma",
        "faces": world / "pack",
        "height": SIZE,
        "width": SIZE,
        "frames": FRAMES,
        "fps": FPS,
        "shard_gb": SHARD_GB,
        "seed": 3,
    }


@pytest.fixture(scope="module")
def made(options, world):
    prepare(out=world / "cache", **options)
    return world / "cache"


def everything(folder):
    """Names and bytes of all files, also of those that should not be there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))}


def test_each_bad_row_is_reported_with_file_and_line_and_loses_nothing_else(made, world):
    report = [json.loads(line) for line in (made / "report.jsonl").read_text().splitlines()]
    assert {line["manifest"] for line in report} == {"clips.jsonl"}
    reasons = {line["line"]: line["reason"] for line in report if "reason" in line}
    assert reasons == {
        3: "unreadable video",
        4: "unreadable reference",
        5: "bad row",
        6: "empty caption",
        9: "too short",
        10: "no face in the reference",
        12: "no face in the reference",
    }
    details = {line["line"]: line["detail"] for line in report if "reason" in line}
    for line, said in {
        3: "corrupt.mp4",
        4: "zero.png",
        5: "Invalid JSON",
        9: "short.mp4 is too short: 0.67",
        10: "wall.png",
    }.items():
        assert said in details[line]
    notes = {line["line"]: line["note"] for line in report if "note" in line}
    assert notes.keys() == {14} and "'bob'" in notes[14]  # no other clip; line 2 names no identity
    clips = CachedClips(made)
    assert clips.names == ["own:1", "own:2", "anna1:7", "anna2:8", "faceless:11", "anna2:13", "own:14"]
    assert sorted(path.name for path in made.iterdir()) == [
        "cache.json", "null.safetensors", "report.jsonl", *(f"shard-{k:05d}.safetensors" for k in range(5))
    ]  # fmt: skip


def test_contents_are_what_the_parts_compute(made, options, world):
    clips, rows = CachedClips(made), read_manifest(world / "clips.jsonl")
    vae = VideoVAE.from_checkpoint(options["ckpt"])
    encoder = TextEncoder.from_checkpoint(options["ckpt"], options["gemma"])
    detector, arcface = FaceDetector(world / "pack"), ArcFace.from_onnx(recognition_file(world / "pack"))
    assert clips.buckets[0].latent_shape == (16, 5, 8, 8) and len(clips) == 7
    assert {key: clips.settings[key] for key in ("height", "width", "frames", "fps", "max_tokens")} == {
        "height": SIZE, "width": SIZE, "frames": FRAMES, "fps": FPS, "max_tokens": 48
    }  # fmt: skip
    assert torch.equal(clips.null_features, encoder.features([""])[0].bfloat16()) and len(clips.null_features) == 1
    crops_and_embeddings = []
    for i, name in enumerate(clips.names):
        item, row = clips[i], rows[int(name.split(":")[1]) - 1]
        assert item["name"] == name and item["caption"] == row.caption
        video = read_video(row.video, FRAMES, FPS, SIZE, SIZE, row.start)
        pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(pixels)[0].bfloat16()
        assert item["latents"].dtype == torch.bfloat16 and torch.equal(item["latents"], latents)
        features = encoder.features([row.caption])[0].bfloat16()
        assert item["features"].dtype == torch.bfloat16 and torch.equal(item["features"], features)
        x = to_tensor(item["image"])[None]
        landmarks, _, valid = detector.detect(x)
        crop = align(x, landmarks)
        e_ref = arcface(crop)[0]
        crops_and_embeddings.append((crop.numpy().tobytes(), e_ref.numpy().tobytes()))
        assert valid.all() and item["e_ref"].dtype == torch.float32 and torch.equal(item["e_ref"], e_ref)
    distinct = [len(set(parts)) for parts in zip(*crops_and_embeddings)]
    assert distinct[0] == distinct[1] > 3  # another face in the crop is another embedding
    assert np.array_equal(clips[0]["image"], read_image(world / "photo.png"))
    assert np.array_equal(clips[4]["image"], read_image(world / "photo.jpg"))
    assert not torch.equal(clips[0]["latents"], clips[1]["latents"])  # the same video from another time on


def test_references_are_cut_from_the_right_video(made, options, world, tmp_path):
    clips = CachedClips(made)
    videos = {name: [np.asarray(read_frame(world / f"{name}.mp4", k / 30)) for k in range(count)]
              for name, count in (("own", 90), ("anna1", 60), ("anna2", 60))}  # fmt: skip

    def frame_of(clip, video):
        """Numbers of the frames that hold the image as it is, anywhere."""
        image = np.asarray(clip["image"])
        height, width, _ = image.shape
        assert height == width > 20
        row = image[:1].transpose(2, 0, 1)  # (3, 1, w)
        found = []
        for k, frame in enumerate(videos[video]):
            places = np.lib.stride_tricks.sliding_window_view(frame, (1, width), (0, 1))  # (y, x, 3, 1, w)
            corners = np.argwhere((places == row).all((2, 3, 4)))  # where the first row fits
            found += [k] * any(np.array_equal(frame[y : y + height, x : x + width], image) for y, x in corners)
        return found

    assert frame_of(clips[2], "anna2") and not frame_of(clips[2], "anna1")  # the other clip of the identity
    assert frame_of(clips[3], "anna1") and not frame_of(clips[3], "anna2")
    assert frame_of(clips[1], "own")  # no identity: the same video
    assert all(15 <= k < 75 for k in frame_of(clips[6], "own")) and frame_of(clips[6], "own")  # from start to end
    # box 8..40 x 16..48 of frame 15 (0.51 s at 30 fps), margin 1.6: 51 pixels square around (24, 32), moved in
    assert np.array_equal(clips[5]["image"], read_frame(world / "own.mp4", 15 / 30).crop((0, 6, 51, 57)))

    same = CachedClips(prepared(tmp_path / "same", options, reference="same"))
    assert frame_of(same[2], "anna1") and not frame_of(same[2], "anna2")
    assert same.names == clips.names and not any("note" in line for line in same.report)
    seeded = CachedClips(prepared(tmp_path / "seed", options, reference="same", seed=4))
    picked = [[frame_of(c[k], name) for c in (same, seeded)] for k, name in ((1, "own"), (2, "anna1"), (3, "anna2"))]
    assert any(a != b for a, b in picked)


def prepared(folder, options, **changes):
    prepare(out=folder, **options | changes)
    return folder


def test_crop_face_is_a_square_inside_the_image():
    image = Image.fromarray(np.arange(100 * 80 * 3).reshape(80, 100, 3).astype(np.uint8))  # 100 wide, 80 high
    for box, corners in [
        ((40, 30, 60, 50), (34, 24, 66, 56)),
        ((40, 35, 60, 45), (34, 24, 66, 56)),
        ((0, 0, 20, 20), (0, 0, 32, 32)),  # moved in
        ((-10, 70, 10, 90), (0, 48, 32, 80)),
        ((10, 0, 80, 80), (0, 0, 100, 80)),  # larger than the image
    ]:
        assert np.array_equal(crop_face(image, np.array(box, float)), image.crop(corners)), box


def test_faces_can_be_required_in_the_video(options, tmp_path):
    report = CachedClips(prepared(tmp_path / "c", options, require_face_in_video=True)).report
    reasons = {line["line"]: line["reason"] for line in report if "reason" in line}
    assert reasons[11] == reasons[12] == "no face in the video" and 1 not in reasons


def test_large_references_are_reduced(options, world, tmp_path):
    (tmp_path / "m.csv").write_text(f"video,caption,reference\n{world / 'own.mp4'},x,large.png\n")
    Image.fromarray(draw("blue", 3)).resize((1500, 1500), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    assert CachedClips(prepared(tmp_path / "c", options, manifest=tmp_path / "m.csv"))[0]["image"].size == (1024, 1024)


def test_dataset_in_workers_and_epochs(made):
    clips = CachedClips(made)
    training = TrainingClips(clips, read_config(None, ["run.seed=5"]))
    counts = list(range(11))
    alone = [unpack(collate([training[count]])) for count in counts]
    loader = torch.utils.data.DataLoader(training, sampler=counts, batch_size=3, num_workers=2, collate_fn=collate)
    batches = [unpack(batch) for batch in loader]
    assert [name for batch in batches for name in batch["names"]] == [batch["names"][0] for batch in alone]
    for key in ("latents", "ref_images", "e_ref"):
        assert torch.equal(torch.cat([batch[key] for batch in batches]), torch.cat([batch[key] for batch in alone]))
    for a, b in zip((f for batch in batches for f in batch["features"]), (batch["features"][0] for batch in alone)):
        assert torch.equal(a, b)
    assert [count for batch in batches for count in batch["numbers"]] == counts
    first = batches[0]
    assert first["latents"].shape == (3, 16, 5, 8, 8) and first["latents"].dtype == torch.bfloat16
    assert first["ref_images"].shape == (3, 3, SIZE, SIZE) and first["e_ref"].shape == (3, 16)
    names = [batch["names"][0] for batch in alone]
    assert sorted(names[:7]) == sorted(clips.names) and set(names[7:]) <= set(clips.names)
    assert names[7:] == [clips.names[k] for k in epoch_order(7, 5, 1)[:4]]
    index = int(epoch_order(7, 5, 1)[0])
    again = reference_tensor(clips[index]["image"], SIZE, SIZE, sample_rng(5, 1, index))
    assert torch.equal(alone[7]["ref_images"][0], again)
    plain = TrainingClips(clips, read_config(None, ["run.seed=5", "reference.augment=false"]))[7]
    assert torch.equal(plain["ref_image"], reference_tensor(clips[index]["image"], SIZE, SIZE))
    assert pickle.loads(pickle.dumps(clips)).names == clips.names
    with pytest.raises(IndexError):
        clips[7]
    item = clips[0]["latents"]
    assert item.untyped_storage().nbytes() == item.nbytes  # a view of the shard would be sent whole by a worker


def test_damaged_caches_say_what_to_run(made, tmp_path):
    with pytest.raises(UserError, match=r"no cache in .*prepare\.py"):
        CachedClips(tmp_path)

    def spoil(name, change):
        folder = tmp_path / name
        shutil.copytree(made, folder)
        change(folder)
        with pytest.raises(UserError, match=rf"{name}.*prepare") as caught:
            CachedClips(folder)
        return str(caught.value)

    shard = "shard-00002.safetensors"
    assert shard in spoil("gone", lambda folder: (folder / shard).unlink())
    data = (made / shard).read_bytes()
    assert shard in spoil("cut", lambda folder: (folder / shard).write_bytes(data[:-5]))
    assert "null" in spoil("null", lambda folder: (folder / "null.safetensors").unlink())
    changed = (made / "cache.json").read_text().replace('"seed": 3', '"seed": 4')
    assert "shard-00000" in spoil("other", lambda folder: (folder / "cache.json").write_text(changed))
    with pytest.raises(UserError, match=r"cache\.json is damaged"):
        (tmp_path / "cache.json").write_text("{")
        CachedClips(tmp_path)


def test_cache_json_of_another_form_is_one_line(made, tmp_path):
    """Every field that reading needs, broken in several ways; a value of the right type but not this cache's, too."""
    good = json.loads((made / "cache.json").read_text())
    whole = [b"", b"{", b"[1]", b"null", b"5", b"{}", b"[" * 100_000, b'{"height":' * 50_000, b"\xff\xfe{}"]
    texts = [(text, r"cache\.json is damaged") for text in whole]
    for key in ("height", "width", "frames", "fps", "shards", "rows_per_shard", "latent_shape"):
        for bad in ("x", -1, 0, None, [], 10**30, True, "\ud800"):
            texts.append((json.dumps(good | {key: bad}).encode(), r"cache\.json is damaged"))
        texts.append((json.dumps({k: v for k, v in good.items() if k != key}).encode(), f"{key} is missing"))
    texts += [(json.dumps(good | {key: 5}).encode(), "is damaged") for key in ("checkpoint", "gemma", "faces")]
    texts += [(json.dumps(good | {"shards": 10**9}).encode(), "not complete")]
    texts += [(json.dumps(good | {"latent_shape": [16, 5, 8, 9]}).encode(), "not complete")]
    shutil.copytree(made, tmp_path / "cache")
    for text, said in texts:
        (tmp_path / "cache" / "cache.json").write_bytes(text)
        with pytest.raises(UserError, match=said) as caught:
            CachedClips(tmp_path / "cache")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    (tmp_path / "cache" / "cache.json").unlink()
    os.mkfifo(tmp_path / "cache" / "cache.json")  # would be waited for
    with pytest.raises(UserError, match="no file"):
        CachedClips(tmp_path / "cache")


def rewrite(file, change_tensors=lambda tensors: None, change_metadata=lambda metadata: None):
    """A file of a cache with other contents under the same name."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["cache"])
    change_tensors(tensors)
    metadata = change_metadata(metadata) or metadata
    file.unlink()
    save_file(tensors, file, {"cache": metadata if isinstance(metadata, str) else json.dumps(metadata)})


def test_metadata_of_another_form_is_a_damaged_file(made, tmp_path):
    def clips_of(value):
        return lambda metadata: metadata | {"clips": value}

    good = {"row": 0, "name": "own:1"}
    changes = [lambda _: "{", lambda _: "[]", lambda _: "[" * 100_000, lambda m: m | {"report": 5}]
    changes += [
        clips_of(bad) for bad in (5, ["a"], [{"row": "0", "name": "x"}], [{"row": -1, "name": "x"}], [{"row": 0}])
    ]
    changes += [clips_of([good, {"row": 99, "name": "x"}]), lambda m: {k: v for k, v in m.items() if k != "clips"}]
    changes += [lambda m: m | {"settings": "0" * 16}, lambda m: m | {"more": 1}]
    for k, change in enumerate(changes):
        shutil.copytree(made, tmp_path / str(k))
        rewrite(tmp_path / str(k) / "shard-00000.safetensors", change_metadata=change)
        with pytest.raises(UserError, match=r"not complete: shard-00000\.safetensors"):
            CachedClips(tmp_path / str(k))
    for k, bad in enumerate(("x", 0, -1, 10**10, None, 1.5)):
        shutil.copytree(made, tmp_path / f"null{k}")
        rewrite(tmp_path / f"null{k}" / "null.safetensors", change_metadata=lambda m, bad=bad: m | {"max_tokens": bad})
        with pytest.raises(UserError, match=r"not complete: null\.safetensors"):
            CachedClips(tmp_path / f"null{k}")
    shutil.copytree(made, tmp_path / "nan")
    rewrite(tmp_path / "nan" / "null.safetensors", lambda tensors: tensors["features"].fill_(math.nan))
    with pytest.raises(UserError, match=r"null\.safetensors holds numbers that are not finite"):
        CachedClips(tmp_path / "nan")


def test_a_shape_that_the_clips_do_not_have(made, tmp_path):
    """With every file's digest changed along: or zeros of that size would stand in for each clip."""
    for k, shape in enumerate(([16, 5, 8, 9], [16, 10**6, 10**6, 10**6])):
        folder = tmp_path / str(k)
        shutil.copytree(made, folder)
        settings = json.loads((folder / "cache.json").read_text()) | {"latent_shape": shape}
        (folder / "cache.json").write_text(json.dumps(settings))
        for file in folder.glob("*.safetensors"):
            rewrite(file, change_metadata=lambda m, settings=settings: m | {"settings": digest(settings)})
        with pytest.raises(UserError, match=r"latent_shape = .*and the clips have \(16, 5, 8, 8\)"):
            CachedClips(folder)


def poisoned(name, part, change):
    return pytest.param(part, change, id=f"{part}-{name}")


def put(value):
    """One number in the middle of a tensor."""

    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


POISONS = [poisoned(str(value), part, put(value)) for part in ("latents", "features", "e_ref")
           for value in (math.nan, math.inf, -math.inf, 3e38)]  # fmt: skip
POISONS += [poisoned("int", part, lambda t: t.int()) for part in ("latents", "features", "e_ref")]
POISONS += [poisoned("cut", part, lambda t: t[..., :-1].contiguous()) for part in ("latents", "features", "e_ref")]
POISONS += [
    poisoned("empty", "features", lambda t: t[:0]),
    poisoned("long", "features", lambda t: t.repeat(50, 1)),
    poisoned("flat", "features", lambda t: t.flatten()),
    poisoned("no-number", "features", lambda t: torch.tensor(1.0)),
    poisoned("zeros", "image", torch.zeros_like),
    poisoned("half", "image", lambda t: t[: len(t) // 2].clone()),
    poisoned("empty", "image", lambda t: t[:0]),
    poisoned("checksum", "image", lambda t: torch.cat([t[:60], 255 - t[60:70], t[70:]])),
    poisoned("bomb", "image", lambda _: png(Image.new("1", (20_000, 20_000)))),
    poisoned("jpeg", "image", lambda _: torch.frombuffer(bytearray(b"\xff\xd8\xff\xe0JFIF"), dtype=torch.uint8)),
    poisoned("latin", "caption", lambda _: torch.tensor([0xE9], dtype=torch.uint8)),
]


@pytest.mark.parametrize(("part", "change"), POISONS)
def test_a_damaged_clip_is_named_and_costs_itself(part, change, made, tmp_path, monkeypatch):
    """In training zeros stand in for it, so that every rank has as many samples as before; the others are untouched."""
    folder = tmp_path / "cache"
    shutil.copytree(made, folder)

    def poison(tensors):
        tensors[f"0000006.{part}"] = change(tensors[f"0000006.{part}"])

    rewrite(folder / "shard-00002.safetensors", poison)
    clips, before = CachedClips(folder), CachedClips(made)
    with pytest.raises(UserError, match=rf"clip anna1:7 in .*: its {part} is damaged") as caught:
        clips[2]
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(data.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(data.dist, "get_world_size", lambda: 1)
    config = read_config(None, ["optim.batch=7", "parallel.micro_batch=7", "data.workers=0"])
    (batch,), (good,) = (list(training_batches(config, c, 0, 1)) for c in (clips, before))
    assert batch["names"] == good["names"] and sorted(batch["numbers"]) == list(range(7))
    for k, name in enumerate(batch["names"]):
        if name == "anna1:7":
            assert batch["problems"][k] == str(caught.value)
            assert not batch["latents"][k].any() and not batch["e_ref"][k].any()
            assert torch.equal(batch["features"][k], clips.null_features)
        else:
            assert not batch["problems"][k]
            for key in ("latents", "ref_images", "e_ref", "features"):
                assert torch.equal(batch[key][k], good[key][k])
        assert torch.equal(batch["draws"][k].eps, good["draws"][k].eps)


def test_a_cache_of_other_models_is_refused(made, options, world, tmp_path):
    """What a run has is compared with what the cache was made with; a Gemma that is no folder here is not."""
    settings, checkpoint = CachedClips(made).settings, Checkpoint(options["ckpt"])
    check_cache_fits(settings, checkpoint)
    check_cache_fits(settings, checkpoint, "google/gemma", world / "pack")
    check_cache_fits(settings, checkpoint, world / "gemma", world / "pack")
    changed, name = bytearray(options["ckpt"].read_bytes()), "vae.encoder.conv_in.conv.weight"
    changed[checkpoint.places[name][1]] ^= 1
    (tmp_path / "other.safetensors").write_bytes(changed)
    shutil.copytree(world / "gemma", tmp_path / "gemma")
    (tmp_path / "gemma" / "more.json").write_text("{}")
    shutil.copytree(world / "pack", tmp_path / "pack")
    build_iresnet(tmp_path / "pack" / "extra.onnx")
    for said, change in [
        ("checkpoint", {"checkpoint": Checkpoint(tmp_path / "other.safetensors")}),
        ("gemma", {"gemma": tmp_path / "gemma"}),
        ("faces", {"faces": tmp_path / "pack"}),
        ("latent_shape", {"settings": settings | {"height": 128}}),
    ]:
        with pytest.raises(UserError, match=rf"the cache was begun with {said} = .*make another cache"):
            check_cache_fits(**{"settings": settings, "checkpoint": checkpoint} | change)


def test_whatever_a_row_brings_about_costs_this_row(options, world, tmp_path, monkeypatch):
    """Exceptions of every kind while a row is read, and numbers that are not finite, beside rows that are fine."""
    names = [
        "own",
        "KeyError",
        "MemoryError",
        "UnicodeDecodeError",
        "RuntimeError",
        "latents",
        "e_ref",
        "caption",
        "last",
    ]
    rows = [
        {"video": f"{name}.mp4", "caption": f"Clip {name}.", "reference": str(world / "photo.png")} for name in names
    ]
    for name in names:
        shutil.copy(world / "own.mp4", tmp_path / f"{name}.mp4")
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    errors = {"KeyError": KeyError("x"), "MemoryError": MemoryError(), "RuntimeError": RuntimeError("odd"),
              "UnicodeDecodeError": UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad title")}  # fmt: skip
    real_read, real_encode, real_features = manifest.read_video, VideoVAE.encode, TextEncoder.features
    real_embed, order = cache.embed, iter(["own", "latents", "e_ref", "last"])  # rows whose pixels can be read
    current = []

    def read(path, *size):
        if path.stem in errors:
            raise errors[path.stem]
        return real_read(path, *size)

    def encode(self, video, chunk):
        current[:] = [next(order)]
        return real_encode(self, video, chunk) * (math.nan if current == ["latents"] else 1)

    def embed(*arguments):
        return real_embed(*arguments) * (math.inf if current == ["e_ref"] else 1)

    def features(self, prompts):
        return [f * (math.nan if prompts == ["Clip caption."] else 1) for f in real_features(self, prompts)]

    monkeypatch.setattr(manifest, "read_video", read)
    monkeypatch.setattr(VideoVAE, "encode", encode)
    monkeypatch.setattr(cache, "embed", embed)
    monkeypatch.setattr(TextEncoder, "features", features)
    prepare(out=tmp_path / "c", **options | {"manifest": tmp_path / "m.jsonl"})
    clips = CachedClips(tmp_path / "c")
    assert clips.names == ["own:1", "last:9"]
    reasons = {line["line"]: (line["reason"], line["detail"]) for line in clips.report}
    assert [reasons[k][0] for k in (2, 3, 4, 5)] == ["cannot be read"] * 4
    assert all(name in reasons[k][1] for k, name in enumerate(names[1:5], start=2))
    assert [reasons[k][0] for k in (6, 7)] == ["numbers that are not finite"] * 2
    assert "latents of" in reasons[6][1] and "e_ref of" in reasons[7][1]
    assert reasons[8][0] == "unreadable caption" and "not finite" in reasons[8][1]


def test_a_text_encoder_that_makes_no_numbers_ends_at_once(options, tmp_path, monkeypatch):
    real = TextEncoder.features
    monkeypatch.setattr(TextEncoder, "features", lambda self, prompts: [f * math.nan for f in real(self, prompts)])
    with pytest.raises(UserError, match="Gemma or its projection"):
        prepare(out=tmp_path / "c", **options)
    assert not list((tmp_path / "c").glob("*.safetensors"))


def test_a_damaged_shard_is_made_again(made, options, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(made, folder)
    (folder / "shard-00001.safetensors").write_bytes(b"\0" * 50)
    (folder / "shard-00003.safetensors").unlink()
    (folder / ".shard-00003.99.part.safetensors").write_bytes(b"left over")
    (folder / "text-00000.safetensors").write_bytes(b"left over")
    prepare(out=folder, **options)
    assert everything(folder) == everything(made)


def test_other_settings_are_refused(made, options, world, tmp_path):
    before = everything(made)
    other = tmp_path / "clips.jsonl"
    other.write_text((world / "clips.jsonl").read_text() + "\n")
    shutil.copytree(world / "pack", tmp_path / "pack")
    build_iresnet(tmp_path / "pack" / "extra.onnx")
    for change, said in [
        ({"height": 128}, "height = 64 and this run has 128"),
        ({"fps": 24}, "fps = 12.0 and this run has 24.0"),
        ({"frames": 13}, "frames"),
        ({"reference": "same"}, "reference = other and this run has same"),
        ({"seed": 4}, "seed"),
        ({"shard_gb": 1}, "rows_per_shard"),
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"manifest": other}, "manifest_sha256"),
        ({"faces": tmp_path / "pack"}, "faces"),
    ]:
        with pytest.raises(UserError, match=rf"{made} was begun with {said}"):
            prepare(out=made, **options | change)
    assert everything(made) == before


def test_fingerprint_is_of_vae_and_projection(options, tmp_path):
    """A fine-tuned DiT fits the same cache; another VAE or text projection does not."""
    checkpoint = Checkpoint(options["ckpt"])
    data, print_ = bytearray(options["ckpt"].read_bytes()), fingerprint(checkpoint)
    for name, same in [
        ("model.diffusion_model.proj_out.weight", True),
        ("vae.encoder.conv_in.conv.weight", False),
        ("vae.per_channel_statistics.std-of-means", False),
        ("text_embedding_projection.video_aggregate_embed.bias", False),
    ]:
        at = checkpoint.places[name][1]
        (tmp_path / "c.safetensors").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert (fingerprint(Checkpoint(tmp_path / "c.safetensors")) == print_) is same, name


def test_sizes_that_the_vae_cannot_take(options, tmp_path):
    for change, said in [
        ({"height": 60}, r"--height 60 is not a multiple of 8: the nearest are 56 and 64"),
        ({"frames": 16}, r"--frames 16 is not 4k\+1: the nearest are 13 and 17"),
        ({"width": 0}, "--width 0"),
        ({"fps": 0}, "fps = 0.0"),
        ({"height": 8 * 10**9}, "--height 8000000000 is above 1,000,000"),
        ({"height": 800_000, "width": 800_000}, r"17 frames of 800000x800000: at least .* TiB"),
    ]:
        with pytest.raises(UserError, match=said):
            prepare(out=tmp_path / "c", **options | change)
    assert not (tmp_path / "c").exists()


def test_nothing_usable(options, world, tmp_path):
    Image.new("RGB", (3, 2000), "red").save(tmp_path / "strip.png")
    rows = ["video,caption,reference", "missing.mp4,x,", f"{world / 'own.mp4'},,", f"{world / 'own.mp4'},x,strip.png"]
    (tmp_path / "m.csv").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"none of the 3 clips can be used.*report\.jsonl"):
        prepare(out=tmp_path / "c", **options | {"manifest": tmp_path / "m.csv"})
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["report.jsonl"]  # mended rows are tried again
    with pytest.raises(UserError, match=r"holds no clip.*report\.jsonl"):
        CachedClips(tmp_path / "c")


# ---------------------------------------------------------------------------------------------------------------------
# The command: killed, shared


def command(root, options, folder):
    arguments = [sys.executable, str(root / "prepare.py"), "--out", str(folder)]
    for key, value in options.items():
        arguments += [f"--{key.replace('_', '-')}", str(value)]
    return arguments


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""} | more


@pytest.mark.slow
def test_two_ranks_make_the_same_cache_as_one(made, options, root, tmp_path):
    """At the same time, in one folder, with a third rank's shards left to be made by one process."""
    folder = tmp_path / "cache"
    start = command(root, options, folder)
    ranks = [
        subprocess.Popen(start, env=environment(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank)))
        for rank in range(2)
    ]
    assert [process.wait(1800) for process in ranks] == [0, 0]
    there = {path.name for path in folder.glob("shard-*")}
    assert there == {f"shard-{k:05d}.safetensors" for k in (0, 1, 3, 4)} and not (folder / "report.jsonl").exists()
    with pytest.raises(UserError, match="not complete"):
        CachedClips(folder)
    prepare(out=folder, **options)
    assert everything(folder) == everything(made)


@pytest.mark.slow
def test_killed_command_completes_when_run_again(made, options, root, tmp_path):
    folder = tmp_path / "cache"
    process = subprocess.Popen(command(root, options, folder), env=environment(), stderr=subprocess.DEVNULL)
    while not (folder / "shard-00000.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (folder / "report.jsonl").exists()
    done = subprocess.run(command(root, options, folder), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "7 clips of 14 rows" in done.stdout and "left out, bad row: 1" in done.stdout
    estimate = (
        r"videos: [\d.]+ [KM]iB and [\d.]+ s a clip; this process's \d+ will take about [\d.]+ [KM]iB and [\d.]+ \w+"
    )
    assert re.search(estimate, done.stderr + done.stdout)
    assert everything(folder) == everything(made)


KILLER = """
    # Forks a process per life out of one that has imported everything; each is killed in the middle of its work.
    import os, pathlib, random, signal, sys, threading
    sys.path.insert(0, sys.argv[1])
    import insightface.app, torch, transformers  # noqa
    from clips import cache
    options, folder, dice = eval(sys.argv[2]), sys.argv[3], random.Random(int(sys.argv[4]))

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(owner, name, fatal):
        # dies at the fatal-th change of a folder: before it when fatal is odd, after it when even
        real = getattr(owner, name)
        def hooked(*args, **kwargs):
            count[0] += 1
            if count[0] == (fatal + 1) // 2 and fatal % 2:
                die()
            result = real(*args, **kwargs)
            if count[0] == (fatal + 1) // 2:
                die()
            return result
        setattr(owner, name, hooked)

    for life in range(60):
        fatal, delay = (dice.randint(1, 20), None) if life % 3 else (0, dice.uniform(0.05, 1.2))
        if (pid := os.fork()) == 0:
            torch.set_num_threads(2)
            sys.stdout = sys.stderr = open(os.devnull, "w")
            count = [0]
            if life == 0:  # in the middle of cache.json
                pathlib.Path.write_text = lambda path, text, **_: (path.write_bytes(text[:99].encode()), die())
            elif fatal:
                hook(os, "replace", fatal)
                hook(pathlib.Path, "unlink", fatal)
            else:
                timer = threading.Timer(delay, die)
                timer.daemon = True
                timer.start()
            cache.prepare(out=folder, **options)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        parts = sum(".part" in name for name in os.listdir(folder))
        print("ended" if status == 0 else f"killed {os.WTERMSIG(status)}", len(os.listdir(folder)), parts, flush=True)
        if status == 0:
            break
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_result_is_the_same(made, options, root, tmp_path):
    """SIGKILL before and after renames and deletions, and at random times, life after life, until one gets through."""
    told = {key: str(value) if isinstance(value, os.PathLike) else value for key, value in options.items()}
    kills = []
    for seed in range(3):
        folder = tmp_path / f"cache{seed}"
        folder.mkdir()
        script = [sys.executable, "-c", textwrap.dedent(KILLER), str(root), repr(told), str(folder), str(seed)]
        run = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=3600)
        *lives, last = run.stdout.splitlines()
        assert run.returncode == 0 and last.startswith("ended"), run.stderr[-2000:]
        assert all(life.startswith("killed 9") for life in lives)
        assert everything(folder) == everything(made)
        kills += lives
    assert len(kills) > 8
    assert len({life.split()[2] for life in kills}) > 4  # at different points of the work
    assert any(life.split()[3] != "0" for life in kills)  # some in the middle of a file


@pytest.mark.slow
def test_commands_report_in_one_line(options, made, root, tmp_path):
    def run(*arguments):
        script = [sys.executable, str(root / "prepare.py"), *map(str, arguments)]
        return subprocess.run(script, env=environment(), capture_output=True, text=True)

    shown = run("show", made)
    assert shown.returncode == 0 and "7 clips, 7 rows left out" in shown.stdout
    page = (made / "show.html").read_text(encoding="utf-8")
    (made / "show.html").unlink()
    assert page.startswith("<!doctype html>") and "<script" not in page
    refused = run("show", tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and refused.stderr.startswith("error: no cache")
    (tmp_path / "m.csv").write_text("video,text\na.mp4,x\n")
    failed = subprocess.run(
        command(root, options | {"manifest": tmp_path / "m.csv"}, tmp_path / "c"),
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert failed.returncode == 2 and "m.csv, line 1: no column 'caption'" in failed.stderr
    assert failed.stderr.count("\n") == 1 and not (tmp_path / "c").exists()
    (tmp_path / "vip.json").write_text("[]")
    vip = run("vip200k", "--annotations", tmp_path / "vip.json", "--videos", tmp_path, "--out", tmp_path / "o.jsonl")
    assert vip.returncode == 2 and vip.stderr.count("\n") == 1

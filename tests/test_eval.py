"""eval.py against numbers worked out by other means: insightface, OpenCV and onnxruntime, transformers, numpy, by hand.

The videos are lossless (FFV1) where a number has to be exact. Faces are found and embedded by the tiny models of
assets/, and what is checked is arithmetic.
"""

import csv
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval as evaluation
from clips.facts import head_pose
from common.errors import UserError
from common.media import count_frames, read_frames, read_image, read_video, write_video
from evaluation import metrics, report
from evaluation import vbench as quality
from evaluation.curricular import CurricularFace
from evaluation.metrics import ClipScore, FaceReader
from evaluation.results import append_line
from face import FaceDetector, embed

ROOT = Path(__file__).resolve().parent.parent
FACES, CLIPS = ROOT / "assets" / "faces", ROOT / "assets" / "clips"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # of subprocesses: two threads on a busy core wait for each other
TINY = ["--faces", FACES, "--det-size", 128, "--clip", "none"]


@pytest.fixture
def command(in_process):
    """command("--videos", ...) -> (exit code, stdout, stderr) of `python eval.py ...`, in this process."""
    return partial(in_process, evaluation.main, "eval.py")


@pytest.fixture(scope="module")
def reader():
    return FaceReader(FACES, det_size=128)


def photo(k):
    return np.array(read_image(CLIPS / f"{k}.png"))


def lossless(path, frames):
    """Frames (F, H, W, 3) as they are, to the last bit."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=12)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert np.array_equal(read_frames(path, range(len(frames))), frames)


def gray(n, size=128):
    return np.full((n, size, size, 3), 90, np.uint8)


def listed(path, *rows):
    path.write_text("".join(json.dumps({"prompt": "A face."} | row) + "\n" for row in rows))
    return path


def scores(out):
    with open(out / "scores.csv", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


# ---------------------------------------------------------------------------------------------------------------------
# FaceSim: videos with known answers


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_videos_with_known_answers(command, insightface_embeddings, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    same, other = np.repeat(photo(0)[None], 16, 0), np.repeat(photo(2)[None], 16, 0)
    half = np.concatenate([same[:6], gray(10)])
    moving = read_video(CLIPS / "1.mp4", 17, 12, 64, 64)
    for name, frames in (("same", same), ("other", other), ("none", gray(16)), ("half", half), ("moving", moving)):
        lossless(videos / f"{name}.mkv", frames)
    # A face that the detector finds in the same place after compression.
    write_video(videos / "compressed.mp4", other, 12)
    order = ["same", "compressed", "other", "none", "half", "moving"]
    rows = [{"id": name, "reference": str(CLIPS / ("2.png" if name == "compressed" else "0.png"))} for name in order]
    cases = listed(tmp_path / "cases.jsonl", *rows)

    out, tolerance = tmp_path / "out", 2e-3  # insightface rounds its crop to bytes
    code, stdout, stderr = command("--videos", videos, "--cases", cases, "--out", out, *TINY)
    assert code == 0, stderr
    arc = {name: float(row["facesim_arc"]) for name, row in scores(out).items()}
    assert list(arc) == order
    assert arc["same"] == pytest.approx(1, abs=1e-5)
    assert 0.99 < arc["compressed"] < 1 - 1e-4  # H.264 at crf 16, chroma halved
    e, e_other = insightface_embeddings([photo(0), photo(2)])
    assert arc["other"] == pytest.approx(max(0, cosine(e, e_other)), abs=tolerance)
    assert arc["other"] < 0.9
    assert arc["none"] == 0
    assert arc["half"] == pytest.approx(1, abs=1e-5)  # the mean of the frames that show a face
    picked = moving[[int(x) for x in np.linspace(0, 16, 16)]]
    by_hand = np.mean([max(0, cosine(e, row)) for row in insightface_embeddings(picked)])
    assert arc["moving"] == pytest.approx(by_hand, abs=tolerance)
    rates = {name: float(row["face_rate"]) for name, row in scores(out).items()}
    assert rates == dict.fromkeys(order, 1.0) | {"none": 0, "half": 6 / 16}
    retried = {name: int(row["retried"]) for name, row in scores(out).items()}
    assert (retried["none"], retried["half"], retried["same"]) == (16, 10, 0)
    mean = np.mean(list(arc.values()))  # with the 0
    assert f"| FaceSim-Arc | 6 | {mean:.3f} |" in stdout and "1 videos show no face" in stdout
    assert f"| videos | {mean:.3f} |  |  |" in (out / "summary.md").read_text()


def test_own_references_score_higher_than_foreign_ones(command, tmp_path):
    """On the drawn clips, with the untrained recognizer: a smoke test of the whole path, no claim about a model."""
    table = np.zeros((4, 4))
    for shift in range(4):
        rows = [{"id": str(k), "reference": str(CLIPS / f"{(k + shift) % 4}.png")} for k in range(4)]
        out = tmp_path / str(shift)
        cases = listed(tmp_path / "cases.jsonl", *rows)
        assert command("--videos", CLIPS, "--cases", cases, "--out", out, *TINY)[0] == 0
        for k in range(4):
            table[k, (k + shift) % 4] = float(scores(out)[str(k)]["facesim_arc"])
    own, foreign = table.diagonal().mean(), table[~np.eye(4, dtype=bool)].mean()
    assert own - foreign > 0.2, table
    assert (table.argmax(1) == range(4)).all(), table


def test_all_columns_of_ours_arrive(command, monkeypatch, tiny_clip, tmp_path):
    """FaceSim-Cur and CLIP-Score through the command, on a video whose frames differ."""
    monkeypatch.setattr(CurricularFace, "from_file", lambda path, device: lambda x: F.avg_pool2d(x, 28).flatten(1))
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    frames = np.concatenate([np.repeat(photo(2)[None], 12, 0), np.repeat(photo(0)[None], 8, 0)])
    lossless(videos / "a.mkv", frames)
    cases = listed(tmp_path / "cases.jsonl", {"id": "a", "reference": str(CLIPS / "2.png"), "prompt": "a face."})
    options = [
        "--videos",
        videos,
        "--cases",
        cases,
        "--out",
        out,
        *TINY[:4],
        "--curricular",
        "x.bin",
        "--clip",
        tiny_clip,
    ]
    code, stdout, stderr = command(*options)
    assert code == 0, stderr
    (row,) = scores(out).values()
    reader = FaceReader(FACES, "x.bin", det_size=128)
    both = reader.read(np.stack([photo(2), photo(0)]))
    first = sum(int(x) < 12 for x in np.linspace(0, 19, 16))
    other = max(0, cosine(both.cur[0].numpy(), both.cur[1].numpy()))
    assert 0 < other < 0.99 and 8 < first < 12
    assert float(row["facesim_cur"]) == pytest.approx((first + (16 - first) * other) / 16, abs=1e-4)
    expected = ClipScore(tiny_clip)(frames[[k * 20 // 16 for k in range(16)]], "a face.")
    assert float(row["clip_score"]) == pytest.approx(expected, abs=1e-4)
    assert "FaceSim-Cur empty" not in stdout and "CLIP-Score empty" not in stdout and "AQ, IQ, MS, DD empty" in stdout


def test_negative_cosines_count_as_zero_and_frames_without_a_face_not_at_all():
    e = torch.tensor([[1.0, 0], [-3, 0], [3, 4], [9, 9]])  # cosines 1, -1, 0.6; the last frame has no face
    found = torch.tensor([True, True, True, False])
    e_ref = torch.tensor([2.0, 0])
    assert metrics.face_sim(e, e_ref, found) == pytest.approx((1 + 0 + 0.6) / 3)
    assert metrics.face_sim(e, e_ref, torch.zeros(4, dtype=torch.bool)) == 0
    assert metrics.face_sim(-e[:1], e_ref, found[:1]) == 0


def test_which_frames():
    assert metrics.spaced_frames(121, 16) == [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120]
    assert metrics.spaced_frames(50, 16) == [int(k * 49 / 15) for k in range(16)]
    assert metrics.spaced_frames(1, 16) == [0] * 16
    assert metrics.clip_frames(121) == [int(k * 121 / 16) for k in range(16)]
    assert metrics.clip_frames(5) == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


class Watched:
    """A detector that finds a face in pictures of one width only, and remembers what it was shown."""

    def __init__(self, points, width):
        self.points, self.width, self.shown = torch.from_numpy(points).float(), width, []

    def detect(self, frames):
        self.shown.append(frames.clone())
        n, found = len(frames), frames.shape[3] == self.width
        landmarks, boxes = torch.zeros(n, 5, 2), torch.zeros(n, 4)
        if found:
            landmarks[:], boxes[:] = self.points, torch.tensor([10.0, 20, 50, 60])
        return landmarks, boxes, torch.full((n,), found)


POINTS = np.array([[30.0, 40], [50, 41], [40, 52], [33, 60], [48, 61]])


@pytest.mark.parametrize("helps", [True, False])
def test_one_retry_with_a_gray_border(reader, helps, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3)).astype(np.uint8)
    left, top = int(70 * 0.25), int(50 * 0.25)
    watched = Watched(POINTS, 70 + 2 * left if helps else -1)
    monkeypatch.setattr(reader, "detector", watched)
    faces = reader.read(frames)
    assert [tuple(x.shape) for x in watched.shown] == [(3, 3, 50, 70), (3, 3, 50 + 2 * top, 70 + 2 * left)]
    padded = ((watched.shown[1] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    truth = [cv2.copyMakeBorder(f, top, top, left, left, cv2.BORDER_CONSTANT, value=(128, 128, 128)) for f in frames]
    assert np.array_equal(padded, np.stack(truth))
    assert faces.retried.all() and (faces.valid == helps).all()
    if helps:
        np.testing.assert_allclose(faces.landmarks[0], POINTS - [left, top])
        assert faces.boxes[0].tolist() == [10 - left, 20 - top, 50 - left, 60 - top]
        # ArcFace's crop comes from the padded picture: gray, not black, beyond the edge
        points = torch.from_numpy(POINTS).float().expand(3, -1, -1)
        expected = embed(watched.shown[1], points, reader.arcface)
        torch.testing.assert_close(faces.arc, expected)
        black = embed(
            watched.shown[0], torch.from_numpy(POINTS - [left, top]).float().expand(3, -1, -1), reader.arcface
        )
        assert (faces.arc - black).abs().max() > 1e-3


def test_a_frame_with_a_face_is_looked_at_once(reader, monkeypatch):
    watched = Watched(POINTS, 70)
    monkeypatch.setattr(reader, "detector", watched)
    faces = reader.read(np.zeros((2, 50, 70, 3), np.uint8))
    assert len(watched.shown) == 1 and faces.valid.all() and not faces.retried.any()


def test_crops_of_curricular_face_are_opencvs(reader, monkeypatch):
    """norm_crop at 224, RGB, resized to 112: what the network receives, against insightface and OpenCV."""
    from insightface.utils.face_align import norm_crop

    frames = np.random.default_rng(1).integers(0, 256, (2, 540, 540, 3)).astype(np.uint8)
    points = POINTS * 6  # a face of more than 224 pixels in noise: every way to reduce it gives another picture
    received = []
    monkeypatch.setattr(reader, "detector", Watched(points, 540))
    monkeypatch.setattr(reader, "curricular", lambda crops: received.append(crops) or crops.flatten(1)[:, :512])
    reader.read(frames)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        large = [norm_crop(f[..., ::-1].copy(), points.astype(np.float32), image_size=224)[..., ::-1] for f in frames]
    truth = np.stack([cv2.resize(np.ascontiguousarray(crop), (112, 112)) for crop in large])
    ours = ((received[0] + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert ours.shape == (2, 112, 112, 3)
    # OpenCV 5 interpolates in floating point, OpenCV 4 rounds coordinates to 1/32 pixel; both round to bytes, twice
    assert np.abs(ours - truth).mean() < (0.6 if int(cv2.__version__.split(".")[0]) >= 5 else 4)
    assert np.abs(ours[..., ::-1] - truth).mean() > 10  # the colours are not the same the other way round


# ---------------------------------------------------------------------------------------------------------------------
# IR-101


def published_shapes():
    """Names and shapes of glint360k_curricular_face_r101_backbone.bin, written from the architecture's description."""

    def norm(name, channels, affine=True):
        parts = ["weight", "bias"] if affine else []
        return {f"{name}.{part}": (channels,) for part in [*parts, "running_mean", "running_var"]} | {
            f"{name}.num_batches_tracked": ()
        }

    shapes = {"input_layer.0.weight": (64, 3, 3, 3)} | norm("input_layer.1", 64) | {"input_layer.2.weight": (64,)}
    widths = [64] * 3 + [128] * 13 + [256] * 30 + [512] * 3
    for k, (before, width) in enumerate(zip([64, *widths], widths)):
        block = f"body.{k}"
        if before != width:
            shapes |= {f"{block}.shortcut_layer.0.weight": (width, before, 1, 1)}
            shapes |= norm(f"{block}.shortcut_layer.1", width)
        shapes |= norm(f"{block}.res_layer.0", before)
        shapes |= {f"{block}.res_layer.1.weight": (width, before, 3, 3)} | norm(f"{block}.res_layer.2", width)
        shapes |= {f"{block}.res_layer.3.weight": (width,), f"{block}.res_layer.4.weight": (width, width, 3, 3)}
        shapes |= norm(f"{block}.res_layer.5", width)
    shapes |= norm("output_layer.0", 512)
    shapes |= {"output_layer.3.weight": (512, 512 * 49), "output_layer.3.bias": (512,)}
    return shapes | norm("output_layer.4", 512, affine=False)


def test_names_and_shapes_are_the_published_files():
    with torch.device("meta"):
        state = CurricularFace().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == published_shapes()
    assert len(state) == 7 + 49 * 18 + 3 * 6 + 10
    assert sum(t.numel() for n, t in state.items() if t.is_floating_point() and "running" not in n) == 65_150_912


def ir101_by_hand(w, x):
    """The network in functions of the weights alone."""

    def norm(name, x):
        weight, bias = w.get(f"{name}.weight"), w.get(f"{name}.bias")
        return F.batch_norm(x, w[f"{name}.running_mean"], w[f"{name}.running_var"], weight, bias, eps=1e-5)

    x = F.prelu(norm("input_layer.1", F.conv2d(x, w["input_layer.0.weight"], padding=1)), w["input_layer.2.weight"])
    for k in range(49):
        stride, block = 2 if k in (0, 3, 16, 46) else 1, f"body.{k}"
        short = x[:, :, ::stride, ::stride]
        if f"{block}.shortcut_layer.0.weight" in w:
            short = norm(f"{block}.shortcut_layer.1", F.conv2d(short, w[f"{block}.shortcut_layer.0.weight"]))
        y = norm(
            f"{block}.res_layer.2",
            F.conv2d(norm(f"{block}.res_layer.0", x), w[f"{block}.res_layer.1.weight"], padding=1),
        )
        y = F.conv2d(F.prelu(y, w[f"{block}.res_layer.3.weight"]), w[f"{block}.res_layer.4.weight"], None, stride, 1)
        x = norm(f"{block}.res_layer.5", y) + short
    x = F.linear(norm("output_layer.0", x).flatten(1), w["output_layer.3.weight"], w["output_layer.3.bias"])
    return norm("output_layer.4", x)


@pytest.fixture(scope="module")
def random_ir101():
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in published_shapes().items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(3)
        elif len(shape) > 1:
            weights[name] = torch.randn(shape, generator=generator) * (2 / math.prod(shape[1:])) ** 0.5
        else:
            weights[name] = torch.rand(shape, generator=generator) * 0.5 + (0.75 if name.endswith("var") else 0.25)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_random_weights_round_trip(kind, random_ir101, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / f"backbone.{kind}"
    torch.save(random_ir101, path) if kind == "bin" else save_file(random_ir101, path)
    model = CurricularFace.from_file(path)
    path.unlink()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in random_ir101.items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    crop = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = ir101_by_hand(random_ir101, crop)
    torch.testing.assert_close(model(crop), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert (expected[0] - expected[1]).abs().max() > 1e-2 * expected.abs().max()


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_weights_that_are_not_weights(random_ir101, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"input_layer.0.weight": Harmful()}, tmp_path / "harmful.bin")
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "other.bin").read_bytes()[:200])
    (tmp_path / "text.safetensors").write_text("not found")
    (tmp_path / "empty.bin").write_bytes(b"")
    for name, says in (
        ("harmful.bin", "cannot be read as weights"),
        ("other.bin", "is not CurricularFace's IR-101"),
        ("list.bin", "is not CurricularFace's IR-101"),
        ("cut.bin", "cannot be read as weights"),
        ("text.safetensors", "cannot be read as weights"),
        ("empty.bin", "cannot be read as weights"),
        ("missing.bin", "no CurricularFace backbone"),
    ):
        with pytest.raises(UserError, match=says) as error:
            CurricularFace.from_file(tmp_path / name)
        assert "\n" not in str(error.value) and "hf download" in str(error.value)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, value", [("body.3.res_layer.1.weight", math.nan), ("output_layer.4.running_var", math.inf)]
)
def test_weights_that_are_not_finite_are_named(name, value, random_ir101, tmp_path):
    broken = random_ir101[name].clone()
    broken.view(-1)[5] = value
    torch.save(random_ir101 | {name: broken}, tmp_path / "broken.bin")
    with pytest.raises(UserError, match=re.escape(f"{name} holds values that are not finite")):
        CurricularFace.from_file(tmp_path / "broken.bin")


def test_other_kinds_of_values(tmp_path, recwarn):
    """Integers where floats belong, values that are no tensors, TorchScript: one line each, and torch is silent."""
    files = {
        "int": {"input_layer.0.weight": torch.ones(64, 3, 3, 3, dtype=torch.int64)},
        "text": {"a": "b"},
        "key": {1: 2},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.bin")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.bin")
    recwarn.clear()
    for name in [*files, "script"]:
        with pytest.raises(UserError, match=r"IR-101|cannot be read") as error:
            CurricularFace.from_file(tmp_path / f"{name}.bin")
        assert "\n" not in str(error.value) and not recwarn.list
    assert "input_layer.0.weight is torch.int64 (64, 3, 3, 3), expected float" in one_line_of(tmp_path / "int.bin")


def one_line_of(path):
    with pytest.raises(UserError) as error:
        CurricularFace.from_file(path)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP-Score


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A random CLIP in a folder, as transformers writes one."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)] + [".", ","]
    vocab = {
        token: i
        for i, token in enumerate([*letters, *[x + "</w>" for x in letters], "<|startoftext|>", "<|endoftext|>"])
    }
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": len(vocab), "bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=size | {"patch_size": 32}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    return folder


def clip_pixels(frames):
    """CLIP's published preprocessing in Pillow and numpy: shortest side to 224 bicubic, centre, mean and deviation."""
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    rows = []
    for frame in frames:
        image = Image.fromarray(np.ascontiguousarray(frame))
        scale = 224 / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        values = np.asarray(image.crop((left, top, left + 224, top + 224))) / 255
        rows.append(((values - mean) / std).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(rows)).float()


def test_clip_score_is_transformers_logits(tiny_clip):
    from transformers import AutoTokenizer, CLIPModel

    frames = np.stack([cv2.resize(photo(k), (96, 64)) for k in range(4)])
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip).eval(), AutoTokenizer.from_pretrained(tiny_clip)

    def logits(prompt, images):
        with torch.no_grad():
            return model(
                input_ids=torch.tensor([tokenizer(prompt)["input_ids"][:77]]), pixel_values=images
            ).logits_per_image

    clip = ClipScore(tiny_clip)
    expected = logits("a face.", clip_pixels(frames))
    assert expected.shape == (4, 1) and expected.std() > 1e-3
    assert clip(frames, "a face.") == pytest.approx(expected.mean().item(), abs=1e-3)
    bgr = logits("a face.", clip_pixels(frames[..., ::-1])).mean().item()
    assert ClipScore(tiny_clip, bgr=True)(frames, "a face.") == pytest.approx(bgr, abs=1e-3)
    assert abs(bgr - expected.mean().item()) > 5e-3
    assert clip(frames, "a dog.") != pytest.approx(clip(frames, "a face."), abs=1e-4)


def test_prompts_are_cut_at_77_tokens(tiny_clip):
    clip, frames = ClipScore(tiny_clip), gray(1)
    assert clip(frames, "x " * 75) == pytest.approx(clip(frames, "x " * 75 + "y " * 200), abs=1e-5)
    assert clip(frames, "x " * 74 + "y") != pytest.approx(clip(frames, "x " * 75), abs=1e-5)


def test_clip_with_other_weights(tiny_clip, tmp_path):
    """Missing tensors would be random numbers, NaN would be a score, a pickle would be code: each is refused."""
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_clip / "model.safetensors")
    name = "text_model.final_layer_norm.weight"
    broken = {name: torch.full_like(weights[name], math.nan)}
    for change, says in (
        ({name: None}, name),
        (broken, name),
        ({key: None for key in weights}, r"no weights|safetensors"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(tiny_clip, folder)
        kept = {key: value for key, value in (weights | change).items() if value is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=says) as error:
            ClipScore(folder)
        assert "\n" not in str(error.value)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load CLIP"):
        ClipScore(folder)


def test_clip_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot load CLIP") as error:
        ClipScore(tmp_path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Ours: copies and drift


def test_drift_by_hand():
    e = torch.tensor([[1.0, 0], [0, 1], [7, 7]])
    found = torch.tensor([True, True, False])
    assert metrics.identity_drift(e, found) == pytest.approx(1 - math.sqrt(0.5), abs=1e-5)  # both 45 degrees off
    assert metrics.identity_drift(e[[0, 0]], found[:2]) == pytest.approx(0, abs=1e-6)
    assert metrics.identity_drift(e, torch.tensor([True, False, False])) is None


def turned(points, angle):
    c, s = math.cos(angle), math.sin(angle)
    return (points - points.mean(0)) @ np.array([[c, s], [-s, c]]) * 1.7 + 200  # larger and elsewhere, too


def test_pose_by_hand():
    reference, all_found = torch.from_numpy(POINTS), torch.ones(1, dtype=torch.bool)
    for angle, expected in ((0, 1), (0.2, math.exp(-0.5)), (-0.4, math.exp(-2))):  # sigma is 0.2
        video = torch.from_numpy(turned(POINTS, angle))[None]
        assert metrics.pose_copy(video, reference, all_found) == pytest.approx(expected, abs=1e-6)
    face = np.array([[0.0, 0], [10, 0], [5, 5], [1, 10], [9, 10]])  # nose in the middle, between eyes and mouth
    aside = face.copy()
    aside[2] += 2, 1
    pose = head_pose(torch.from_numpy(np.stack([face, aside])))
    torch.testing.assert_close(pose, torch.tensor([[0, 0, 0], [0, 0.4, 0.2]]).double())
    assert metrics.pose_copy(video, reference, ~all_found) is None


def test_copying_is_printed_with_its_chance_level(command, tmp_path):
    """A video that shows its own photo copies it whole; by chance, it shares with the other photo what that one has."""
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for k in (0, 1):
        lossless(videos / f"{k}.mkv", np.repeat(photo(k)[None], 4, 0))
    cases = listed(tmp_path / "cases.jsonl", *[{"id": str(k), "reference": str(CLIPS / f"{k}.png")} for k in (0, 1)])
    code, stdout, stderr = command("--videos", videos, "--cases", cases, "--out", out, *TINY)
    assert code == 0, stderr
    detector, rows = FaceDetector(FACES, det_size=(128, 128)), scores(out)
    points, boxes, _ = detector.detect(torch.from_numpy(np.stack([photo(0), photo(1)])).permute(0, 3, 1, 2) / 127.5 - 1)
    histograms = []
    for k in (0, 1):  # numpy's own histogram, of hard bins half as fine, is near the soft one
        outside, (left, top, right, bottom) = np.ones(photo(k).shape[:2], bool), boxes[k].numpy()
        x, y, w, h = (left + right) / 2, (top + bottom) / 2, 0.8 * (right - left), 0.8 * (bottom - top)
        outside[max(0, int(y - h)) : math.ceil(y + h), max(0, int(x - w)) : math.ceil(x + w)] = False
        counts, _ = np.histogramdd(photo(k)[outside], bins=4, range=[(0, 256)] * 3)
        histograms.append(counts / counts.sum())
    shared = float(np.minimum(*histograms).sum())
    apart = (head_pose(points[:1]) - head_pose(points[1:])).square().sum().item()
    for row in rows.values():
        assert float(row["background_copy"]) == pytest.approx(1, abs=1e-6)
        assert float(row["pose_copy"]) == pytest.approx(1, abs=1e-6)
        assert float(row["background_chance"]) == pytest.approx(shared, abs=0.15)
        assert float(row["pose_chance"]) == pytest.approx(math.exp(-apart / 0.08), abs=1e-6)
    assert re.search(r"\| background copied \(ours\) ↓ \| 2 \| 1.000 \|", stdout) and "By chance: " in stdout
    assert f"| pose, by chance | 2 | {math.exp(-apart / 0.08):.3f} |" in stdout


def test_background_by_hand():
    red, half = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40, 3), np.uint8)
    red[..., 0], half[:, :20, 0], half[:, 20:, 2] = 255, 255, 255
    face = np.array([18.0, 18, 22, 22])  # times 1.6: a square in the middle, cut alike from both halves
    boxes, found = torch.from_numpy(np.stack([face, face])), torch.tensor([True, True])

    def copied(frames, reference, found=found, box=face):
        return metrics.background_copy(np.stack(frames), boxes, found, reference, torch.from_numpy(box))

    assert copied([red, red], red) == pytest.approx(1)
    assert copied([half, half], red) == pytest.approx(0.5)
    assert copied([red, half], red) == pytest.approx(0.75)
    assert copied([red, half], red, torch.tensor([False, True])) == pytest.approx(0.5)
    assert copied([half, half[:, ::-1]], half) == pytest.approx(1)  # by colour, not by place
    other_face = red.copy()
    other_face[16:24, 16:24] = 77  # inside the face's share: not looked at
    assert copied([red, red], other_face) == pytest.approx(1)
    green = np.zeros_like(red)
    green[..., 1] = 255
    assert copied([red, red], green) == 0
    assert copied([red, red], red, ~found) is None
    assert copied([red, red], red, box=np.array([0.0, 0, 40, 40])) is None


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_bootstrap():
    rng = np.random.default_rng(0)
    values = rng.normal(5, 2, 400)
    low, high = report.bootstrap(values, [str(k) for k in range(400)])
    assert low < values.mean() < high
    assert (high - low) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    # five equal videos of each face say no more than one: the interval must not shrink
    faces = [str(k) for k in range(400)]
    again = report.bootstrap(np.repeat(values, 5), [face for face in faces for _ in range(5)])
    assert again == pytest.approx((low, high), abs=1e-9)
    assert report.bootstrap(values, ["one"] * 400) is None
    assert report.bootstrap(np.array([0.0, 1.0]), ["a", "b"]) == (0.0, 1.0)
    assert report.bootstrap(np.array([0.0, 1.0, 1.0, 1.0]), ["a", "b", "b", "b"]) == (0.0, 1.0)  # a mean of videos


def test_row_of_table_1():
    row = {
        "id": "a",
        "reference": "a.png",
        "facesim_arc": 0.5,
        "face_rate": 1.0,
        "facesim_cur": 0.25,
        "clip_score": 31.4159,
    }
    rows = [row | {"dd": 1.0}, row | {"id": "b", "reference": "b.png", "facesim_arc": 0.75, "dd": 0.0}]
    text = report.markdown("ours", rows, 3, "so")
    assert "| ours | 0.625 | 0.250 | 31.42 |  |  |  | 0.50 |" in text and "2 of 3 cases scored" in text
    assert "| FaceSim-Arc | 2 | 0.625 | 0.177 | 0.500 to 0.750 |" in text
    assert "- AQ, IQ, MS empty: run make vbench once, then add --vbench." in text and "--curricular" not in text
    header, rule, line = text.splitlines()[:3]
    assert header.count("|") == rule.count("|") == line.count("|") == 9


def test_best_and_worst():
    rows = [{"id": k, "facesim_arc": k % 10} for k in range(10)]
    assert [row["id"] for row in report.extremes(rows, 2)] == [9, 8, 1, 0]
    assert [row["id"] for row in report.extremes(rows[:3], 2)] == [2, 1, 0]


def test_the_sheet_shows_references_and_frames(command, tmp_path):
    options = ["--videos", CLIPS, "--cases", CLIPS / "cases.jsonl", "--out", tmp_path, *TINY]
    assert command(*options)[0] == 0
    rows = sorted(scores(tmp_path).values(), key=lambda row: -float(row["facesim_arc"]))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (6 * 164, 4 * (18 + 160 + 4))
        for k, row in enumerate(rows):  # best first: each line begins with its own reference
            cell = np.asarray(sheet.crop((0, 182 * k + 18, 160, 182 * k + 178))).astype(int)
            photos = [np.asarray(read_image(CLIPS / f"{i}.png").resize((160, 160))).astype(int) for i in range(4)]
            assert np.argmin([np.abs(cell - image).mean() for image in photos]) == int(row["id"])


# ---------------------------------------------------------------------------------------------------------------------
# What can be wrong with other people's videos; kills


def test_bad_videos_are_reported_and_skipped(command, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    good = (CLIPS / "0.mp4").read_bytes()
    (videos / "good.mp4").write_bytes(good)
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "text.mp4").write_text("<html>Sign in to download</html>")
    (videos / "cut.mp4").write_bytes(good[: len(good) * 2 // 3])
    (videos / "faceless.mp4").write_bytes(good)
    (videos / "lost.mp4").write_bytes(good)
    (videos / "stranger.mp4").write_bytes(good)
    Image.new("RGB", (64, 64), "gray").save(tmp_path / "wall.png")
    reference = str(CLIPS / "0.png")
    rows = [{"id": name, "reference": reference} for name in ("good", "empty", "text", "cut", "missing")]
    rows += [{"id": "faceless", "reference": "wall.png"}, {"id": "lost", "reference": "nowhere.png"}]
    rows += [{"id": "stranger", "reference": reference, "prompt": ""}]
    cases = listed(tmp_path / "cases.jsonl", *rows)
    code, stdout, stderr = command("--videos", videos, "--cases", cases, "--out", tmp_path / "out", *TINY)
    assert code == 0, stderr
    table = scores(tmp_path / "out")
    assert table["good"]["problem"] == "" and float(table["good"]["facesim_arc"]) > 0.5
    for name, says in {
        "empty": "cannot be read as a video",
        "text": "cannot be read as a video",
        "cut": "cut.mp4",
        "missing": "no video missing.mp4",
        "faceless": "no face is found in the reference",
        "lost": "no image at",
        "stranger": "empty",
    }.items():
        assert says in table[name]["problem"] and table[name]["facesim_arc"] == "", (name, table[name])
        assert f"{name} skipped" in stdout + stderr
    assert "1 of 8 cases scored" in stdout


def test_any_exception_costs_only_its_video(command, monkeypatch, tmp_path):
    """A bug, a score that is no number, a title that is not UTF-8, a photo of another case that cannot be read."""
    measure, count = evaluation.measure, []

    def poisoned(*arguments):
        count.append(1)
        if len(count) == 1:
            raise KeyError("a bug")
        return measure(*arguments) | ({"facesim_arc": math.nan} if len(count) == 2 else {})

    monkeypatch.setattr(evaluation, "measure", poisoned)
    videos = tmp_path / "videos"
    videos.mkdir()
    good = (CLIPS / "0.mp4").read_bytes()
    for name in ("bug", "nan", "good", "pipe"):
        (videos / f"{name}.mp4").write_bytes(good)
    (videos / "pipe.mp4").unlink()
    os.mkfifo(videos / "pipe.mp4")
    (videos / "title.avi").write_bytes(with_title(b"caf\xe9 \xff"))
    Image.new("L", (1, 3000)).save(tmp_path / "strip.png")
    rows = [{"id": name, "reference": str(CLIPS / "0.png")} for name in ("bug", "nan", "title", "good", "pipe")]
    cases = listed(tmp_path / "cases.jsonl", *rows, {"id": "none", "reference": "strip.png"})
    code, stdout, stderr = command("--videos", videos, "--cases", cases, "--out", tmp_path / "out", *TINY)
    assert code == 0, stderr
    table = scores(tmp_path / "out")
    assert table["bug"]["problem"] == "KeyError: 'a bug'" and "facesim_arc = nan" in table["nan"]["problem"]
    assert "a pipe" in table["pipe"]["problem"] and table["good"]["problem"] == ""
    assert table["title"]["problem"] == "" and float(table["title"]["facesim_arc"]) > 0.5
    assert table["good"]["background_chance"] == "" and "2 of 6 cases scored" in stdout
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["title", "good"]


def with_title(title):
    """The frames of clip 0 as an AVI with these bytes as its title."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        container.metadata["title"] = "T" * len(title)
        stream = container.add_stream("mjpeg", rate=12)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuvj420p"
        for frame in read_frames(CLIPS / "0.mp4", range(17)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = file.getvalue()
    assert data.count(b"T" * len(title)) == 1
    return data.replace(b"T" * len(title), title)


BROKEN_RESULTS = [b"garbage\n", b"[1]\n", b"{}\n", b"5\n", b"\xff\xfe\n", b"\0\0\n", b"[" * 100000 + b"\n", b"my notes"]
BROKEN_RESULTS += [b'{"id": [1]}\n', b'{"id": "0", "stamp": "x", "facesim_arc": NaN}\n', b'{"id": "0"}\n{"id": "0']


@pytest.mark.parametrize("text", BROKEN_RESULTS)
def test_results_that_are_none(text, command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_bytes(text)
    options = ["--videos", CLIPS, "--cases", CLIPS / "cases.jsonl", "--out", tmp_path / "out", *TINY]
    code, _, stderr = command(*options)
    assert code == 2 and "results.jsonl, line" in stderr and len(stderr.splitlines()) == 1
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == text


def test_results_of_other_videos_are_not_replaced(command, tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    cases = listed(tmp_path / "cases.jsonl", {"id": "0", "reference": str(CLIPS / "0.png")})
    assert command("--videos", CLIPS, "--cases", cases, "--out", out, *TINY)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    videos.mkdir()
    (videos / "0.mp4").write_bytes((CLIPS / "1.mp4").read_bytes())
    code, _, stderr = command("--videos", videos, "--cases", cases, "--out", out, *TINY)
    assert code == 2 and "was begun with videos" in stderr and "another --out" in stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    for name in ("sheet.png", "scores.csv"):  # files of the user, or a folder
        mine = tmp_path / name / name
        mine.mkdir(parents=True) if name == "scores.csv" else mine.parent.mkdir() or mine.write_text("mine")
        code, _, stderr = command("--videos", CLIPS, "--cases", cases, "--out", mine.parent, *TINY)
        assert code == 2 and f"{name} is there" in stderr and os.listdir(mine.parent) == [name]

    (videos / "eval.json").hardlink_to(cases)
    code, _, stderr = command("--videos", videos, "--cases", cases, "--out", videos, *TINY)
    assert code == 2 and "would replace" in stderr


OUT_OF_RANGE = [("--det-size", value) for value in ("-1", "33", "1000000000", "x")]
OUT_OF_RANGE += [("--gpus", value) for value in ("0", "-1", "1.5")] + [("--device", "banana"), ("--device", "meta")]
OUT_OF_RANGE += [(option, "") for option in ("--clip", "--curricular", "--out", "--videos", "--cases", "--faces")]
OUT_OF_RANGE += [("--faces", "./no"), ("--curricular", "./no"), ("--clip", "./no")]


@pytest.mark.parametrize("option, value", OUT_OF_RANGE)
def test_options_out_of_range(option, value, command, tmp_path):
    options = ["--videos", CLIPS, "--cases", CLIPS / "cases.jsonl", "--out", tmp_path / "out", *TINY]
    code, _, stderr = command(*options, option, value)
    assert code == 2 and stderr.startswith("error: ") and len(stderr.splitlines()) == 1


def test_names_that_would_break_the_table(command, tmp_path):
    cases = listed(tmp_path / "cases.jsonl", {"id": "0", "reference": str(CLIPS / "0.png")})
    options = ["--videos", CLIPS, "--cases", cases, "--out", tmp_path / "out", *TINY, "--name", "a|b\nc"]
    assert "\n| a\\|b c | " in command(*options)[1]


def test_nothing_to_score(command, tmp_path):
    videos = tmp_path / "videos"
    cases = listed(tmp_path / "cases.jsonl", {"id": "a", "reference": str(CLIPS / "0.png")})
    options = ["--videos", videos, "--cases", cases, "--out", tmp_path / "out", *TINY]
    for prepare, says in (
        (lambda: None, "no folder"),
        (videos.mkdir, "no video in"),
        (lambda: (videos / "a.mp4").write_bytes(b""), "none of 1 cases could be scored"),
        (lambda: (videos / "a.webm").write_bytes(b""), "are both videos of a"),
    ):
        prepare()
        code, _, stderr = command(*options)
        line = stderr.splitlines()[-1]
        assert code == 2 and line.startswith("error: ") and says in line, stderr


@pytest.mark.parametrize("cut", [1, 100, 1000, 3000])
def test_frames_that_are_not_there(cut, tmp_path):
    """A file that ends early is an error wherever it ends, never a shorter video."""
    data = (CLIPS / "0.mp4").read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data)
    assert count_frames(path) == 17
    path.write_bytes(data[:-cut])
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_frames(path, [count_frames(path) - 1])


KILLED = """
import os, signal, sys
import eval as evaluation
measure, left = evaluation.measure, [int(sys.argv.pop(1))]
def measure_or_die(*arguments):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return measure(*arguments)
evaluation.measure = measure_or_die
evaluation.main()
"""


@pytest.mark.slow
def test_a_kill_loses_nothing_and_repeats_nothing(command, monkeypatch, tmp_path):
    out = tmp_path / "out"
    options = ["--videos", CLIPS, "--cases", CLIPS / "cases.jsonl", "--out", out, *TINY]
    script = [sys.executable, "-c", KILLED, "2", *map(str, options)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = (out / "results.jsonl").read_bytes()
    assert before.count(b"\n") == 2 and not (out / "scores.csv").exists()
    with open(out / "results.jsonl", "ab") as file:
        file.write(b'{"id": "2", "facesim_a')  # killed within a line, too

    measured = []
    measure = evaluation.measure
    monkeypatch.setattr(evaluation, "measure", lambda *a: measured.append(a[2]) or measure(*a))
    assert command(*options)[0] == 0
    assert len(measured) == 2
    after = (out / "results.jsonl").read_bytes()
    assert after.startswith(before) and [json.loads(line)["id"] for line in after.splitlines()] == ["0", "1", "2", "3"]
    monkeypatch.setattr(evaluation, "FaceReader", lambda *_: pytest.fail("models were loaded for nothing"))
    first = (out / "scores.csv").read_bytes()
    assert command(*options)[0] == 0 and len(measured) == 2
    assert (out / "scores.csv").read_bytes() == first
    assert not list(out.glob(".*"))

    undisturbed = tmp_path / "undisturbed"
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, options[:5]), str(undisturbed), *map(str, TINY)])
    evaluation.main()
    whole, resumed = (scores(folder) for folder in (undisturbed, out))
    assert whole.keys() == resumed.keys()
    for name, row in whole.items():  # the last digit depends on the number of threads
        assert row["problem"] == resumed[name]["problem"]
        assert float(row["facesim_arc"]) == pytest.approx(float(resumed[name]["facesim_arc"]), abs=1e-5)


def test_a_changed_video_prompt_or_option_is_measured_again(command, monkeypatch, tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for k in range(2):
        (videos / f"{k}.mp4").write_bytes((CLIPS / f"{k}.mp4").read_bytes())
    measured = []
    measure = evaluation.measure
    monkeypatch.setattr(evaluation, "measure", lambda *a: measured.append(a[2]) or measure(*a))

    def run(*options, prompt="A face."):
        measured.clear()
        again = (out / "results.jsonl").exists()
        rows = [{"id": str(k), "reference": str(CLIPS / f"{k}.png"), "prompt": prompt if k else "P"} for k in range(2)]
        cases = listed(tmp_path / "cases.jsonl", *rows)
        code, stdout, _ = command("--videos", videos, "--cases", cases, "--out", out, *TINY, *options)
        assert code == 0 and (f"{len(measured)} videos are measured anew" in stdout) == (again and bool(measured))
        return len(measured)

    assert [run(), run(), run(prompt="Another."), run("--clip-bgr")] == [2, 0, 1, 2]
    assert run("--clip-bgr", prompt="Another.") == 1
    (videos / "0.mp4").write_bytes((CLIPS / "3.mp4").read_bytes())
    assert run("--clip-bgr", prompt="Another.") == 1


# ---------------------------------------------------------------------------------------------------------------------
# VBench


def vbench_results(folder, entries, name="results_2026-01-01-00:00:00"):
    """A results file as vbench 0.1.5 writes it: per dimension the mean, then a list of paths and figures."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        dimension: [0.0, [{"video_path": path, "video_results": value} for path, value in videos.items()]]
        for dimension, videos in entries.items()
    }
    path = folder / f"{name}_eval_results.json"
    path.write_text(json.dumps(results, indent=4))
    return path


def test_vbench_results_are_merged(command, tmp_path):
    """Imaging quality is 0 to 100 per video and 0 to 1 in tables; dynamic degree is true or false."""
    vbench_results(
        tmp_path / "vbench",
        {
            "aesthetic_quality": {"/v/0.mp4": 0.5, "/v/1.mp4": 0.6, "/v/stranger.mp4": 0.1},
            "imaging_quality": {"/v/0.mp4": 68.0, "/v/1.mp4": 70.0},
            "motion_smoothness": {"/v/0.mp4": 0.98},
            "dynamic_degree": {"/v/0.mp4": True, "/v/1.mp4": False},
        },
    )
    options = ["--videos", CLIPS, "--cases", CLIPS / "cases.jsonl", "--out", tmp_path, *TINY, "--name", "drawn"]
    code, stdout, _ = command(*options)
    assert code == 0
    rows = scores(tmp_path)
    assert [rows["0"][key] for key in ("aq", "iq", "ms", "dd")] == ["0.5", "0.68", "0.98", "1.0"]
    assert [rows["1"][key] for key in ("aq", "iq", "ms", "dd")] == ["0.6", "0.7", "", "0.0"]
    assert re.search(r"\| drawn \| 0\.\d{3} \|  \|  \| 0\.550 \| 0\.690 \| 0\.980 \| 0\.50 \|", stdout)
    assert "| AQ | 2 | 0.550 | 0.071 | 0.500 to 0.600 |" in stdout


def test_vbench_results_of_another_file_do_not_count(tmp_path):
    for number, path in enumerate(("/v/a@old.mp4", "/v/b@new.mp4", "/v/c.mp4", "/v/d@new.mp4")):
        file = vbench_results(tmp_path, {"aesthetic_quality": {path: number / 10}}, f"results_{number}")
        os.utime(file, (number, number))
    file = vbench_results(tmp_path, {"aesthetic_quality": {"/v/d@new.mp4": 0.9}}, "results_0_but_later")
    os.utime(file, (9, 9))
    found = quality.read_vbench(tmp_path, dict.fromkeys("abcd", "new"))
    assert found == {"b": {"aq": 0.1}, "c": {"aq": 0.2}, "d": {"aq": 0.9}}
    (tmp_path / "x_eval_results.json").write_text("[1]")
    with pytest.raises(UserError, match="not a results file"):
        quality.read_vbench(tmp_path, {})


@pytest.mark.parametrize(
    "text", ["", "{", "null", "5", "[" * 100000, '{"aesthetic_quality": 5}', '{"dynamic_degree": [0, 1]}']
)
def test_vbench_results_that_are_none(text, tmp_path):
    (tmp_path / "x_eval_results.json").write_text(text)
    with pytest.raises(UserError, match="not a results file of VBench") as error:
        quality.read_vbench(tmp_path, {})
    assert "\n" not in str(error.value)


def test_a_score_of_vbench_that_is_no_number_is_missing(tmp_path):
    vbench_results(tmp_path, {"aesthetic_quality": {"/v/a.mp4": math.nan, "/v/b.mp4": 0.5}, "other": {"x": None}})
    assert quality.read_vbench(tmp_path, {"a": "s", "b": "s"}) == {"b": {"aq": 0.5}}


def test_the_folder_of_links_holds_nothing_else(monkeypatch, tmp_path):
    """A user's own vbench/videos is not emptied."""
    monkeypatch.setattr(quality, "PYTHON", Path(sys.executable))
    mine = tmp_path / "vbench" / "videos" / "mine.mp4"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match="give another --out"):
        quality.run_vbench({"a": (CLIPS / "0.mp4", "s")}, tmp_path / "vbench")
    assert mine.read_bytes() == b"mine"


FAKE = """#!{python}
import json, os, sys
words = sys.argv[1:]
launcher, options = words[: words.index("vbench.launch.evaluate")], words[words.index("vbench.launch.evaluate") + 1 :]
assert launcher == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "-m"], launcher
assert options[4:6] == ["--mode", "custom_input"] and options[6] == "--dimension", options
videos, out, dimensions = options[1], options[3], options[7:]
assert os.listdir(".") == ["videos"] and os.path.isabs(videos) and os.path.isabs(out)
if os.environ.get("BROKEN"):
    sys.exit(3)
paths = [os.path.join(videos, name) for name in sorted(os.listdir(videos))]
assert all(name.endswith(".mp4") and os.path.getsize(name) > 1000 for name in paths)
results = {{d: [0, [{{"video_path": p, "video_results": 0.25}} for p in paths]] for d in dimensions}}
open(os.path.join(out, "results_now_eval_results.json"), "w").write(json.dumps(results))
"""


def test_vbench_is_called_on_the_videos_that_lack_it(command, monkeypatch, tmp_path):
    python = tmp_path / ".venv-vbench" / "bin" / "python"
    monkeypatch.setattr(quality, "PYTHON", python)
    out = tmp_path / "out"
    options = ["--videos", CLIPS, "--cases", CLIPS / "cases.jsonl", "--out", out, *TINY, "--vbench", "--gpus", 3]
    code, _, stderr = command(*options)
    assert code == 2 and "run make vbench" in stderr.splitlines()[-1]
    assert all(float(row["facesim_arc"]) > 0.5 and row["aq"] == "" for row in scores(out).values())  # the rest is there

    python.parent.mkdir(parents=True)
    python.write_text(FAKE.format(python=sys.executable))
    python.chmod(0o755)
    monkeypatch.setenv("BROKEN", "1")
    code, _, stderr = command(*options)
    assert code == 2 and "VBench ended with code 3" in stderr.splitlines()[-1]
    monkeypatch.delenv("BROKEN")
    assert command(*options)[0] == 0
    rows = scores(out)
    assert all((row["aq"], row["iq"], row["dd"]) == ("0.25", "0.0025", "0.25") for row in rows.values())
    python.unlink()  # all are there: it is not called again, whatever else is asked for
    assert command(*options, "--clip-bgr")[0] == 0
    assert scores(out)["3"]["aq"] == "0.25"


# ---------------------------------------------------------------------------------------------------------------------
# README and docs


def documented(program):
    """Command lines of `program` in README and docs, in order, as lists of words."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text().replace("\\\n", " ") for page in pages)
    lines = re.findall(rf"^(?:\S*/)?(?:python|torchrun\b.*?) {re.escape(program)} .*", text, re.MULTILINE)
    return [words[words.index(program) + 1 :] for words in (shlex.split(line, comments=True) for line in lines)]


@pytest.mark.slow
def test_the_documented_example_runs(insightface_embeddings, tmp_path):
    """The commands on the cases in assets/, as they are written; FaceSim against insightface."""
    lines = [
        [program, *words]
        for program in ("sample.py", "eval.py")
        for words in documented(program)
        if "assets/clips/cases.jsonl" in words
    ]
    assert {line[0] for line in lines} == {"sample.py", "eval.py"}
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    tables = []
    for program, *words in lines:
        command = [sys.executable, ROOT / program, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        if program == "eval.py":
            tables.append(scores(tmp_path / words[words.index("--out") + 1]))
    rows = [row for table in tables for row in table.values()]
    assert len(rows) >= 4 and all(row["problem"] == "" for row in rows)
    for row in rows:
        video = tmp_path / row["video"]
        frames = read_frames(video, [int(x) for x in np.linspace(0, count_frames(video) - 1, 16)])
        (e_ref,) = insightface_embeddings(photo(row["id"])[None])
        by_hand = [max(0, cosine(e_ref, e)) for e in insightface_embeddings(frames) if e is not None]
        assert row["retried"] != "0" or float(row["facesim_arc"]) == pytest.approx(np.mean(by_hand), abs=1e-2)
    assert any(row["retried"] == "0" for row in rows)


def test_the_hours_in_the_docs_are_what_their_code_prints():
    text = (ROOT / "docs" / "table1.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL).groups()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout == printed, done.stderr


def test_the_docs_name_options_that_exist(monkeypatch):
    lines = documented("eval.py")
    assert len(lines) >= 3  # two rows and the tiny world in docs/table1.md
    for words in lines:
        monkeypatch.setattr(sys, "argv", ["eval.py", *words])
        assert evaluation.parse_arguments().videos


def test_results_that_cannot_be_written_are_named():
    with pytest.raises(UserError, match="/dev/full cannot be written: No space left"):
        append_line(Path("/dev/full"), {"id": "a"})

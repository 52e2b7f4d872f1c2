"""sample.py as a person runs it: a real photograph to an MP4, --check, and one line for each mistake."""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import TINY_A, is_audio
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

import sample
import text
from checkpoint import OUR_METADATA, Checkpoint
from common.errors import UserError
from common.ltx_file import SUPPORTED
from data import letterbox
from model import LTXVideo

SHORT = ["--steps", "1", "--frames", "5", "--height", "32", "--width", "48"]
LIMIT = 2_000  # bytes a file may have on the full disk


@pytest.fixture
def face(root):
    return str(root / "assets" / "face.png")


@pytest.fixture
def command(in_process):
    """command("--ref", ...) -> (exit code, stdout, stderr) of `python sample.py --ref ...`, in this process."""
    return partial(in_process, sample.main, "sample.py")


@pytest.fixture
def refused(command, tmp_path):
    """refused("--ref", ...) -> the one line on stderr of a command that fails as it should, writing nothing."""

    def run(*options, out="out/clip.mp4"):
        code, _, stderr = command(*options, "--out", tmp_path / out)
        assert code == 2 and "Traceback" not in stderr, stderr
        assert len(stderr.splitlines()) == 1 and stderr.startswith("error: "), stderr
        assert not [path for path in tmp_path.rglob("*") if path.suffix == ".mp4" or ".part" in path.name]
        return stderr

    return run


def real_command(root, *options, **subprocess_options):
    command = [sys.executable, root / "sample.py", *options]
    return subprocess.run(command, capture_output=True, text=True, **subprocess_options)


def read_video(path):
    """Frames (F, H, W, 3), frames per second, and the settings in the metadata."""
    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert stream.frames == len(frames)
        return frames, float(stream.average_rate), json.loads(container.metadata["comment"])


# ---------------------------------------------------------------------------------------------------------------------
# it works


@pytest.mark.slow
def test_a_real_photograph_to_a_video(root, tmp_path):
    photo = Path(importlib.util.find_spec("insightface").origin).parent / "data" / "images" / "t1.jpg"
    out = tmp_path / "new" / "clip.mp4"
    prompt = 'A woman turns to the camera; she says "hi".'
    done = real_command(root, "--ref", photo, "--prompt", prompt, "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stderr and "seed 0: 30/30 steps" in done.stderr and "s/step" in done.stderr
    assert sorted(path.name for path in out.parent.iterdir()) == ["clip.mp4", "clip.png"]
    frames, fps, settings = read_video(out)
    assert frames.shape == (17, 64, 64, 3) and fps == 12.0
    assert frames.std() > 1
    assert settings["prompt"] == prompt and settings["ref"] == str(photo) and settings["seed"] == 0
    assert (settings["s_y"], settings["s_r"], settings["placement"]) == (2.0, 3.0, "tass")
    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.size == (7 * 164 - 4, 160 + 2 * 16)  # names above, the prompt below
        first = np.asarray(sheet.crop((0, 16, 160, 176))).astype(int)
    with Image.open(photo) as original:  # wider than high: bars above and below
        band = round(160 * original.height / original.width)
    assert original.width > original.height
    assert (first[: (160 - band) // 2 - 6] < 12).all() and (first[-((160 - band) // 2 - 6) :] < 12).all()
    assert first[80 - band // 4 : 80 + band // 4].std() > 20


def test_all_options_arrive(command, face, tmp_path):
    out = tmp_path / "clip.mp4"
    options = ["--frames", 9, "--height", 48, "--width", 64, "--fps", 8, "--steps", 2, "--s-text", 3, "--s-ref", 4]
    options += ["--placement", "remote", "--seed", 11, "--negative", "blurry", "--dtype", "bfloat16", "--device", "cpu"]
    options += ["--guidance-interval", 0.2, 0.9, "--cache", 0.3]
    code, stdout, stderr = command("--ref", face, "--prompt", "A man.", "--out", out, *options)
    assert code == 0, stderr
    frames, fps, settings = read_video(out)
    assert frames.shape == (9, 48, 64, 3) and fps == 8.0 and str(out) in stdout
    want = {"frames": 9, "height": 48, "width": 64, "fps": 8.0, "steps": 2, "s_y": 3.0, "s_r": 4.0, "seed": 11}
    want |= {"placement": "remote", "prompt": "A man.", "negative": "blurry", "ref": face}
    want |= {"guidance_interval": [0.2, 0.9], "cache": 0.3}
    assert want.items() <= settings.items()


def test_a_picture_that_moves(command, face, tmp_path):
    """GIF and WebP show the frames of the MP4; other endings are refused before the work."""
    for ending in ("mp4", "gif", "webp"):
        code, stdout, stderr = command("--ref", face, "--prompt", "A man.", *SHORT, "--out", tmp_path / f"a.{ending}")
        assert code == 0 and f"a.{ending}" in stdout, stderr
    frames = read_video(tmp_path / "a.mp4")[0].astype(int)
    for ending in ("gif", "webp"):
        with Image.open(tmp_path / f"a.{ending}") as film:
            assert film.n_frames == len(frames)
            film.seek(len(frames) - 1)
            assert abs(np.asarray(film.convert("RGB")) - frames[-1]).mean() < 6
            text = film.info["comment"] if ending == "gif" else film.getexif()[270]
            assert json.loads(text)["prompt"] == "A man."
    code, _, stderr = command("--prompt", "A man.", "--out", tmp_path / "a.bmp")
    assert code == 2 and "does not end in .mp4, .gif or .webp" in stderr


def test_the_paper_is_the_default_where_the_checkpoint_has_none(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt", "x"])
    settings = sample.resolve_recipe(sample.parse_arguments(), Checkpoint(TINY_A)).for_metadata()
    want = {"height": 480, "width": 832, "frames": 121, "fps": 24.0, "steps": 30, "s_y": 5.0, "s_r": 7.5}
    want |= {"placement": "tass", "source_id": 2, "phase_scale": 1.0, "ref_timestep": "clean"}
    assert settings == want | {"fit": "letterbox", "prompt_prefix": ""}


# ---------------------------------------------------------------------------------------------------------------------
# LoRAs, presets, distilled checkpoints


@pytest.fixture
def write_lora(tmp_path):
    """write_lora("name", ours) -> a LoRA file for the embedded model, all ones, with this project's metadata."""

    def write(name, ours=None, metadata=None):
        width = load_file(sample.ASSETS / "tiny.safetensors")[f"model.diffusion_model.{Q}.weight"].shape[1]
        tensors = {f"{Q}.lora_A.weight": torch.ones(2, width), f"{Q}.lora_B.weight": torch.ones(width, 2)}
        tensors["transformer_blocks.0.audio_attn1.to_q.lora_A.weight"] = torch.ones(2, 3)
        metadata = (metadata or {}) | ({OUR_METADATA: json.dumps(ours)} if ours else {})
        save_file({f"diffusion_model.{key}": t for key, t in tensors.items()}, tmp_path / name, metadata or None)
        return tmp_path / name

    return write


Q = "transformer_blocks.0.attn1.to_q"


def test_a_lora_changes_the_video_by_its_strength(command, face, write_lora, tmp_path):
    """And at strength 0 it is as if it had not been named, whatever its metadata wants."""
    path = write_lora("face.safetensors", {"placement": "remote", "fit": "cover", "defaults": {"s_ref": 2.0}})
    runs = {"plain": [], "zero": ["--lora", f"{path}:0"], "one": ["--lora", path]}
    runs["both"] = ["--lora", path, "--lora", f"{path}:0.5"]
    videos, used = {}, {}
    for name, options in runs.items():
        out = tmp_path / f"{name}.mp4"
        code, stdout, stderr = command("--ref", face, "--prompt", "A man.", *SHORT, *options, "--out", out)
        assert code == 0, stderr
        if options:
            assert "1 layers of rank up to 2, 1 tensors of the audio branch set aside" in stdout
        videos[name], _, used[name] = read_video(out)
    assert np.array_equal(videos["zero"], videos["plain"])
    changed = [videos[name] for name in ("plain", "one", "both")]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(changed, 2))
    assert (used["one"]["placement"], used["one"]["fit"], used["one"]["s_r"]) == ("remote", "cover", 2.0)
    assert (used["zero"]["placement"], used["zero"]["fit"], used["zero"]["s_r"]) == ("tass", "letterbox", 3.0)
    assert used["both"]["loras"] == ["face.safetensors:1", "face.safetensors:0.5"]


def settings_for(monkeypatch, *options):
    """What `generate` would be told."""
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt", "x", *map(str, options)])
    read = sample.parse_arguments()
    checkpoint = Checkpoint(read.ckpt or sample.ASSETS / "tiny.safetensors")
    return sample.resolve_recipe(read, checkpoint, sample.resolve_loras(read, checkpoint)).for_metadata()


def test_the_preset_is_what_best_face_id_wants_and_yields_to_options(monkeypatch, capsys, write_lora):
    lora = ["--lora", write_lora("face.safetensors")]
    settings = settings_for(monkeypatch, *lora, "--preset", "best-face-id")
    want = {"placement": "phase", "source_id": 2, "phase_scale": 1.0, "fit": "cover", "prompt_prefix": "ref_t2v: "}
    assert want.items() <= settings.items() and settings["s_y"] == settings["s_r"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("preset"))
    assert all(key in line for key in (*want, "ref_timestep", "s_text", "s_ref")) and "yours" not in line
    changes = {"placement": "tass", "source_id": 1, "phase_scale": 0.5, "fit": "letterbox", "prompt_prefix": "face "}
    changes |= {"ref_timestep": "shared", "s_text": 6.0, "s_ref": 4.0}
    options = [word for key, value in changes.items() for word in (f"--{key.replace('_', '-')}", value)]
    settings = settings_for(monkeypatch, *lora, "--preset", "best-face-id", *options)
    assert settings.pop("s_y") == changes.pop("s_text") and settings.pop("s_r") == changes.pop("s_ref")
    assert changes.items() <= settings.items()
    assert capsys.readouterr().out.count("(yours)") == 8


def test_the_prefix_is_put_in_front_once(command, face, write_lora, tmp_path):
    lora = ["--lora", write_lora("face.safetensors"), "--preset", "best-face-id", *SHORT]
    for prompt in ("A man.", "ref_t2v: A man."):
        assert command("--ref", face, "--prompt", prompt, *lora, "--out", tmp_path / "clip.mp4")[0] == 0
        assert read_video(tmp_path / "clip.mp4")[2]["prompt"] == "ref_t2v: A man."


def test_loras_that_disagree_need_a_decision(monkeypatch, write_lora):
    one, two = (
        write_lora("one.safetensors", {"placement": "tass"}),
        write_lora("two.safetensors", {"placement": "phase"}),
    )
    with pytest.raises(UserError, match=r"different placement, tass and phase: .* decide with --placement"):
        settings_for(monkeypatch, "--lora", one, "--lora", two)
    assert settings_for(monkeypatch, "--lora", one, "--lora", two, "--placement", "phase")["placement"] == "phase"
    assert settings_for(monkeypatch, "--lora", f"{one}:0", "--lora", two)["placement"] == "phase"


def test_a_placement_that_nobody_knows_is_refused(monkeypatch, write_lora):
    lora = write_lora("moon.safetensors", {"placement": "moon"})
    with pytest.raises(UserError, match=r"moon\.safetensors: placement 'moon' is not one of tass, .*--placement"):
        settings_for(monkeypatch, "--lora", lora)
    assert settings_for(monkeypatch, "--lora", lora, "--placement", "tass")["placement"] == "tass"


def test_a_distilled_checkpoint_takes_eight_single_steps(command, face, monkeypatch, tmp_path):
    """Recognized by its name: its own sigmas, one stream, and that one has the reference."""
    ckpt = tmp_path / "ltx-2.3-22b-distilled.safetensors"
    ckpt.symlink_to(sample.ASSETS / "tiny.safetensors")
    calls, forward = [], sample.LTXVideo.forward

    def counted(self, latents, timesteps, sigma, *rest, **more):
        calls.append((latents.shape[:2], round(sigma.item(), 6), (timesteps == 0).sum().item()))
        return forward(self, latents, timesteps, sigma, *rest, **more)

    monkeypatch.setattr(sample.LTXVideo, "forward", counted)
    options = ["--ckpt", ckpt, "--gemma", sample.ASSETS / "gemma", "--prompt", "A man.", *SHORT[2:]]
    code, stdout, _ = command("--ref", face, *options, "--out", tmp_path / "clip.mp4")
    assert code == 0 and "distilled, says its file name: 8 steps" in stdout
    assert [sigma for _, sigma, _ in calls] == [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875]
    tokens, reference = 2 * 4 * 6, 4 * 6  # latent cells of 5 frames of 32 x 48
    assert {(tuple(shape), clean) for shape, _, clean in calls} == {((1, tokens + reference), reference)}


def test_what_says_that_a_model_is_distilled(monkeypatch, capsys, forge, write_lora):
    plain = settings_for(monkeypatch, "--ckpt", forge())
    assert "sigmas" not in plain and (plain["steps"], plain["s_y"], plain["s_r"]) == (30, 5.0, 7.5)
    named = settings_for(monkeypatch, "--ckpt", forge(metadata={"model_version": "2.3.0-distilled"}))
    assert "says model_version in its metadata" in capsys.readouterr().out
    lora = settings_for(monkeypatch, "--lora", write_lora("ltx-2.3-22b-distilled-lora.safetensors"))
    for settings in (named, lora):
        assert (settings["steps"], settings["s_y"], settings["s_r"], len(settings["sigmas"])) == (8, 1.0, 1.0, 9)
    preset = settings_for(
        monkeypatch, "--ckpt", forge(metadata={"model_version": "2.3-distilled"}), "--preset", "best-face-id"
    )
    assert (preset["placement"], preset["s_y"], preset["s_r"]) == ("phase", 1.0, 1.0)
    asked = ["--steps", 30, "--s-text", 3]
    own = settings_for(monkeypatch, "--ckpt", forge(metadata={"model_version": "2.3-distilled"}), *asked)
    assert "sigmas" not in own and (own["steps"], own["s_y"], own["s_r"]) == (30, 3.0, 1.0)
    ckpt = ["--ckpt", forge(metadata={"model_version": "2.3-distilled"})]
    assert "cache" not in settings_for(monkeypatch, *ckpt, "--cache", 0)
    assert settings_for(monkeypatch, *ckpt, "--cache", 0.1, "--steps", 30)["cache"] == 0.1
    with pytest.raises(UserError, match="--cache: the eight steps of a distilled model differ too much"):
        settings_for(monkeypatch, *ckpt, "--cache", 0.1)


def test_a_checkpoint_says_what_it_was_trained_with_and_options_win(monkeypatch, forge):
    ours = {"defaults": {"steps": 3, "width": 64, "fps": 12.0}, "placement": "overlap", "ref_timestep": "shared"}
    checkpoint = Checkpoint(forge(metadata={OUR_METADATA: json.dumps(ours)}))
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt", "x", "--width", "96", "--s-ref", "0"])
    settings = sample.resolve_recipe(sample.parse_arguments(), checkpoint).for_metadata()
    want = {"steps": 3, "fps": 12.0, "width": 96, "height": 480, "s_r": 0.0}
    assert (want | {"placement": "overlap", "ref_timestep": "shared"}).items() <= settings.items()


def test_seeds_count_up_and_each_is_the_video_it_is_alone(command, face, tmp_path):
    common = ["--ref", face, "--prompt", "A man.", *SHORT]
    assert command(*common, "--out", tmp_path / "many.mp4", "--samples", 2, "--seed", 4)[0] == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["many-4.mp4", "many-4.png", "many-5.mp4", "many-5.png"]
    assert command(*common, "--out", tmp_path / "one.mp4", "--seed", 5)[0] == 0
    videos = [read_video(tmp_path / name)[0] for name in ("many-4.mp4", "many-5.mp4", "one.mp4")]
    assert np.array_equal(videos[1], videos[2]) and not np.array_equal(videos[0], videos[1])


def test_twice_the_same_is_the_same_to_the_byte(command, face, tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name
        assert command("--ref", face, "--prompt", "A man.", *SHORT, "--out", folder / "clip.mp4")[0] == 0
    for file in ("clip.mp4", "clip.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_every_choice_changes_the_video(command, face, tmp_path):
    """An option that is read and never used would give the plain video."""
    changes = {
        "plain": [],
        "prompt": ["--prompt", "A blue wall."],
        "negative": ["--negative", "an old man"],
        "s-text": ["--s-text", "1.5"],
        "s-ref": ["--s-ref", "2"],
        "placement": ["--placement", "temporal"],
        "guidance-interval": ["--guidance-interval", "0", "0.5"],
        "cache": ["--cache", "1"],
        "fps": ["--fps", "6"],
        "steps": ["--steps", "3"],
        "fit": ["--fit", "cover"],
        "phase": ["--placement", "phase"],
        "phase-scale": ["--placement", "phase", "--phase-scale", "0.25"],
    }
    videos = {}
    for name, options in changes.items():
        out = tmp_path / f"{name}.mp4"
        assert command("--ref", face, "--prompt", "A man.", *SHORT, "--steps", "2", *options, "--out", out)[0] == 0
        videos[name] = read_video(out)[0]
    assert command("--prompt", "A man.", *SHORT, "--steps", "2", "--out", tmp_path / "text.mp4")[0] == 0
    videos["no reference"] = read_video(tmp_path / "text.mp4")[0]
    pairs = itertools.combinations(videos, 2)
    assert [pair for pair in pairs if np.array_equal(*(videos[name] for name in pair))] == []


def test_gemma_is_gone_before_the_dit_is_loaded(command, monkeypatch, face, tmp_path):
    """At full size both together are 50 GB."""
    gemmas, alive = [], []
    load_gemma, load_model = text.load_gemma, sample.LTXVideo.from_checkpoint

    def watched_gemma(*arguments):
        tokenizer, gemma = load_gemma(*arguments)
        gemmas.append(weakref.ref(gemma))
        return tokenizer, gemma

    def watched_model(path, device="cpu", *arguments):
        if torch.device(device).type != "meta":  # a check of the names may come earlier
            alive.append(gemmas[0]() is not None)
        return load_model(path, device, *arguments)

    monkeypatch.setattr(text, "load_gemma", watched_gemma)
    monkeypatch.setattr(sample.LTXVideo, "from_checkpoint", watched_model)
    assert command("--ref", face, "--prompt", "A man.", *SHORT, "--out", tmp_path / "clip.mp4")[0] == 0
    assert alive == [False]


def test_random_weights_say_so(command, face, small, tmp_path):
    options = ["--ref", face, "--prompt", "A man.", *SHORT, "--out", tmp_path / "clip.mp4"]
    assert "are random, not trained" not in command(*options)[1]
    _, stdout, _ = command(*options, "--ckpt", small, "--gemma", sample.ASSETS / "gemma")
    assert f"the weights in {small} are random, not trained" in stdout


def test_likeness_is_that_of_the_written_video(command, face, insightface_embeddings, tmp_path):
    """The printed number against insightface's own embeddings of the frames that were written."""
    out = tmp_path / "clip.mp4"
    code, stdout, stderr = command("--ref", face, "--prompt", "Someone smiles.", "--steps", 4, "--out", out)
    assert code == 0, stderr
    line = r"similarity to the photo ([\d.]+) \(a toy recognizer of drawn faces\), a face in (\d+) of 17 frames"
    said = re.search(line, stdout)
    photo = np.array(letterbox(Image.open(face), 64, 64))
    e = np.stack([row for row in insightface_embeddings(read_video(out)[0]) if row is not None])
    (e_ref,) = insightface_embeddings(photo[None])
    cosine = (e @ e_ref) / np.linalg.norm(e, axis=1) / np.linalg.norm(e_ref)
    assert abs(int(said[2]) - len(e)) <= 1
    assert float(said[1]) == pytest.approx(np.maximum(cosine, 0).mean(), abs=0.05)  # the file is compressed
    blank = tmp_path / "blank.png"
    Image.new("RGB", (64, 64), "white").save(blank)
    _, stdout, _ = command("--ref", blank, "--prompt", "Someone smiles.", "--steps", 1, "--out", out)
    assert "no face was found in the photo" in stdout
    _, stdout, _ = command("--prompt", "Someone smiles.", "--steps", 1, "--out", out)
    assert "photo" not in stdout


def test_a_face_pack_that_is_not_there_is_said_first(command, face, monkeypatch, tmp_path):
    monkeypatch.setattr(sample.TextEncoder, "from_checkpoint", lambda *_: pytest.fail("the prompt was read"))
    options = ["--ref", face, "--prompt", "A man.", "--faces", tmp_path / "none", "--out", tmp_path / "clip.mp4"]
    code, _, stderr = command(*options)
    assert code == 2 and stderr.startswith("error: ") and "none" in stderr


def test_the_reference_photo_survives(command, face, tmp_path):
    """`--ref me.png --out me.mp4` would put the contact sheet in the place of the photo."""
    photo = tmp_path / "me.png"
    shutil.copy(face, photo)
    command("--ref", photo, "--prompt", "A man.", *SHORT, "--out", tmp_path / "me.mp4")
    assert photo.read_bytes() == Path(face).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# --check


def totals(shapes):
    return len(shapes), sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.slow
def test_check_prints_the_totals_of_the_released_layout(root, released, released_file):
    done = real_command(root, "--check", "--ckpt", released_file)
    assert done.returncode == 0, done.stderr
    needed = released["needed"]
    of_text = "text_embedding_projection.", "model.diffusion_model.video_embeddings_connector."
    parts = {  # what it prints: the names that belong to it
        "DiT": {
            n: s for n, s in needed.items() if n.startswith("model.diffusion_model.") and not n.startswith(of_text)
        },
        "text projection and connector": {n: s for n, s in needed.items() if n.startswith(of_text)},
        "VAE encoder": {n: s for n, s in needed.items() if n.startswith("vae.encoder.")},
        "VAE decoder": {n: s for n, s in needed.items() if n.startswith("vae.decoder.")},
        "VAE statistics": {n: s for n, s in needed.items() if n.startswith("vae.per_channel_statistics.")},
        "all that is needed": needed,
    }
    lines = done.stdout.splitlines()
    for title, shapes in parts.items():
        (line,) = [line for line in lines if line.startswith(title)]
        count, parameters = totals(shapes)
        assert line.removesuffix("BF16").split()[-3:] == [f"{count:,}", f"{parameters:,}", f"{2 * parameters:,}"]
        assert line.endswith("BF16") == (title != "all that is needed")
    (line,) = [line for line in lines if line.startswith("ignored")]
    assert line.split()[-1] == f"{len(released['ignored']):,}"
    assert lines[-1] == "nothing is missing"


def test_check_tells_what_is_missing(command, forge):
    gone = ["model.diffusion_model.proj_out.bias", "vae.decoder.conv_in.conv.weight"]
    path = forge(tensors=dict.fromkeys(gone) | {"vae.encoder.conv_in.conv.bias": torch.zeros(3)})
    code, stdout, stderr = command("--check", "--ckpt", path)
    assert code == 2 and len(stderr.splitlines()) == 1 and "nothing is missing" not in stdout
    assert all(name in stderr for name in gone) and "vae.encoder.conv_in.conv.bias has shape [3]" in stderr


def test_check_reads_no_tensor(command, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read_bytes", lambda *_: pytest.fail("tensor data was read"))
    assert command("--check")[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# mistakes: options and photos


@pytest.mark.parametrize(
    "options, words",
    [
        (["--frames", "18"], ["--frames 18", "4k+1", "17 and 21"]),
        (["--frames", "0"], ["--frames 0", "1 and 5"]),
        (["--frames", "-7"], ["--frames -7", "1 and 5"]),
        (["--height", "60"], ["--height 60", "multiple of 8", "56 and 64"]),
        (["--width", "3"], ["--width 3", "8 and 16"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--fps", "0"], ["--fps 0"]),
        (["--fps", "nan"], ["--fps nan"]),
        (["--fps", "inf"], ["--fps inf"]),
        (["--s-ref", "nan"], ["--s-ref nan"]),
        (["--guidance-interval", "0.5", "0.5"], ["--guidance-interval 0.5 0.5", "LOW < HIGH"]),
        (["--guidance-interval", "nan", "1"], ["--guidance-interval nan 1"]),
        (["--cache", "1.5"], ["--cache 1.5", "between 0 and 1"]),
        (["--cache", "nan"], ["--cache nan"]),
        (["--seed", "99999999999999999999"], ["--seed"]),
        (["--samples", "0"], ["--samples: 0 is not from 1"]),
        (["--prompt", ""], ["prompt is empty", "--prompt"]),
        (["--prompt", " \n "], ["prompt is empty"]),
        (["--device", "abacus"], ["'abacus'", "--device cpu"]),
        (["--device", "meta"], ["'meta'"]),
        (["--dtype", "int8"], ["int8"]),
        (["--placement", "moon"], ["moon", "tass"]),
        (["--preset", "moon"], ["moon", "best-face-id"]),
        (["--lora", "no/such/lora.safetensors:0.5"], ["no LoRA at no/such/lora.safetensors", "FILE:STRENGTH"]),
        (["--lora", "face.safetensors:nan"], ["face.safetensors:nan", "0.8"]),
        (["--ref", "no/such/face.jpg"], ["no image at no/such/face.jpg"]),
        (["--ckpt", "no/such/model.safetensors"], ["no checkpoint at no/such/model.safetensors", "--ckpt"]),
        (["--gemma", "no/such/gemma"], ["no/such/gemma", "hf auth login", "https://huggingface.co/"]),
        (["--speed", "9"], ["--speed", "--help"]),
    ],
)
def test_wrong_options(refused, face, options, words):
    line = refused("--ref", face, "--prompt", "A man.", *SHORT, *options)
    assert all(word in line for word in words), line


def test_wrong_sizes_of_the_released_model(refused, released_file):
    for option, value, words in (("--frames", 120, "113 and 121"), ("--height", 500, "480 and 512")):
        line = refused("--ckpt", released_file, "--prompt", "A man.", option, value)
        assert words in line and ("8k+1" in line or "multiple of 32" in line)


def test_missing_prompt(refused, face):
    assert "--prompt" in refused("--ref", face)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(refused, face):
    assert "'cuda'" in refused("--ref", face, "--prompt", "A man.", "--device", "cuda")


@pytest.mark.parametrize("kind", ["empty", "text", "truncated jpeg", "truncated png", "folder"])
def test_wrong_photos(refused, tmp_path, kind):
    photo = tmp_path / "face.jpg"
    if kind == "folder":
        photo.mkdir()
    elif kind.startswith("truncated"):
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photo, kind.split()[1])
        photo.write_bytes(photo.read_bytes()[:-2000])
    else:
        photo.write_bytes(b"" if kind == "empty" else b"not a photograph")
    assert str(photo) in refused("--ref", photo, "--prompt", "A man.", *SHORT)


@pytest.mark.parametrize("out", ["clip.avi", "clip", "clip.mp4.txt"])
def test_output_that_is_no_mp4(refused, face, out):
    assert ".mp4" in refused("--ref", face, "--prompt", "A man.", *SHORT, out=out)


def test_output_folder_that_cannot_be_made(refused, face, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in ("file/clip.mp4", "file/deeper/clip.mp4"):
        assert "file" in refused("--ref", face, "--prompt", "A man.", *SHORT, out=out)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="resource limits")
@pytest.mark.parametrize("limit, whole", [(LIMIT, []), (100_000, ["clip.mp4"])])
def test_a_full_disk_leaves_nothing_half_written(root, face, tmp_path, limit, whole):
    """The video fails, or the contact sheet after it: what stands there is whole."""

    def fill_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    out = tmp_path / "clip.mp4"
    options = ["--ref", face, "--prompt", "A man.", "--steps", "1", "--out", out]
    done = real_command(root, *options, preexec_fn=fill_disk, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    errors = [line for line in done.stderr.splitlines() if line and "steps" not in line]
    assert done.returncode == 2 and len(errors) == 1 and "File too large" in errors[0], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == whole
    if whole:
        assert read_video(out)[0].shape == (17, 64, 64, 3)


# ---------------------------------------------------------------------------------------------------------------------
# mistakes: checkpoints


def rename_all(forge, rename, metadata=None):
    """A file of other tensor names and metadata."""
    path = forge().with_name("other.safetensors")
    save_file({rename(k): torch.zeros(2) for k in range(4)}, path, metadata)
    return path


def cut(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)
    return path


def filled(path, data):
    path.write_bytes(data)
    return path


QKV = "model.diffusion_model.transformer_blocks.1.attn1.to_q.weight"
WRONG_FILES = {
    "empty": (lambda f: filled(f(), b""), ["not a whole safetensors file"]),
    "text": (lambda f: filled(f(), b"<html>Sign in to download</html>"), ["not a whole safetensors file"]),
    "cut in the header": (lambda f: cut(f(), 5000), ["not a whole safetensors file", "download it again"]),
    "cut in the data": (lambda f: cut(f(), 3_000_000), ["not a whole safetensors file", "download it again"]),
    "LTX-2.0": (
        lambda f: f(config={"transformer.cross_attention_adaln": False}, metadata={"model_version": "2.0.1"}),
        ["looks like LTX-2.0", "2.0.1"],
    ),
    "LTX-2.0 without version": (
        lambda f: f(config={"transformer.cross_attention_adaln": False}, metadata={"model_version": None}),
        ["looks like LTX-2.0", "cross_attention_adaln"],
    ),
    "LTX-2.5": (lambda f: f(metadata={"model_version": "2.5.0"}), ["looks like LTX-2.5", "2.5.0"]),
    "version unknown": (lambda f: f(metadata={"model_version": None}), ["unknown version"]),
    "LTX-Video 0.9": (
        lambda f: f(config={"transformer._class_name": "Transformer3DModel"}, metadata={"model_version": None}),
        ["LTX-Video 0.9", "Transformer3DModel"],
    ),
    "another setting": (
        lambda f: f(config={"transformer.rope_type": "interleaved"}),
        ["transformer.rope_type = 'interleaved'", "'split'"],
    ),
    "another VAE": (lambda f: f(config={"vae.causal_decoder": True}), ["vae.causal_decoder = True"]),
    "LoRA": (
        lambda f: rename_all(f, lambda k: f"diffusion_model.transformer_blocks.{k}.attn1.to_q.lora_A.weight"),
        ["LoRA"],
    ),
    "diffusers part": (lambda f: rename_all(f, lambda k: f"transformer_blocks.{k}.to_q.weight"), ["diffusers"]),
    "unrelated": (lambda f: rename_all(f, lambda k: f"bert.layer.{k}.weight"), ["unrelated", "bert.layer.0.weight"]),
    "config missing": (lambda f: f(metadata={"config": None}), ["metadata lacks the config"]),
    "config damaged": (lambda f: f(metadata={"config": "{"}), ["metadata lacks the config"]),
    "config of another form": (lambda f: f(metadata={"config": '{"transformer": [1], "vae": 2}'}), [".safetensors"]),
    "key of the config missing": (
        lambda f: f(
            metadata={"config": json.dumps({"transformer": SUPPORTED["transformer"], "vae": SUPPORTED["vae"]})}
        ),
        ["forged.safetensors"],
    ),
    "tensor missing": (lambda f: f(tensors={QKV: None}), [QKV, "missing"]),
    "projection missing": (
        lambda f: f(tensors={"text_embedding_projection.video_aggregate_embed.weight": None}),
        ["video_aggregate_embed.weight is missing"],
    ),
    "wrong shape": (lambda f: f(tensors={QKV: torch.zeros(128, 64)}), [QKV, "[128, 64]", "[128, 128]"]),
    "fp8 in tiles": (
        lambda f: f(
            tensors={QKV: torch.zeros(128, 128).to(torch.float8_e4m3fn), f"{QKV}_scale": torch.ones(4, 4)},
        ),
        [QKV, "F8_E4M3 with scales of shape [4, 4]"],
    ),
    "int8": (lambda f: f(tensors={QKV: torch.zeros(128, 128, dtype=torch.int8)}), [QKV]),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_wrong_checkpoints(refused, forge, face, kind):
    make, words = WRONG_FILES[kind]
    path = make(forge)
    for options in (["--ref", face, "--prompt", "A man.", *SHORT[:2], "--gemma", sample.ASSETS / "gemma"], ["--check"]):
        if options != ["--check"] and kind in ("tensor missing", "wrong shape", "fp8 in tiles", "int8"):
            continue  # found when the DiT is loaded, after a Gemma that fits; see the next test
        line = refused("--ckpt", path, *options)
        assert str(path) in line and all(word in line for word in words), line


@pytest.mark.parametrize("kind", ["tensor missing", "wrong shape", "fp8 in tiles", "int8"])
def test_wrong_tensors_are_found_before_gemma_reads_the_prompt(refused, forge, face, kind, monkeypatch):
    """Loading 24 GB of Gemma first, to say then that the checkpoint is broken, wastes minutes."""
    path = WRONG_FILES[kind][0](forge)
    monkeypatch.setattr(text, "load_gemma", lambda *_: pytest.fail("Gemma was loaded first"))
    line = refused(
        "--ckpt", path, "--ref", face, "--prompt", "A man.", "--frames", "9", "--height", "32", "--width", "32"
    )
    assert QKV in line


@pytest.mark.slow
def test_real_processes_end_with_code_2_and_one_line(root, face, forge, tmp_path):
    for options, words in (
        (["--ckpt", tmp_path / "none.safetensors"], "no checkpoint"),
        (["--ckpt", cut(forge(), 100_000)], "not a whole safetensors file"),
        (["--frames", "18"], "17 and 21"),
    ):
        done = real_command(root, "--ref", face, "--prompt", "A man.", *options, "--out", tmp_path / "clip.mp4")
        assert done.returncode == 2 and done.stdout == ""
        assert len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_absence_of_the_audio_branch_does_not_matter(command, forge, released):
    assert all(map(is_audio, released["ignored"]))
    audio = [name for name in Checkpoint(TINY_A).tensors if is_audio(name)]
    assert audio and command("--check", "--ckpt", forge(tensors=dict.fromkeys(audio)))[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# the set-up


def test_exactly_one_onnxruntime_is_installed():
    """Both own the module `onnxruntime`; installed together the CPU one may hide the GPU."""
    names = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    assert len(names & {"onnxruntime", "onnxruntime-gpu"}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# speed and memory: other ways to the same video


def test_offload_and_compile_change_nothing_and_fp8_little(command, face, monkeypatch, tmp_path):
    """The compiler is replaced by one that runs what it is given, and counts."""
    counter, plain = CompileCounter(), LTXVideo.compile_blocks
    monkeypatch.setattr(LTXVideo, "compile_blocks", lambda model: plain(model, counter))
    videos = {}
    for name in ("plain", "offload", "compile", "fp8", "fp8-offload"):
        words = [f"--{word}" for word in name.split("-") if word != "plain"]
        out = tmp_path / f"{name}.mp4"
        code, stdout, stderr = command("--ref", face, "--prompt", "A man.", *SHORT, "--out", out, *words)
        assert code == 0, stderr
        assert ("--fp8 saves memory, not time" in stdout) == name.startswith("fp8")  # on a CPU
        videos[name], _, settings = read_video(out)
        assert ("fp8" in settings) == name.startswith("fp8")
    assert np.array_equal(videos["offload"], videos["plain"]) and np.array_equal(videos["compile"], videos["plain"])
    assert counter.frame_count == 2  # streams without and with reference
    assert np.array_equal(videos["fp8"], videos["fp8-offload"])
    assert 0 < np.abs(videos["fp8"].astype(int) - videos["plain"]).mean() < 25


def torchrun(root, ranks, *options):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, str(root / "sample.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_torchrun_shares_the_streams_of_one_video(command, root, face, tmp_path):
    asked = ["--ref", face, "--prompt", "A man.", *SHORT]
    if torch.cuda.device_count() == 1:
        pytest.skip("needs two GPUs, or none")
    done = torchrun(root, 2, *asked, "--out", tmp_path / "two.mp4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote ") == 1 and "1/1 steps" in done.stderr
    assert command(*asked, "--out", tmp_path / "one.mp4")[0] == 0
    (two, *_), (one, *_) = read_video(tmp_path / "two.mp4"), read_video(tmp_path / "one.mp4")
    assert np.abs(two.astype(int) - one).max() <= 1


def test_more_processes_than_streams_are_refused(command, face, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sample, "join_processes", lambda: None)
    monkeypatch.setattr(sample.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(sample.dist, "get_world_size", lambda: 3)
    for words, count in ((["--ref", face, "--s-text", "4", "--s-ref", "4"], 2), ([], 2), (["--s-text", "1"], 1)):
        code, _, stderr = command("--prompt", "A man.", *words, *SHORT, "--out", tmp_path / "clip.mp4")
        assert code == 2 and f"there are 3 processes for {count} stream" in stderr


@pytest.mark.parametrize("options, where", [((), "cuda"), (("--text-on-cpu",), "cpu")])
def test_where_gemma_reads(options, where, in_process, monkeypatch, tmp_path):
    """A card of 24 GB holds the model in 8 bits and not Gemma: then host memory does."""

    def reads(path, gemma, device, dtype):
        raise UserError(f"Gemma is on {device} in {dtype}")

    monkeypatch.setattr(sample.TextEncoder, "from_checkpoint", reads)
    monkeypatch.setattr(sample, "resolve_device", lambda options: (torch.device("cuda"), torch.bfloat16))
    code, _, error = in_process(sample.main, "sample.py", "--prompt", "A man.", "--out", tmp_path / "a.mp4", *options)
    assert code == 2 and f"Gemma is on {where} in torch.bfloat16" in error

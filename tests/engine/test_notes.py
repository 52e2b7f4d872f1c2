"""engine/notes.py through sample.py: each line is printed before the first step, and only where it is true."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from checkpoint import Checkpoint
from common.errors import UserError
from engine.notes import looks_drawn
from engine.sampling import likeness

ASSETS = Path(__file__).parent.parent.parent / "assets"
PHOTOS = Path(__import__("skimage").data.__file__).parent  # scikit-image's own pictures


@pytest.fixture
def notes(in_process, monkeypatch, tmp_path):
    """notes(option, ...) -> the notes that sample.py prints before it would begin to sample."""

    def stop(*_arguments, **_options):
        raise UserError("sampling begins")

    monkeypatch.setattr(sample, "generate", stop)

    def run(*options):
        words = ["--out", tmp_path / "v.mp4", *options]
        words += [] if "--prompt" in options else ["--prompt", "A person nods in front of a teal wall."]
        code, printed, error = in_process(sample.main, "sample.py", *words)
        assert code == 2 and "sampling begins" in error, error
        assert not (tmp_path / "v.mp4").exists()
        return [line.removeprefix("note: ") for line in printed.splitlines() if line.startswith("note: ")]

    return run


def paste(path, size, *places):
    """The drawn face on a canvas of `size`, at each (x, y, side)."""
    canvas = Image.new("RGB", size, "#9fb2cc")
    with Image.open(ASSETS / "face.png") as face:
        for x, y, side in places:
            canvas.paste(face.resize((side, side)), (x, y))
    canvas.save(path)
    return path


def test_a_good_photo_and_prompt_need_no_note(notes):
    assert notes("--ref", ASSETS / "face.png") == []


@pytest.mark.parametrize(
    "size, places, fit, says",
    [
        ((256, 256), [], "letterbox", "no face was found in the photo"),
        ((520, 256), [(0, 0, 256), (264, 0, 256)], "letterbox", "the photo shows 2 faces"),
        ((128, 128), [(30, 30, 64)], "letterbox", "pixels large: take a closer one"),
        ((1024, 512), [(0, 0, 512)], "cover", "--fit cover cuts the face"),
    ],
    ids=["none", "two", "small", "cut"],
)
def test_photos(size, places, fit, says, notes, tmp_path):
    lines = notes("--ref", paste(tmp_path / "photo.png", size, *places), "--fit", fit)
    assert [line for line in lines if says in line and line.startswith("photo.png: ")], lines


def test_a_real_photograph_means_nothing_to_the_embedded_model(notes):
    lines = notes("--ref", PHOTOS / "astronaut.png")
    assert any("knows drawn people only" in line for line in lines), lines


@pytest.mark.parametrize("quality", [30, 60, 95])
def test_photographs_and_drawings_are_told_apart(quality, tmp_path):
    for name in ("astronaut.png", "coffee.png", "chelsea.png"):
        with Image.open(PHOTOS / name) as image:
            image.convert("RGB").save(tmp_path / "a.jpg", quality=quality)
        with Image.open(tmp_path / "a.jpg") as image:
            assert not looks_drawn(image), name
    drawings = [ASSETS / "face.png", *(ASSETS / "clips").glob("*.png")]
    assert len(drawings) == 5
    for path in drawings:
        with Image.open(path) as image:
            assert looks_drawn(image), path


def test_weights_without_our_metadata_have_never_seen_a_reference(notes, tmp_path):
    """The tiny checkpoint as Lightricks would have released it."""
    source = Checkpoint(ASSETS / "tiny.safetensors")
    metadata = {key: value for key, value in source.metadata.items() if key != "nano_st_drc"}
    path = tmp_path / "released.safetensors"
    save_file(load_file(source.path), path, metadata)
    options = ["--ckpt", path, "--gemma", ASSETS / "gemma", "--height", 64, "--width", 64, "--frames", 17]
    (line,) = notes(*options, "--ref", ASSETS / "face.png")
    assert "released.safetensors has never seen a reference image" in line and "--lora" in line
    assert notes(*options) == []  # without a photo nothing is lost


@pytest.mark.parametrize("option, value, trained", [("placement", "temporal", "tass"), ("fit", "cover", "letterbox")])
def test_another_placement_or_fit_than_in_training(option, value, trained, notes):
    lines = notes("--ref", ASSETS / "face.png", f"--{option}", value)
    assert f"the weights were trained with --{option} {trained}: the video proves nothing about {value}" in lines
    assert notes(f"--{option}", value) == []


def test_another_size_than_in_training(notes):
    lines = notes("--height", 128, "--width", 96, "--frames", 33, "--fps", 24)
    for option, trained, value in (("height", 64, 128), ("frames", 17, 33), ("fps", 12, 24)):
        assert f"the weights were trained on --{option} {trained}: at {value} expect little of the video" in lines
    assert len(lines) == 3  # 96 pixels are within half as much again


@pytest.mark.parametrize("tokens", [1_025, 5_000])
def test_prompts_beyond_the_limit(tokens, notes):
    limit = json.loads((ASSETS / "gemma" / "tokenizer_config.json").read_text())["model_max_length"]
    prompt = " ".join(["nods"] * (tokens - 1))  # and <bos>
    (line,) = notes("--prompt", prompt)
    assert (
        line
        == f'the prompt is {tokens - limit} tokens longer than {limit}; it is read up to "... nods nods nods nods nods"'
    )


def test_words_the_model_was_never_taught_are_listed(notes):
    (line,) = notes("--prompt", "A woman nods; her coat is teal.")
    assert line == "words that this model was never taught: woman, her, coat"


def test_insightface_s_usual_place_is_used_and_nothing_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["sample.py", "--prompt", "x", "--ckpt", "model.safetensors"])
    options = sample.parse_arguments()
    assert sample.face_reader(options, "cpu") is None
    shutil.copytree(ASSETS / "faces", tmp_path / ".insightface" / "models" / "buffalo_l")
    reader = sample.face_reader(options, "cpu")
    faces = reader.read(np.array(Image.open(ASSETS / "face.png").convert("RGB"))[None])
    assert faces.valid.all()


@pytest.mark.parametrize("name", ["assets/faces", "assets/../assets/faces"])
def test_the_drawn_face_pack_is_known_by_any_of_its_names(name, monkeypatch):
    monkeypatch.chdir(ASSETS.parent)
    monkeypatch.setattr("sys.argv", ["sample.py", "--prompt", "x", "--faces", name])
    face = Image.open(ASSETS / "face.png").convert("RGB")
    reader = sample.face_reader(sample.parse_arguments(), "cpu")
    words = likeness(reader, face, np.array(face)[None])
    assert "a toy recognizer of drawn faces" in words and "a face in 1 of 1 frames" in words

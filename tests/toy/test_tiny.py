"""toy/make.py: the parts fit together, each command is one that its program takes, nothing is made twice."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from checkpoint import Checkpoint, write_modules
from common.errors import UserError
from common.media import read_image, read_video
from config import VIDEO, read_config
from model import LTXVideo
from text import TextConnector
from toy import cache as toy_cache
from toy import examples, jobs, judge
from toy import faces as toy_faces
from toy import make as tiny
from toy import text as toy_text
from toy import vae as toy_vae
from toy.world import toy_clip
from vae import VideoVAE


def released():
    return json.loads((tiny.HERE / "configs" / "ltx-2.3.json").read_text())


def test_the_parts_are_put_together(tmp_path):
    config = released()
    config["vae"] |= toy_vae.CONFIG
    config["transformer"] |= toy_text.TRANSFORMER
    parts = VideoVAE(config["vae"]), TextConnector(config["transformer"], toy_text.LAYERS + 1)
    for part, name in zip(parts, ("vae", "text")):
        write_modules(tmp_path / name, [part], config, {})
    tiny.assemble(tmp_path / "vae", tmp_path / "text", tmp_path / "start.safetensors")
    path = tmp_path / "start.safetensors"
    vae, dit = VideoVAE.from_checkpoint(path), LTXVideo.from_checkpoint(path)
    assert vae.scale == (4, 8, 8) and dit.patchify_proj.in_features == 48
    for name, tensor in parts[0].state_dict().items():
        assert torch.equal(vae.state_dict()[name], tensor.bfloat16().float() if tensor.ndim > 1 else tensor) or (
            torch.allclose(vae.state_dict()[name], tensor, rtol=2**-8)
        ), name
    TextConnector.from_checkpoint(path)
    assert Checkpoint(path).ours["defaults"] == tiny.DEFAULTS and path.stat().st_size < 34e6


MODULES = ("toy.faces", "toy.judge", "toy.text", "toy.vae", "toy.cache")


def test_every_command_is_one_that_its_program_takes(tmp_path, monkeypatch):
    parsers = {"toy.judge": judge.parse_arguments, "train.py": train.parse_arguments}
    seen = []
    for part in tiny.PARTS:
        for command in tiny.commands(part, tmp_path):
            at = next(k for k, word in enumerate(command) if word.endswith((".py", *MODULES)))
            name = command[at].rsplit("/", 1)[-1]
            monkeypatch.setattr("sys.argv", command[at:])
            if name in parsers:
                options = parsers[name]()
                if name == "train.py":
                    config = read_config(options.config, options.set)
                    assert part == "video" and config.model.scratch and not config.faces.pack
                    assert options.export or config.optim.batch % 2 == 0
                    assert config.data.cache == str(tmp_path / "cache")
            else:
                programs = toy_faces, toy_text, toy_vae, toy_cache
                program = {program.__name__: program for program in programs}[name]
                for behind_the_options in ("Path", "Checkpoint", "own_place"):
                    if hasattr(program, behind_the_options):
                        monkeypatch.setattr(program, behind_the_options, lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    program.main()
                monkeypatch.undo()
            seen.append(name)
    assert seen == ["toy.faces", "toy.judge", "toy.text", "toy.vae", "toy.cache", *["train.py"] * 2]


def test_what_is_made_is_not_made_again(tmp_path, monkeypatch):
    ran, code = [], 0
    monkeypatch.setattr(tiny, "assemble", lambda *paths: ran.append("assembled"))
    monkeypatch.setattr(
        jobs.subprocess, "run", lambda command, env: ran.append(command) or SimpleNamespace(returncode=code)
    )
    tiny.make("text", tmp_path)
    tiny.make("text", tmp_path)
    assert len(ran) == 1 and json.loads((tmp_path / "seconds.json").read_text()).keys() == {"text"}
    tiny.make("cache", tmp_path)
    tiny.make("video", tmp_path)
    assert ran[1] == "assembled" and "toy.cache" in ran[2] and len(ran) == 5
    code = 2
    with pytest.raises(UserError, match="faces: the command above ended with code 2"):
        tiny.make("faces", tmp_path)
    assert json.loads((tmp_path / "seconds.json").read_text()).keys() == {"text", "cache", "video"}


def test_the_model_is_published(tmp_path):
    out, assets = tmp_path / "out", tmp_path / "assets"
    for name in ("faces", "gemma"):
        (out / name).mkdir(parents=True)
        (out / name / "file").write_text(name)
    assets.mkdir()
    with pytest.raises(UserError, match="make the part video first"):
        tiny.publish(out, assets)
    (out / "judge.safetensors").write_text("judge")
    (out / "tiny.safetensors").write_text("tiny")
    tiny.publish(out, assets)
    assert (assets / "tiny.safetensors").read_text() == "tiny"
    assert (assets / "gemma" / "file").read_text() == "gemma"


def test_an_unknown_part_is_said(in_process):
    code, _, error = in_process(tiny.main, "tiny.py", "--parts", "vae,audio")
    assert code == 2 and "--parts has audio" in error


def test_the_guidance_of_the_checkpoint_is_what_sample_py_takes():
    assert tiny.DEFAULTS.keys() == VIDEO.keys()


def test_the_committed_examples_are_of_this_world(root, tmp_path, in_process):
    code, _, error = in_process(examples.main, "examples.py", "--out", tmp_path / "out")
    assert code == 0, error
    for name in ("face.png", *(f"clips/{k}.png" for k in range(4))):
        committed, again = (np.asarray(read_image(folder / name)) for folder in (root / "assets", tmp_path / "out"))
        assert np.array_equal(committed, again), name
    for name in ("manifest.csv", "cases.jsonl"):
        assert (root / "assets" / "clips" / name).read_text() == (tmp_path / "out" / "clips" / name).read_text()
    for k, number in enumerate(examples.CLIPS):
        clip = toy_clip(examples.SEED, number, split="test", fps=examples.FPS)
        video = read_video(root / "assets" / "clips" / f"{k}.mp4", 17, 12, 64, 64)
        assert np.abs(video.astype(int) - clip["frames"]).mean() < 5  # H.264, chroma halved

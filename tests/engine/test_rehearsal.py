"""A rehearsal against the run that it stands for: names, shapes, layers that fit, and the plan's own figures."""

import json
import re

import pytest
import torch
from test_train import ASSETS, ROOT, command, run_here, torchrun

from checkpoint import Checkpoint
from config import read_config
from engine import rehearsal
from engine.plan import GIB, plan_of
from train import model_and_cache


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_random_weights_have_the_released_names_and_shapes(released):
    """But the projection, which no training step uses: of one hidden state, and not of 49."""
    drawn = rehearsal.RandomCheckpoint(released["config"])
    shapes = {name: entry["shape"] for name, entry in drawn.tensors.items()}
    name = "text_embedding_projection.video_aggregate_embed.weight"
    assert shapes.pop(name) == [4096, 3840]
    assert shapes == {key: list(shape) for key, shape in released["needed"].items() if key != name}


def test_numbers_are_drawn_and_statistics_are_one():
    drawn = rehearsal.RandomCheckpoint(Checkpoint(ASSETS / "tiny.safetensors").config)
    weight = drawn.read("model.diffusion_model.patchify_proj.weight", dtype=torch.float32)
    assert weight.std().item() == pytest.approx(0.02, rel=0.1) and weight.dtype == torch.float32
    name = next(name for name in drawn.tensors if "statistics" in name)
    assert (drawn.read(name) == 1).all()


@pytest.mark.parametrize("gib", [40, 60, 110, 1000])
def test_as_many_layers_as_fit(gib, released, one_process, monkeypatch):
    """The plan of that many layers fits 0.9 of the memory, and the plan of one more does not."""
    config = read_config(ROOT / "configs" / "paper.toml")
    settings = {"frames": 121, "height": 480, "width": 832, "max_tokens": 1024}
    monkeypatch.setattr(rehearsal, "memory", lambda device: gib * GIB)
    layers = rehearsal.layers_that_fit(config, released["config"], settings, torch.device("cpu"))

    def planned(count):
        ltx = json.loads(json.dumps(released["config"]))
        ltx["transformer"]["num_layers"] = count
        return sum(plan_of(config, ltx, settings).memory(1).values())

    assert planned(layers) <= 0.9 * gib * GIB
    assert layers == 48 if gib == 1000 else planned(layers + 1) > 0.9 * gib * GIB


def test_a_run_is_rehearsed_without_its_files(tmp_path, monkeypatch, capsys):
    """Three steps with the identity losses; the face pack is not looked for, no cache is there, nothing is written."""
    options = {"optim__batch": 2, "faces__pack": "buffalo_l", "data__holdout": 5, "log__sample_every": 1}
    words = command(tmp_path / "no-cache", tmp_path / "run", **options)
    assert run_here([*words, "--rehearse"], monkeypatch) == 0
    printed = capsys.readouterr().out
    layers = Checkpoint(ASSETS / "tiny.safetensors").config["transformer"]["num_layers"]
    assert f"{layers} of {layers} layers" in printed
    assert re.findall(r"^step (\d)/", printed, re.MULTILINE) == ["1", "2", "3"]
    assert "id 0.000" in printed and "nan" not in printed
    config = read_config(words[1], [word for word in words[2:] if word != "--set"])
    plan = plan_of(config, *model_and_cache(config, ASSETS / "tiny.safetensors"))
    planned, measured = re.search(r"^\| memory .* \| (.*) \| (.*) \|$", printed, re.MULTILINE).groups()
    assert float(planned) == pytest.approx(sum(plan.memory(1).values()) / GIB, abs=0.01) and float(measured) > 0.1
    assert not list(tmp_path.iterdir())


def test_a_run_beyond_a_cpu_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    monkeypatch.chdir(tmp_path)
    assert run_here(["train.py", str(ROOT / "configs" / "paper.toml"), "--rehearse"], monkeypatch) == 2
    error = capsys.readouterr().err
    assert "rehearse on GPUs" in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_adapters_and_shards_are_rehearsed_on_two_processes(tmp_path):
    """The real set-up: two processes, shards or adapters in fp8."""
    lora = {"lora__rank": 4, "lora__fp8": "true", "parallel__precision": "bf16"}
    for changes in ({"parallel__mode": "fsdp"}, lora):
        words = command(tmp_path / "no-cache", tmp_path / "run", optim__batch=2, **changes)
        done = torchrun(2, [*words, "--rehearse"])
        assert "step 3/" in done.stdout and "| plan | measured |" in done.stdout

"""A run of 200 steps on a cache with five clips damaged in five ways: it ends, names each once, trains on the rest."""

import json
from pathlib import Path

import pytest
import torch
from conftest import shallow_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import clips, command, losses, torchrun, weights  # noqa: F401 (clips is a fixture)

STEPS, BATCH = 200, 2
POISON = {  # row -> part, and its damaged content
    7: ("latents", lambda t: torch.full_like(t, float("nan"))),
    80: ("features", lambda t: torch.full_like(t, float("inf"))),
    199: ("e_ref", lambda t: t[:-1].clone()),
    250: ("image", lambda t: t[: len(t) // 2].clone()),
    399: ("caption", lambda t: torch.full_like(t, 255)),
}


@pytest.fixture(scope="module")
def caches(clips, tmp_path_factory) -> dict[str, Path]:  # noqa: F811
    """The four clips of assets/ a hundred times, each time with other latents; once whole and once with the poison."""
    with safe_open(clips / "shard-00000.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["cache"])
    source, generator = load_file(clips / "shard-00000.safetensors"), torch.Generator().manual_seed(0)
    tensors = {}
    for row in range(STEPS * BATCH):
        for part in ("latents", "features", "image", "e_ref", "caption"):
            tensors[f"{row:07d}.{part}"] = source[f"{row % 4:07d}.{part}"].clone()
        tensors[f"{row:07d}.latents"] += 0.1 * torch.randn(tensors[f"{row:07d}.latents"].shape, generator=generator)
    metadata["clips"] = [{"row": row, "name": f"clip-{row}"} for row in range(STEPS * BATCH)]
    damaged = {f"{row:07d}.{part}": damage(tensors[f"{row:07d}.{part}"]) for row, (part, damage) in POISON.items()}
    folders = {}
    for name, content in (("whole", tensors), ("poisoned", tensors | damaged)):
        folders[name] = tmp_path_factory.mktemp(name)
        for file in ("cache.json", "null.safetensors"):
            (folders[name] / file).write_bytes((clips / file).read_bytes())
        save_file(content, folders[name] / "shard-00000.safetensors", {"cache": json.dumps(metadata)})
    return folders


@pytest.mark.slow
def test_five_poisoned_samples_cost_only_themselves(caches, tmp_path):
    options = {"optim__steps": STEPS, "optim__batch": BATCH, "parallel__micro_batch": 1, "faces__pack": '""'}
    options |= {"model__ckpt": shallow_checkpoint()}
    printed = {}
    for name, cache, ranks in (("one", "poisoned", 1), ("two", "poisoned", 2), ("whole", "whole", 1)):
        printed[name] = torchrun(ranks, command(caches[cache], tmp_path / name, **options)).stdout
    for name in ("one", "two"):
        lines = [line for line in printed[name].splitlines() if "skipped" in line]
        assert len(lines) == len(POISON)
        for row, (part, _) in POISON.items():
            (line,) = [line for line in lines if f"clip-{row} " in line]
            assert f"its {part} is damaged" in line
        progress = json.loads((tmp_path / name / f"step-{STEPS:06d}" / "progress.json").read_text())
        assert progress["step"] == STEPS and len(progress["skipped"]) == len(POISON)
        assert len(losses(tmp_path / name)) == STEPS
    assert "skipped" not in printed["whole"]
    one, two, whole = (weights(tmp_path / name, STEPS) for name in ("one", "two", "whole"))
    assert one.keys() == two.keys() == whole.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=1e-5, rtol=0)
    moved = max((tensor - whole[name]).abs().max() for name, tensor in one.items() if name.startswith("model."))
    assert 0 < moved < 0.05  # five samples of 400 are missing

"""One NaN in a file that sample.py reads: exit code 2, the tensor's name, no video."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from checkpoint import Checkpoint

WEIGHT = "model.diffusion_model.transformer_blocks.1.attn1.to_q.weight"


def poisoned(kind, root, folder):
    """The options of sample.py with a file of this kind that holds a NaN, and the tensor's name."""
    source = Checkpoint(root / "assets" / "tiny.safetensors")
    tensors, path = load_file(source.path), folder / f"{kind}.safetensors"
    name = {"fp8 scale": f"{WEIGHT}_scale", "vae": "vae.decoder.conv_in.conv.bias"}.get(kind, WEIGHT)
    if kind == "lora":
        name = "diffusion_model.transformer_blocks.1.attn1.to_q.lora_B.weight"
        width = len(tensors[WEIGHT])
        pair = {name: torch.zeros(width, 2), name.replace("lora_B", "lora_A"): torch.ones(2, width)}
        pair[name][3, 1] = float("nan")
        save_file(pair, path)
        return ["--lora", path], name
    if kind == "fp8 scale":
        tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e4m3fn)
        tensors[name] = torch.tensor(float("nan"))
    else:
        tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, path, source.metadata)
    return ["--ckpt", path, "--gemma", root / "assets" / "gemma"], name


@pytest.mark.parametrize("fp8", [False, True], ids=["as stored", "--fp8"])
@pytest.mark.parametrize("kind", ["base", "vae", "fp8 scale", "lora"])
def test_a_nan_is_named_and_no_video_is_made(kind, fp8, root, tmp_path, in_process):
    options, name = poisoned(kind, root, tmp_path)
    out = tmp_path / "v.mp4"
    words = [
        "--prompt",
        "A person nods in front of a teal wall.",
        "--steps",
        1,
        "--out",
        out,
        *["--fp8"] * fp8,
        *options,
    ]
    code, _, error = in_process(sample.main, "sample.py", *words)
    assert code == 2 and name in error and len(error.strip().splitlines()) == 1, error
    assert not out.exists() and not out.with_suffix(".png").exists()

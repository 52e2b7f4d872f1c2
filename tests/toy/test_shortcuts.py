"""`python -m toy.shortcuts`: what it counts, on two videos of two steps; PSNR against its formula."""

from functools import partial

import numpy as np
import pytest
import torch

from bench.measure import latent_grid
from checkpoint import Checkpoint
from model import LTXVideo
from toy import shortcuts
from toy.judge import recipe_of
from vae import latent_scale

TINY = shortcuts.ASSETS / "tiny.safetensors"


@pytest.fixture
def command(in_process):
    return partial(in_process, shortcuts.main, "toy.shortcuts")


def test_psnr():
    a = np.zeros((2, 3, 4, 4, 3), np.uint8)
    b = a.copy()
    b[0] += 10
    b[1, :, :2] += 20  # half of the pixels
    want = [20 * np.log10(255 / 10), 20 * np.log10(255 / 20) + 10 * np.log10(2)]
    assert shortcuts.psnr(b, a) == pytest.approx(np.mean(want))


@pytest.mark.slow
def test_the_table(command, tmp_path):
    """Three streams in both steps; outside 0 to 0.5, in the first step at 1, only the one with the reference."""
    out = tmp_path / "new" / "shortcuts.md"
    code, stdout, stderr = command("--count", 2, "--steps", 2, "--rows", "0 to 0.5", "--device", "cpu", "--out", out)
    assert code == 0, stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.read_text().splitlines() if "|" in line]
    assert [line[0] for line in lines] == ["", "---", "plain", "0 to 0.5"]
    assert lines[2][2] == lines[2][6] == "" and lines[2][7:] == ["100%", "1.00"]
    recipe, scale = recipe_of(TINY), latent_scale(Checkpoint(TINY).config["vae"])
    t, h, w = latent_grid((recipe.height, recipe.width, recipe.frames), scale)
    n, r = t * h * w, h * w
    assert lines[3][7] == f"{(2 * n + 2 * (n + r)) / (2 * (3 * n + r)):.0%}"
    assert float(lines[3][6]) > 5 and f"wrote {out}" in stdout


def test_a_row_that_does_not_exist_is_one_line(command):
    code, _, stderr = command("--rows", "cache 7")
    assert code == 2 and stderr.startswith("error: --rows: there is no row 'cache 7'; there are plain, cache 0.02")


def test_the_meter_counts_tokens_through_blocks(small):
    """Four blocks; two batches of 5 tokens each."""
    model = LTXVideo.from_checkpoint(small).requires_grad_(False)
    context = torch.zeros(2, 3, model.dim)
    inputs = torch.zeros(2, 5, 16), torch.zeros(2, 5), torch.zeros(2), context, torch.zeros(2, 3, 5, 2)
    with shortcuts.meter(torch.device("cpu")) as counts:
        model(*inputs)
    seconds = counts["seconds"]
    assert counts["tokens"] == 4 * 2 * 5 and seconds > 0
    model(*inputs)
    assert counts["tokens"] == 4 * 2 * 5 and counts["seconds"] == seconds

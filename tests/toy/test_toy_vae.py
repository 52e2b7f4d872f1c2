"""The tiny VAE's training: cells, components and fits against numpy, the linear start, a short run that is loaded."""

import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.media import from_bytes
from toy import vae as toy_vae
from toy.make import read_part
from vae import Conv3d, Downsample, VideoVAE

RELEASED = json.loads((Path(__file__).parent.parent.parent / "configs" / "ltx-2.3.json").read_text())["vae"]


@pytest.mark.parametrize("time, side", [(4, 16), (2, 8), (1, 8)])
def test_cells_are_cut_as_a_loop_would(time, side):
    video = torch.randn(2, 3, 9, 32, 48)
    parts = toy_vae.cells(video, time, side)
    assert parts.shape == (2, (9 + time - 1) // time, 32 // side, 48 // side, 3 * time * side * side)
    whole = torch.cat([video[:, :, :1]] * (time - 1) + [video], 2)
    for f in range(parts.shape[1]):
        for row in range(parts.shape[2]):
            for column in range(parts.shape[3]):
                y, x = side * row, side * column
                box = whole[:, :, time * f : time * (f + 1), y : y + side, x : x + side]
                assert torch.equal(parts[:, f, row, column], box.flatten(1))


def test_components_are_those_of_a_weighted_covariance():
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (60, 3, 2, 2, 2)).astype(np.uint8)
    video[:, 1] = 255 - video[:, 0]  # a strong direction
    weight = rng.uniform(1, 5, (60, 1, 2, 2, 2)).astype(np.float16)
    components = toy_vae.Components(torch.from_numpy(video), torch.from_numpy(weight), 1, 2, 3)
    rows = (video / 127.5 - 1).transpose(0, 2, 1, 3, 4).reshape(120, 12)  # one cell of 1 x 2 x 2 pixels a frame
    count = weight[:, 0].astype(float).reshape(120, 4).mean(1)
    np.testing.assert_allclose(components.mean.numpy(), (count[:, None] * rows).sum(0) / count.sum(), atol=1e-4)
    _, vectors = np.linalg.eigh(np.cov(rows.T, aweights=count, ddof=0))
    for k in range(3):
        assert abs(components.basis[:, k].numpy() @ vectors[:, -1 - k]) == pytest.approx(1, abs=1e-3)
    found = components.of(torch.from_numpy(video).float() / 127.5 - 1)
    assert found.shape == (60, 3, 2, 1, 1)
    spread = [np.var(found[:, k].numpy()) for k in range(3)]
    assert spread == sorted(spread, reverse=True)


@pytest.mark.parametrize("causal", [True, False])
def test_a_fit_finds_the_kernel_that_made_the_data(causal):
    there, found = Conv3d(3, 5, causal), Conv3d(3, 5, causal)
    inputs = torch.randn(30, 3, 5, 4, 4)
    with torch.no_grad():
        toy_vae.fit(found, inputs, there(inputs), ridge=1e-7)
    torch.testing.assert_close(found.conv.weight, there.conv.weight, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.conv.bias, there.conv.bias, atol=1e-3, rtol=0)


def test_halving_time_is_what_the_encoder_does():
    down = Downsample(6, 6, (2, 1, 1))
    weight = torch.randn(3, 6)
    with torch.no_grad():
        down.conv.conv.weight.zero_()
        down.conv.conv.bias.zero_()
        down.conv.conv.weight[:, :, 2, 1, 1] = weight
        frames = torch.randn(2, 6, 9, 1, 1)
        expected = down(frames)[:, :, 1:, 0, 0].transpose(1, 2)  # behind the first frame, which counts twice
    assert torch.allclose(toy_vae.halve_time(frames[:, :, 1:, 0, 0].transpose(1, 2), weight), expected, atol=1e-6)


def test_little_is_lost_in_time():
    """Four frames of 12 channels to 12, all variance in 8 directions: a good choice keeps nearly all of it."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(48, 8, generator=generator)
    covariance = directions @ directions.T + 1e-4 * torch.eye(48)
    torch.manual_seed(0)
    kernels = toy_vae.keep_most(covariance, 4)
    samples = np.random.default_rng(0).multivariate_normal(np.zeros(48), covariance.double().numpy(), 2000)
    kept = torch.from_numpy(samples).float().view(-1, 4, 12)
    for kernel in kernels:
        kept = toy_vae.halve_time(kept, kernel)
    kept = kept.flatten(1).double().numpy()
    residual = samples - kept @ np.linalg.lstsq(kept, samples, rcond=None)[0]
    assert kept.shape[1] == 12 and np.square(residual).sum() < 0.02 * np.square(samples).sum()


def test_cosines_are_orthonormal_and_sum_to_zero():
    rows = toy_vae.cosines(16)
    assert rows.shape == (15, 16)
    assert torch.allclose(rows @ rows.T, torch.eye(15), atol=1e-5) and rows.sum(1).abs().max() < 1e-5


def test_a_landmark_counts_most():
    weight = toy_vae.face_weight(np.full((1, 5, 2), 10.0), 32)
    assert weight[0, 10, 10] == pytest.approx(1 + toy_vae.FACE) and weight[0, 31, 31] == pytest.approx(1, abs=1e-3)
    assert weight[0, 10, 14] == pytest.approx(1 + toy_vae.FACE * math.exp(-0.5))


@pytest.fixture(scope="module")
def start():
    """A VAE at its linear start and the clips it was fitted to; far fewer channels than the real one."""
    small = {"latent_channels": 24, "encoder_base_channels": 12, "decoder_base_channels": 24}
    vae = VideoVAE(RELEASED | toy_vae.CONFIG | small)
    torch.manual_seed(0)
    video, weight = toy_vae.draw_clips(0, 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_vae, "CHANNELS", 24)
        toy_vae.set_encoder(vae, video, weight)
        toy_vae.set_statistics(vae, video)
        toy_vae.set_decoder(vae, video, weight)
    return vae, video, weight


@pytest.mark.slow
def test_the_linear_start_decodes_about_what_components_can(start):
    """What is lost is the components' loss and little more."""
    vae, video, weight = start
    shown = from_bytes(toy_vae.draw_clips(0, 20, "test")[0])
    components = toy_vae.Components(video, weight, *toy_vae.CELL, 24)
    cells = toy_vae.cells(shown, *toy_vae.CELL)
    centered = cells - components.mean
    least = F.mse_loss(centered @ components.basis @ components.basis.T, centered)
    with torch.no_grad():
        error = F.mse_loss(vae.decode(vae.encode(shown)), shown)
    assert error < 1.5 * least < 0.5 * shown.var()


@pytest.mark.slow
def test_training_brings_the_decoded_clips_closer(start, tmp_path):
    vae, video, weight = copy.deepcopy(start[0]), start[1][:12], start[2][:12]
    encoder = {name: tensor.clone() for name, tensor in vae.encoder.state_dict().items()}

    @torch.no_grad()
    def error() -> float:
        clips = from_bytes(video)
        return ((vae.decode(vae.encode(clips)) - clips).abs() * weight.float()).mean().item()

    before = error()
    toy_vae.train_decoder(vae, video, weight, 80, 4, 1e-4, tmp_path / "shown.png")
    assert error() < 0.95 * before  # measured: 0.90 and 0.89
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in vae.encoder.state_dict().items())


@pytest.mark.slow
def test_a_short_run_writes_what_is_loaded(tmp_path, in_process):
    out = tmp_path / "vae.safetensors"
    few = ["--clips", 6, "--fitted", 6, "--batch", 2, "--steps", 3]
    options = ["--out", out, *few, "--lr", 1e-6, "--device", "cpu"]  # three steps of Adam at full speed undo the start
    code, printed, error = in_process(toy_vae.main, "toy_vae.py", *options)
    assert code == 0, error
    vae = read_part(VideoVAE(RELEASED | toy_vae.CONFIG), out)
    assert vae.scale == (4, 8, 8)
    video = from_bytes(toy_vae.draw_clips(0, 2)[0])  # two of the six
    with torch.no_grad():
        latents = vae.encode(video)
        error = (vae.decode(latents) - video).square().mean().item()
    assert latents.shape == (2, 48, 5, 8, 8)
    _, spread = vae.per_channel_statistics.mean_and_std()
    assert (spread == spread[0]).all()  # one for all channels
    assert error < 0.5 * video.var().item()  # rounded to bf16
    assert re.search(r"wrote .*vae.safetensors", printed) and out.with_suffix(".png").is_file()

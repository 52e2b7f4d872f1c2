"""The tiny VAE's training: cells and components against numpy, the decoder's start, a short run that is loaded."""

import math
import re

import numpy as np
import pytest
import torch

import toy_vae
from vae import Upsample, VideoVAE, depth_to_space


def test_cells_are_cut_as_a_loop_would():
    video = torch.randn(2, 3, 9, 32, 48)
    parts = toy_vae.cells(video)
    assert parts.shape == (2, 3, 2, 3, 3 * 4 * 16 * 16)
    whole = torch.cat([video[:, :, :1], video[:, :, :1], video[:, :, :1], video], 2)
    for f in range(3):
        for row in range(2):
            for column in range(3):
                box = whole[:, :, 4 * f : 4 * f + 4, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                assert torch.equal(parts[:, f, row, column], box.flatten(1))


def test_components_are_those_of_a_weighted_covariance(monkeypatch):
    monkeypatch.setattr(toy_vae, "CHANNELS", 3)
    monkeypatch.setattr(toy_vae, "cells", lambda x: x)  # of four numbers each: (B, 1, 1, 1, 4)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (200, 1, 1, 1, 4)).astype(np.uint8)
    x[..., 1] = 255 - x[..., 0]  # a strong direction
    weight = rng.uniform(1, 5, (200, 1, 1, 1, 4)).astype(np.float32)
    mean, components = toy_vae.principal_components(torch.from_numpy(x), torch.from_numpy(weight), torch.device("cpu"))
    rows, count = x[:, 0, 0, 0] / 127.5 - 1, weight[:, 0, 0, 0].mean(1)
    expected = (count[:, None] * rows).sum(0) / count.sum()
    np.testing.assert_allclose(mean.numpy(), expected, atol=1e-4)
    _, vectors = np.linalg.eigh(np.cov(rows.T, aweights=count, ddof=0))
    for k in range(3):
        assert abs(components[:, k].numpy() @ vectors[:, -1 - k]) == pytest.approx(1, abs=1e-3)


def test_a_landmark_counts_most():
    weight = toy_vae.face_weight(np.full((1, 5, 2), 10.0), 32)
    assert weight[0, 10, 10] == pytest.approx(1 + toy_vae.FACE) and weight[0, 31, 31] == pytest.approx(1, abs=1e-3)
    assert weight[0, 10, 14] == pytest.approx(1 + toy_vae.FACE * math.exp(-0.5))


def test_the_decoder_begins_by_repeating():
    vae = VideoVAE(toy_vae.CONFIG | {"in_channels": 3, "out_channels": 3})
    toy_vae.start_decoder(vae)
    for module in vae.decoder.modules():
        if isinstance(module, Upsample):
            with torch.no_grad():
                weight = module.conv.conv.weight
                x = torch.randn(1, weight.shape[1], 2, 3, 3)
                out = depth_to_space(torch.einsum("oc,bcfhw->bofhw", weight[:, :, 1, 1, 1], x), module.stride)
                channels = len(weight) // math.prod(module.stride)
                t, h, w = module.stride
                repeated = x[:, :channels].repeat_interleave(t, 2).repeat_interleave(h, 3).repeat_interleave(w, 4)
                assert torch.corrcoef(torch.stack([out.flatten(), repeated.flatten()]))[0, 1] > 0.8


@pytest.mark.slow
def test_a_short_run_writes_what_is_loaded(tmp_path, in_process):
    out = tmp_path / "vae.safetensors"
    options = ["--out", out, "--clips", 6, "--batch", 2, "--encoder-steps", 3, "--decoder-steps", 30, "--device", "cpu"]
    code, printed, error = in_process(toy_vae.main, "toy_vae.py", *options)
    assert code == 0, error
    vae = VideoVAE.from_checkpoint(out)
    assert vae.scale == (4, 16, 16)
    video = toy_vae.to_float(toy_vae.draw_clips(0, 2, "test")[0], torch.device("cpu"))
    with torch.no_grad():
        latents = vae.encode(video)
        error = (vae.decode(latents) - video).square().mean().item()
    assert latents.shape == (2, 96, 5, 4, 4)
    _, spread = vae.per_channel_statistics.mean_and_std()
    assert (spread == spread[0]).all()  # one for all channels
    assert error < 2 * video.var().item()
    assert re.search(r"wrote .*vae.safetensors", printed) and out.with_suffix(".png").is_file()

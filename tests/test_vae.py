"""vae.py against the golden vectors, and the properties of its layout: causal encoder, tokens in order, exact sizes."""

import itertools
import random

import pytest
import torch
from conftest import LiveBytes

import vae as vae_module
from common.errors import UserError
from common.sizes import require_video_size
from vae import Conv3d, VideoVAE, depth_to_space, from_tokens, latent_scale, space_to_depth, to_tokens


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pixels, latents", [("vae_video", "vae_latent"), ("vae_image", "vae_image_latent")])
def test_encoder_equals_golden(vae, golden, pixels, latents):
    torch.testing.assert_close(vae.encode(golden[pixels]), golden[latents], atol=1e-4, rtol=0)


def test_decoder_equals_golden(vae, golden):
    torch.testing.assert_close(vae.decode(golden["vae_latent"]), golden["vae_decoded"], atol=1e-4, rtol=0)


def test_scale_comes_from_the_config(vae, released, root):
    assert latent_scale(released["config"]["vae"]) == (8, 32, 32) == vae.scale
    assert VideoVAE.from_checkpoint(root / "assets" / "tiny.safetensors", device="meta").scale == (4, 8, 8)


@pytest.mark.parametrize("seed", range(3))
def test_sizes_both_ways_and_samples_do_not_mix(vae, seed):
    rng = random.Random(seed)
    cells = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 3)
    frames, height, width = 8 * (cells[0] - 1) + 1, 32 * cells[1], 32 * cells[2]
    video = randn(2, 3, frames, height, width, seed=seed).clamp(-1, 1)
    latents = vae.encode(video)
    assert latents.shape == (2, 4, *cells)
    decoded = vae.decode(latents)
    assert decoded.shape == video.shape
    torch.testing.assert_close(vae.encode(video[1:]), latents[1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decode(latents[1:]), decoded[1:], atol=1e-4, rtol=0)


def test_no_latent_sees_a_later_frame_and_the_first_is_an_image(vae):
    video = randn(1, 3, 17, 32, 64)
    latents = vae.encode(video)
    for cell in range(2):
        cut = vae.encode(video[:, :, : 8 * cell + 1])
        torch.testing.assert_close(cut, latents[:, :, : cell + 1], atol=1e-5, rtol=0)
    changed = video.clone()
    changed[:, :, 8] += 1  # the last frame of cell 1
    moved = (vae.encode(changed) - latents).abs().amax(dim=(0, 1, 3, 4))
    assert moved[0] < 1e-5 and moved[1] > 1e-3, moved


def test_decoder_looks_ahead(vae):
    latents = randn(1, 4, 3, 1, 1)
    changed = latents.clone()
    changed[:, :, 1] += 1
    assert (vae.decode(changed) - vae.decode(latents))[:, :, 0].abs().max() > 1e-3


@pytest.mark.parametrize("frames, height, width", [(8, 32, 32), (9, 33, 32), (9, 32, 48), (0, 32, 32)])
def test_sizes_that_do_not_fit_are_refused(vae, frames, height, width):
    with pytest.raises(ValueError, match=f"{frames} frames, {height}x{width}.*8k\\+1.*32"):
        vae.encode(torch.zeros(1, 3, frames, height, width))


@pytest.mark.parametrize("scale", [(8, 32, 32), (4, 16, 8)])
def test_sizes_that_fill_cells_and_the_nearest_ones(scale):
    """Against a list of all sizes that fit: the largest below and the smallest above, or the two smallest."""
    names = ("frames", "height", "width")
    fitting = [list(range(step if axis else 1, 300, step)) for axis, step in enumerate(scale)]
    size = dict(zip(names, (sizes[0] for sizes in fitting)))
    require_video_size(size, scale)
    for name, sizes in zip(names, fitting):
        for value in range(-40, 200):
            if value in sizes:
                require_video_size(size | {name: value}, scale)
                continue
            lower = max([fit for fit in sizes if fit < value], default=sizes[0])
            nearest = f"the nearest are {lower} and {sizes[sizes.index(lower) + 1]}"
            with pytest.raises(UserError, match=f"^--{name} {value} is not .*: {nearest}$"):
                require_video_size(size | {name: value}, scale)


def test_an_unknown_block_is_named(released):
    config = released["config"]["vae"]
    for key, kind in (("encoder_blocks", "compress_time"), ("decoder_blocks", "compress_time_res")):
        blocks = [*config[key], [kind, {"multiplier": 1}]]
        with torch.device("meta"), pytest.raises(UserError, match=f"block '{kind}'"):
            VideoVAE(config | {key: blocks})


@pytest.mark.parametrize("stride", vae_module.STRIDES.values())
def test_space_to_depth_element_by_element(stride):
    """Facts: b c (d p1) (h p2) (w p3) -> b (c p1 p2 p3) d h w."""
    p1, p2, p3 = stride
    x = randn(2, 3, 2 * p1, 3 * p2, 2 * p3)
    y = space_to_depth(x, stride)
    for c, i, j, k in itertools.product(range(3), range(p1), range(p2), range(p3)):
        channel = ((c * p1 + i) * p2 + j) * p3 + k
        assert torch.equal(y[:, channel], x[:, c, i::p1, j::p2, k::p3])
    assert torch.equal(depth_to_space(y, stride), x)


def test_patches_count_width_before_height(vae, monkeypatch):
    """Facts: b c f (h q) (w r) -> b (c r q) f h w; wrong order gives a picture that is only nearly right."""
    seen = []
    monkeypatch.setattr(vae.encoder.conv_in, "forward", lambda x, _: seen.append(x) or torch.zeros(1, 4, 1, 8, 8))
    image = randn(1, 3, 1, 32, 32)
    vae.encoder(image)
    for c, q, r in itertools.product(range(3), range(4), range(4)):
        assert torch.equal(seen[0][:, (c * 4 + r) * 4 + q], image[:, c, :, q::4, r::4])


@pytest.mark.parametrize("frames", [3, 0])  # a piece of the decoder's stream can be empty
@pytest.mark.parametrize("stride", vae_module.STRIDES.values())
def test_rearrangements_are_permutations(vae, stride, frames):
    """Bit-equal to reshape and permute written out with torch alone, and contiguous."""
    p, q, r = stride
    x = randn(2, 12 * p * q * r, frames, 3, 5)
    far = x.view(2, 12, p, q, r, frames, 3, 5).permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(2, 12, frames * p, 3 * q, 5 * r)
    assert torch.equal(depth_to_space(x, stride), far)
    near = far.view(2, 12, frames, p, 3, q, 5, r).permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(x.shape)
    assert torch.equal(near, x) and torch.equal(space_to_depth(far, stride), near)
    assert depth_to_space(x, stride).is_contiguous() and space_to_depth(far, stride).is_contiguous()


def test_pixels_count_width_before_height(vae, monkeypatch):
    """The decoder's last layer undoes the encoder's patches."""
    monkeypatch.setattr(vae.decoder.conv_out, "forward", lambda x, _: x)
    monkeypatch.setattr(vae_module, "pixel_norm", lambda x: x)
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: x)
    x = randn(1, 3 * 4 * 4, 2, 3, 5)
    video = vae.decoder.to_pixels(x)
    for c, q, r in itertools.product(range(3), range(4), range(4)):
        assert torch.equal(video[:, c, :, q::4, r::4], x[:, (c * 4 + r) * 4 + q])


@pytest.mark.parametrize("causal", [True, False])
def test_convolution_repeats_edge_frames_and_pads_space_with_zeros(causal):
    conv = Conv3d(2, 3, causal).requires_grad_(False)
    x = randn(1, 2, 4, 5, 6)
    frames = [0, 0, 0, 1, 2, 3] if causal else [0, 0, 1, 2, 3, 3]
    padded = torch.nn.functional.pad(x[:, :, frames], (1, 1, 1, 1))
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)  # (1, 2, 4, 5, 6, 3, 3, 3)
    want = torch.einsum("bcfhwijk,ocijk->bofhw", windows, conv.conv.weight) + conv.conv.bias.view(-1, 1, 1, 1)
    torch.testing.assert_close(conv(x), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_tokens_run_over_time_then_rows_then_columns(seed):
    rng = random.Random(seed)
    grid = rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 4)
    latents = randn(2, 5, *grid, seed=seed)
    tokens = to_tokens(latents)
    for n, (t, h, w) in enumerate(itertools.product(*map(range, grid))):
        assert torch.equal(tokens[:, n], latents[:, :, t, h, w])
    assert torch.equal(from_tokens(tokens, grid), latents)


@pytest.mark.parametrize("frames, chunk", [(2, 1), (5, 2), (7, 3), (3, 5)])
def test_in_pieces_is_as_at_once(vae, root, frames, chunk):
    """Both VAEs see further than a piece, so a missing, doubled or misplaced frame shows in every one."""
    tiny = VideoVAE.from_checkpoint(root / "assets" / "tiny.safetensors").requires_grad_(False)
    for one in (vae, tiny):
        channels, pixels = one.decoder.conv_in.conv.in_channels, one.scale[0] * (frames - 1) + 1
        latents, video = randn(1, channels, frames, 1, 2), randn(1, 3, pixels, *one.scale[1:]).clamp(-1, 1)
        torch.testing.assert_close(one.decode(latents, chunk), one.decode(latents), atol=1e-4, rtol=0)
        torch.testing.assert_close(one.encode(video, chunk), one.encode(video), atol=1e-4, rtol=0)


def test_memory_of_pieces_does_not_grow_with_the_video(released):
    """Counted for a narrow VAE of the released depth, beside what goes in and out; at once it grows as the video."""
    config = released["config"]["vae"] | {"decoder_base_channels": 16, "encoder_base_channels": 16}
    with torch.device("meta"):
        full = VideoVAE(config).requires_grad_(False)

    def peak(run, given, chunk):
        with LiveBytes(given) as live:
            out = run(given, chunk)
        return live.peak - given.nbytes - out.nbytes

    def both(frames, chunk):
        with torch.device("meta"):
            latents, video = torch.empty(1, 128, frames, 2, 3), torch.empty(1, 3, 8 * frames - 7, 64, 96)
        return peak(full.decode, latents, chunk), peak(full.encode, video, chunk)

    (decode_11, encode_11), (decode_21, encode_21) = both(11, None), both(21, None)
    assert decode_21 > 1.8 * decode_11 and encode_21 > 1.8 * encode_11
    short, long = both(11, 2), both(21, 2)
    # Of the latents there is a normalized copy, which does grow.
    assert long == pytest.approx(short, rel=0.05)
    assert long[0] < 0.5 * decode_21 and long[1] < 0.5 * encode_21


def test_gradient_reaches_the_latents_through_the_decoder(vae):
    """Eq. 7 is part of a loss: the decoder may not detach."""
    latents = randn(1, 4, 2, 1, 1).requires_grad_()
    vae.decode(latents).square().mean().backward()
    assert latents.grad.abs().min() > 0


def test_bfloat16_is_near_float32(tiny_a, vae, golden):
    half = VideoVAE.from_checkpoint(tiny_a, dtype=torch.bfloat16)
    latents = half.encode(golden["vae_video"].bfloat16())
    assert latents.dtype == torch.bfloat16
    want = golden["vae_latent"]
    assert (latents.float() - want).abs().mean() < 0.05 * want.abs().mean()

"""fp8.py: how far a weight is off, products and gradients of the stored weight, what is kept for the backward pass,
products of 8-bit factors against a table of all e4m3 numbers."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_A
from torch import nn

from engine import fp8
from engine.fp8 import FP8Linear, can_multiply, dequantize, multiply_in_fp8, quantize, scaled_product, store_in_fp8
from engine.lora import LoRALinear
from guidance import sample_latents
from model import LTXVideo
from rope import RefPositions


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(out=48, width=96, dtype=torch.float32, seed=0, bias=True):
    linear = nn.Linear(width, out, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(randn(out, width, seed=seed))
    return linear.to(dtype)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e4, 1e30])
def test_a_number_is_off_by_a_sixteenth_of_itself_at_most(size):
    weight = size * randn(64, 200) * 10 ** randn(64, 200, seed=1)  # many magnitudes in a row
    weight[3] = 0
    quantized, scale = quantize(weight)
    assert quantized.dtype == torch.uint8 and quantized.shape == weight.shape and scale.shape == (64, 1)
    back = dequantize(quantized, scale, torch.float64)
    error, allowed = (back - weight).abs(), torch.maximum(weight.abs() / 16, scale * 2**-10)
    assert (error <= allowed * 1.001).all()
    assert error.max() > 0 and (back[3] == 0).all()
    assert torch.equal(dequantize(quantized, scale, torch.bfloat16).double(), back)  # bf16 adds no error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_are_those_of_the_stored_weight(dtype, bias):
    linear = layer(dtype=dtype, bias=bias)
    stored = FP8Linear(*quantize(linear.weight), linear.bias)
    weight = dequantize(stored.weight, stored.scale, dtype)
    assert not torch.equal(weight, linear.weight)
    x, y = (randn(2, 5, 96, seed=2).to(dtype).requires_grad_() for _ in range(2))
    got, want = stored(x), F.linear(y, weight, linear.bias)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    toward = randn(2, 5, 48, seed=3).to(dtype)
    got.backward(toward)
    want.backward(toward)
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=0)
    assert stored.weight.grad is None and not stored.weight.requires_grad


@pytest.mark.parametrize("rows", [1, 48])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_and_formats_of_files(dtype, stored, rows):
    """e5m2 as well as e4m3, one scale or one for each row, no power of two: rounded once to the input's dtype."""
    q, scale, bias = (10 * randn(48, 96)).to(stored), 0.01 + randn(rows, 1, seed=1).abs(), randn(48, seed=4).to(dtype)
    linear = FP8Linear(q.view(torch.uint8), scale, nn.Parameter(bias), stored)
    weight = (q.double() * scale.double()).float().to(dtype)
    assert torch.equal(linear.weight.view(stored).double(), q.double())
    x, y = (randn(2, 5, 96, seed=2).to(dtype).requires_grad_() for _ in range(2))
    got, want = linear(x), F.linear(y, weight, bias)
    tolerance = {"atol": 0, "rtol": 0} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 0}  # sums of about 100
    torch.testing.assert_close(got, want, **tolerance)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, **tolerance)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), got, atol=0, rtol=0)


def test_only_the_bytes_are_kept_for_the_backward_pass():
    """A kept bf16 copy of every weight would cost more than bf16 storage."""
    linear, kept = layer(), []
    stored = FP8Linear(*quantize(linear.weight), linear.bias)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        stored(randn(4, 96).requires_grad_()).sum()
    assert {(tensor.dtype, tuple(tensor.shape)) for tensor in kept} == {
        (torch.uint8, (48, 96)),
        (torch.float32, (48, 1)),
    }


@torch.no_grad()
def test_a_model_in_fp8_is_half_as_large_and_near(golden):
    plain = LTXVideo.from_checkpoint(TINY_A, dtype=torch.bfloat16)
    stored = store_in_fp8(LTXVideo.from_checkpoint(TINY_A, dtype=torch.bfloat16))
    assert not any(p.requires_grad for p in stored.parameters())
    inside = [m for m in stored.transformer_blocks.modules() if isinstance(m, nn.Linear)]
    assert len(inside) == 12 * len(stored.transformer_blocks) and all(isinstance(m, FP8Linear) for m in inside)
    assert not any(
        isinstance(m, FP8Linear) for m in (stored.patchify_proj, stored.proj_out, stored.adaln_single.linear)
    )
    size = [sum(p.nbytes for p in model.transformer_blocks.parameters()) for model in (stored, plain)]
    assert size[0] < 0.56 * size[1]  # the rest: scales, biases and tables, which weigh nothing at full width
    t = golden["sigma"]
    arguments = [golden["latent"].bfloat16(), t[:, None].expand(-1, golden["latent"].shape[1]), t]
    arguments += [golden["context"].bfloat16(), golden["video_positions"]]
    got, want = stored(*arguments).float(), plain(*arguments).float()
    assert 0 < (got - want).abs().mean() < 0.1 * want.abs().mean()


def test_error_of_a_product_is_two_to_four_percent():
    """Rounding to 3 bits after the leading one: between 2^-5 and 2^-4 of a number at most, 2.6% of it on average. With
    both factors rounded the errors add up as squares: 3.7%."""
    linear = layer(out=256, width=1024, bias=False)
    x = randn(64, 1024, seed=5)
    want = F.linear(x, linear.weight)
    stored = FP8Linear(*quantize(linear.weight), None)
    error = (stored(x) - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert 0.02 < error < 0.03
    error = (multiply_in_fp8(stored)(x) - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert 0.03 < error < 0.04


def test_only_one_layer_is_held_twice_while_storing():
    """Of the layers that were replaced nothing may be left, or a card would need both models at once."""
    model = LTXVideo.from_checkpoint(TINY_A)
    layers = [weakref.ref(m.weight) for m in model.transformer_blocks.modules() if isinstance(m, nn.Linear)]
    alive = []
    quantized = fp8.quantize

    def count(weight):
        alive.append(sum(layer() is not None for layer in layers))
        return quantized(weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "quantize", count)
        store_in_fp8(model, "cpu")
    assert alive == list(range(len(layers), 0, -1))


# ---------------------------------------------------------------------------------------------------------------------
# products of 8-bit factors

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def e4m3(code):
    """The number that a byte stands for: sign, 4 bits of exponent (bias 7), 3 of mantissa, from the format's table."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


NUMBERS = np.array(sorted({e4m3(code) for code in range(256) if code & 127 != 127}))  # 127 is NaN


def nearest(values):
    above = np.searchsorted(NUMBERS, values).clip(1, len(NUMBERS) - 1)
    low, high = NUMBERS[above - 1], NUMBERS[above]
    return np.where(values - low < high - values, low, high)


def test_the_table_of_e4m3():
    assert len(NUMBERS) == 253 and NUMBERS[-1] == 448 and NUMBERS[NUMBERS > 0][0] == 2**-9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 48])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_product_is_the_one_by_hand(dtype, bias, rows, device):
    """Each row of x to the nearest e4m3 numbers times max / 448, in numpy; scales for a weight or for its rows."""
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("cards write bf16")
    q, scale = (20 * randn(48, 96)).to(torch.float8_e4m3fn), 0.01 + randn(rows, 1, seed=1).abs()
    linear = FP8Linear(q.view(torch.uint8), scale, nn.Parameter(randn(48, seed=4).to(dtype)) if bias else None)
    x = (randn(2, 5, 96, seed=2) * 10 ** randn(2, 5, 1, seed=3)).to(dtype)
    x[1, 2] = 0
    with torch.no_grad():
        got = multiply_in_fp8(linear.to(device))(x.to(device)).double().cpu().numpy()
    x, w = x.double().numpy().reshape(10, 96), q.double().numpy() * scale.double().numpy()
    x_scale = np.abs(x).max(1, keepdims=True) / 448
    rounded = nearest(x / np.where(x_scale, x_scale, 1)) * x_scale
    assert np.abs(rounded - x).max() > 0
    want = (rounded @ w.T + (linear.bias.double().detach().cpu().numpy() if bias else 0)).reshape(2, 5, 48)
    size = np.abs(want).max(-1, keepdims=True) + 1e-30
    assert (np.abs(got - want) / size).max() < (1e-5 if dtype == torch.float32 else 0.01)
    error = np.sqrt(((got - want) ** 2).mean()) / np.sqrt((want**2).mean())
    assert error < (1e-5 if dtype == torch.float32 else 0.004)


def test_which_layers_multiply():
    """Kernels need sides that are multiples of 16, and e4m3. The rest, and training, converts the weight."""
    square, narrow = (FP8Linear(*quantize(randn(out, 32)), None) for out in (16, 12))
    e5m2 = FP8Linear(randn(16, 32).to(torch.float8_e5m2).view(torch.uint8), torch.ones(1, 1), None, torch.float8_e5m2)
    scalar = FP8Linear(quantize(randn(16, 32))[0], torch.full((1, 1), 0.3), None)
    before = dequantize(scalar.weight, scalar.scale, torch.float32)
    layers = nn.ModuleList([square, narrow, e5m2, scalar])
    assert not any(layer.multiplies for layer in layers)
    assert [layer.multiplies for layer in multiply_in_fp8(layers)] == [True, False, False, True]
    assert torch.equal(dequantize(scalar.weight, scalar.scale, torch.float32), before)


def test_which_devices_multiply(monkeypatch):
    """A CPU only emulates it. A card does it, or its kernel raises an error."""
    assert not can_multiply(torch.device("cpu"), torch.bfloat16)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        assert can_multiply(torch.device("cuda"), torch.bfloat16)

    def refused(*_, **__):
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", refused)
    assert not can_multiply(torch.device("meta"), torch.bfloat16)


@torch.no_grad()
def test_an_adapter_on_top_of_a_product():
    base = multiply_in_fp8(FP8Linear(*quantize(randn(48, 96)), None))
    x, A, B = randn(5, 96, seed=2), randn(4, 96, seed=3), randn(48, 4, seed=4)
    got = LoRALinear(base, A, B, 0.5).eval()(x)
    torch.testing.assert_close(got, scaled_product(x, base.weight, base.scale, None) + 0.5 * (x @ A.T) @ B.T)


@torch.no_grad()
def test_a_sample_with_products_in_8_bits_is_near(golden):
    problem = {"noise": golden["noise"], "positions": golden["video_positions"], "z_ref": golden["ref"]}
    problem |= {"sigmas": golden["sigmas"], "context": golden["context"], "null_context": golden["null_context"]}
    problem |= {"ref_positions": RefPositions(golden["tass_positions"]), "dtype": torch.bfloat16}
    plain = LTXVideo.from_checkpoint(TINY_A, dtype=torch.bfloat16)
    stored = multiply_in_fp8(store_in_fp8(LTXVideo.from_checkpoint(TINY_A, dtype=torch.bfloat16)))
    assert any(layer.multiplies for layer in stored.modules() if isinstance(layer, FP8Linear))
    got, want = sample_latents(stored, **problem), sample_latents(plain, **problem)
    assert 0 < (got - want).abs().mean() < 0.2 * want.abs().mean()

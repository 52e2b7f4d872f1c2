"""fp8.py: how far a weight is off, products and gradients of the stored weight, what is kept for the backward pass."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_A
from torch import nn

from engine import fp8
from engine.fp8 import FP8Linear, dequantize, quantize, store_in_fp8
from model import LTXVideo


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


def test_error_of_a_product_is_two_to_three_percent():
    """Rounding to 3 bits after the leading one: between 2^-5 and 2^-4 of a number at most, 2.6% of it on average."""
    linear = layer(out=256, width=1024, bias=False)
    x = randn(64, 1024, seed=5)
    want = F.linear(x, linear.weight)
    error = (FP8Linear(*quantize(linear.weight), None)(x) - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert 0.02 < error < 0.03


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

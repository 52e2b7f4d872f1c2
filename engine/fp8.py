"""Frozen weights in 8 bits: half the memory of bf16, so that a 48 GB card holds what adapters train beside (lora.py),
and a 24 GB card the model to sample from.

        W (out, in)  ~  scale (out, 1) * Q (out, in)        scale: the power of two next above max |row of W| / 448

Q is float8 e4m3: 4 bits of exponent, 3 of mantissa, at most 448, so a number is off by at most 1/16 of itself, or by
2^-10 scale if it is tiny; multiplying by a power of two adds no error. Only storage is 8 bits: a weight is brought to
its input's dtype when the layer's turn comes, and again for the backward pass, instead of being kept for it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 448.0  # of float8 e4m3


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W (out, in) -> Q (out, in) as bytes, and the rows' scales (out, 1), float32."""
    wide = weight.detach().float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST).log2().ceil().exp2()
    scale = torch.where(scale > 0, scale, 1)  # a row of zeros
    return (wide / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale


def dequantize(quantized: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return quantized.view(torch.float8_e4m3fn).to(dtype) * scale.to(dtype)


class Product(torch.autograd.Function):
    """x W^T + b with a gradient for x alone."""

    @staticmethod
    def forward(ctx, x: Tensor, quantized: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(quantized, scale)
        return F.linear(x, dequantize(quantized, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ dequantize(*ctx.saved_tensors, gradient.dtype), None, None, None


class FP8Linear(nn.Linear):
    """A frozen linear layer that holds its weight as bytes: a dtype that every backend of DDP can pass on."""

    def __init__(self, linear: nn.Linear, device: str | torch.device | None = None):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight, scale = quantize(linear.weight.to(device or linear.weight.device))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight, self.scale, self.bias)


def store_in_fp8(model: nn.Module, device: str | torch.device | None = None) -> nn.Module:
    """Replace the linear layers of a DiT's blocks, one at a time, and freeze the model.

    With `device` that is where the bytes go, from a model in host memory: the card never holds it in bf16.
    """
    model.requires_grad_(False)
    blocks = model.transformer_blocks
    for name in [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]:
        layer = blocks.get_submodule(name)  # by name, for a list of the layers would keep all of them
        blocks.set_submodule(name, FP8Linear(layer, device).train(layer.training))
    return model

"""Frozen weights in 8 bits: half the memory of bf16, so that a 48 GB card holds what adapters train beside (lora.py),
and a 24 GB card the model to sample from.

        W (out, in)  ~  scale (out, 1) * Q (out, in)        scale: the power of two next above max |row of W| / 448

Q is float8 e4m3: 4 bits of exponent, 3 of mantissa, at most 448, so a number is off by at most 1/16 of itself, or by
2^-10 scale if it is tiny; multiplying by a power of two adds no error. A checkpoint in fp8 keeps its own Q, e4m3 or
e5m2, and its own scales, one for a weight or one for each row.

Products have one of two forms. Training and cards without fp8 products: the weight is converted to the dtype of the
layer's input when the layer runs, and again for the backward pass, instead of being kept for it. Sampling on other
cards (`multiply_in_fp8`): the input x (n, in) is rounded to 8 bits too, with a scale for each row.

        x W^T  ~  s_x (Q_x Q^T) scale^T        s_x (n, 1) = max |row of x| / 448,   Q_x = x / s_x
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import FP8, Checkpoint, file_name

E4M3, LARGEST = torch.float8_e4m3fn, 448.0


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W (out, in) -> Q (out, in) in e4m3 as bytes, and the rows' scales (out, 1), float32."""
    weight = weight.detach()
    scale = (weight.abs().amax(dim=1, keepdim=True).float() / LARGEST).log2().ceil().exp2()
    scale = torch.where(scale > 0, scale, 1)  # a row of zeros
    return (weight / scale).to(E4M3).view(torch.uint8), scale


def dequantize(quantized: Tensor, scale: Tensor, dtype: torch.dtype, stored: torch.dtype = E4M3) -> Tensor:
    """Bytes of Q (out, in) and scale (out, 1) or (1, 1) -> W (out, in), the product rounded once."""
    return quantized.view(stored).to(dtype).mul_(scale)  # Q is exact in every dtype; in place: computed in float32


class Product(torch.autograd.Function):
    """x W^T + b with a gradient for x alone."""

    @staticmethod
    def forward(ctx, x: Tensor, quantized: Tensor, scale: Tensor, stored: torch.dtype, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(quantized, scale)
        ctx.stored = stored
        return F.linear(x, dequantize(quantized, scale, x.dtype, stored), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return gradient @ dequantize(*ctx.saved_tensors, gradient.dtype, ctx.stored), None, None, None, None


def scaled_product(x: Tensor, quantized: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in), bytes of Q (out, in) in e4m3, scale (out, 1) -> x W^T + b (..., out), a product of 8-bit factors."""
    rows = x.flatten(0, -2)  # (n, in)
    x_scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-30) / LARGEST  # (n, 1); no 0 for a row of zeros
    x_quantized = (rows / x_scale).to(E4M3)
    # fast_accum: sums stay in the tensor cores, whose 14 bits are far finer than the 4 of a factor.
    y = torch._scaled_mm(
        x_quantized, quantized.view(E4M3).t(), x_scale, scale.t(), bias, out_dtype=x.dtype, use_fast_accum=True
    )
    return y.unflatten(0, x.shape[:-1])


class FP8Linear(nn.Linear):
    """A frozen linear layer that holds its weight as bytes: a dtype that every backend of DDP can pass on."""

    def __init__(self, quantized: Tensor, scale: Tensor, bias: Tensor | None, stored: torch.dtype = E4M3):
        super().__init__(quantized.shape[1], quantized.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(quantized, requires_grad=False)  # (out, in), uint8
        self.scale = nn.Parameter(scale, requires_grad=False)  # (out, 1) or (1, 1), float32
        self.bias, self.stored = bias, stored
        self.multiplies = False  # true: scaled_product, without a gradient

    def forward(self, x: Tensor) -> Tensor:
        if self.multiplies:
            return scaled_product(x, self.weight, self.scale, self.bias)
        return Product.apply(x, self.weight, self.scale, self.stored, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.stored}, scales={len(self.scale)}"


def can_multiply(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of 8-bit factors run on this device. A CPU only emulates them, slower than it converts."""
    try:
        x = torch.ones(16, 16, device=device, dtype=dtype)
        scaled_product(x, *quantize(x), bias=x[0])
    except (RuntimeError, ValueError):
        return False
    return device.type != "cpu"


def multiply_in_fp8(model: nn.Module) -> nn.Module:
    """Let the fp8 layers of a model, from now on without gradients, compute `scaled_product`.

    Layers in e5m2, or with sides that are no multiples of 16, still convert their weights: kernels have these limits.
    """
    for layer in model.modules():
        if isinstance(layer, FP8Linear) and layer.stored == E4M3 and not any(n % 16 for n in layer.weight.shape):
            layer.multiplies = True
            layer.scale.data = layer.scale.data.expand(layer.out_features, 1).contiguous()
    return model


def block_linears(model: nn.Module) -> list[str]:
    """The linear layers of a DiT's blocks by name: a list of the layers would keep replaced ones in memory."""
    blocks = model.transformer_blocks.named_modules(prefix="transformer_blocks")
    return [name for name, module in blocks if isinstance(module, nn.Linear)]


def store_in_fp8(model: nn.Module, device: str | torch.device | None = None) -> nn.Module:
    """Replace the linear layers of a DiT's blocks, one at a time, and freeze the model. With `device` the bytes go
    there from a model in host memory: the card never holds the model in bf16."""
    model.requires_grad_(False)
    for name in block_linears(model):
        layer = model.get_submodule(name)
        quantized, scale = quantize(layer.weight.to(device or layer.weight.device))
        model.set_submodule(name, FP8Linear(quantized, scale, layer.bias).train(layer.training))
        del layer  # one layer at a time is in memory twice
    return model


def load_fp8(
    model: nn.Module,
    checkpoint: Checkpoint,
    device: str | torch.device,
    dtype: torch.dtype,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> nn.Module:
    """Load a DiT that is on the meta device, frozen, with the linear layers of its blocks in fp8, one layer at a time.

    Layers that the file stores in fp8 keep the file's bytes and scales, and the others stay in bf16, as the file's
    maker chose. Of a file without fp8 every layer is quantized. `changes` maps the released name of a tensor to a
    function from it to the changed tensor (merged LoRAs); a changed fp8 layer is quantized again."""
    checkpoint.load(model, model.PREFIXES, "meta")  # every name and shape before anything slow
    sources = {name: file_name(f"{name}.weight", model.PREFIXES) for name in block_linears(model)}
    changes = changes or {}
    in_fp8 = {name: source for name, source in sources.items() if checkpoint.tensors[source]["dtype"] in FP8}
    unchanged = {name for name, source in in_fp8.items() if source not in changes}
    # Bytes and scales of all layers get their place before the first matrix is read. Between freed matrices they would
    # split the heap, which then grows to two or three times the model.
    shapes = {n: checkpoint.tensors[s]["shape"] for n, s in (in_fp8 or sources).items() if n not in unchanged}
    places = {
        name: (torch.empty(shape, dtype=torch.uint8, device=device), torch.empty(shape[0], 1, device=device))
        for name, shape in shapes.items()
    }
    for name, source in (in_fp8 or sources).items():
        if name in unchanged:
            weight = checkpoint.read(source, device)
            quantized, scale, stored = weight.view(torch.uint8), checkpoint.scale(source, device), weight.dtype
        else:
            weight = checkpoint.read(source, device, torch.float32 if in_fp8 else dtype)
            quantized, scale, stored = *places[name], E4M3
            for place, value in zip(places[name], quantize(changes[source](weight) if source in changes else weight)):
                place.copy_(value)
        model.set_submodule(name, FP8Linear(quantized, scale, model.get_submodule(name).bias, stored))
        del weight
    checkpoint.load(model, model.PREFIXES, device, dtype)  # what is still on the meta device
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = file_name(name, model.PREFIXES)
            if source in changes and parameter.dtype != torch.uint8:
                parameter.copy_(changes[source](parameter))
    return model.requires_grad_(False)

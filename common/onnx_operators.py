"""The ONNX operators that face recognizers are made of, as torch functions: (attributes, *inputs) -> output.

With ONNX's broadcasting and defaults, from opset 7 on; face.py walks a graph's nodes and looks them up here. An
attribute "batch", which no file has, is the batch size that the export was made for.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _window(a: dict, x: Tensor, kernel: list[int], fill: float = 0.0) -> tuple[Tensor, list[int], list[int]]:
    """What the operators with a moving window share: x padded as the attributes say, strides, dilations."""
    strides, dilations = a.get("strides", [1, 1]), a.get("dilations", [1, 1])
    (top, left), (bottom, right) = a.get("pads", [0] * 4)[:2], a.get("pads", [0] * 4)[2:]
    if (auto := a.get("auto_pad", "")).startswith("SAME"):  # the odd pixel goes to the end, or with SAME_LOWER in front
        total = [max((math.ceil(n / s) - 1) * s + k - n, 0) for n, k, s in zip(x.shape[2:], kernel, strides)]
        top, left = ((t + (auto == "SAME_LOWER")) // 2 for t in total)
        bottom, right = total[0] - top, total[1] - left
    pads = (left, right, top, bottom)
    return F.pad(x, pads, value=fill) if any(pads) else x, strides, dilations


def _conv(a: dict, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, strides, dilations = _window(a, x, list(weight.shape[2:]))
    return F.conv2d(x, weight, bias, strides, 0, dilations, a.get("group", 1))


def _max_pool(a: dict, x: Tensor) -> Tensor:
    x, strides, dilations = _window(a, x, a["kernel_shape"], fill=-math.inf)
    return F.max_pool2d(x, a["kernel_shape"], strides, 0, dilations, bool(a.get("ceil_mode")))


def _average_pool(a: dict, x: Tensor) -> Tensor:
    def pool(x: Tensor) -> Tensor:
        x, strides, _ = _window(a, x, a["kernel_shape"])
        return F.avg_pool2d(x, a["kernel_shape"], strides, ceil_mode=bool(a.get("ceil_mode")))

    return pool(x) if a.get("count_include_pad") else pool(x) / pool(torch.ones_like(x[:1, :1]))


def _gemm(a: dict, x: Tensor, y: Tensor, c: Tensor | None = None) -> Tensor:
    out = a.get("alpha", 1.0) * ((x.mT if a.get("transA") else x) @ (y.mT if a.get("transB") else y))
    return out if c is None else out + a.get("beta", 1.0) * c


def _reshape(a: dict, x: Tensor, shape: Tensor) -> Tensor:
    dims = [x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())]
    if x.is_floating_point() and dims[0] == a.get("batch"):  # the exporter's batch size, written as a constant
        dims[0] = len(x)
    return x.reshape(dims)


def _axes(a: dict, axes: Tensor | None) -> list[int] | None:
    return a.get("axes") if axes is None else axes.tolist()  # an attribute before opset 13 (ReduceMean: 18)


def _squeeze(a: dict, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = _axes(a, axes)
    if dims is None:  # every axis of size one, except a batch that happens to be one
        dims = [i for i, size in enumerate(x.shape) if size == 1 and not (i == 0 and "batch" in a)]
    return x.squeeze(dims)


def _unsqueeze(a: dict, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = _axes(a, axes)
    for dim in sorted(d % (x.dim() + len(dims)) for d in dims):
        x = x.unsqueeze(dim)
    return x


def _gather(a: dict, x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.dim()
    index = index.to(x.device) % x.shape[axis]  # negative indices count from the end
    return x.index_select(axis, index.flatten()).reshape(x.shape[:axis] + index.shape + x.shape[axis + 1 :])


def _pad(a: dict, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None) -> Tensor:
    pads = a["pads"] if pads is None else pads.tolist()
    pairs = list(zip(pads[: x.dim()], pads[x.dim() :]))  # torch wants the last axis first
    value = a.get("value", 0.0) if value is None else float(value)
    return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=value)


def _clip(a: dict, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    low, high = a.get("min", low), a.get("max", high)
    return x if low is None and high is None else x.clamp(low, high)


OPERATORS = {
    "Conv": _conv,
    "BatchNormalization": lambda a, x, scale, bias, mean, var: F.batch_norm(
        x, mean, var, scale, bias, eps=a.get("epsilon", 1e-5)
    ),
    "PRelu": lambda a, x, slope: torch.where(x < 0, slope * x, x),
    "Relu": lambda a, x: x.relu(),
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Tanh": lambda a, x: x.tanh(),
    "Add": lambda a, x, y: x + y,
    "Sub": lambda a, x, y: x - y,
    "Mul": lambda a, x, y: x * y,
    "Div": lambda a, x, y: x / y if x.is_floating_point() else x // y,
    "Flatten": lambda a, x: x.flatten(1),
    "Reshape": _reshape,
    "Transpose": lambda a, x: x.permute(a.get("perm", list(range(x.dim()))[::-1])),
    "Gemm": _gemm,
    "MatMul": lambda a, x, y: x @ y,
    "GlobalAveragePool": lambda a, x: x.mean(list(range(2, x.dim())), keepdim=True),
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "Dropout": lambda a, x, *ratio: x,
    "Identity": lambda a, x: x,
    "Constant": lambda a: torch.as_tensor(next(iter(a.values()))),
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")]),
    "Gather": _gather,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": lambda a, *xs: torch.cat(xs, a["axis"]),
    "Pad": _pad,
    "Clip": _clip,
    "ReduceMean": lambda a, x, axes=None: x.mean(_axes(a, axes), keepdim=bool(a.get("keepdims", 1))),
}
REFUSED = {  # variants that would be computed wrongly, and no known model has: (attributes, number of inputs) -> bool
    "Conv": lambda a, n: a.get("auto_pad", "").startswith("SAME") and set(a.get("dilations", [1])) != {1},
    "AveragePool": lambda a, n: set(a.get("dilations", [1])) != {1},
    "BatchNormalization": lambda a, n: a.get("training_mode", 0) != 0,
    "Flatten": lambda a, n: a.get("axis", 1) != 1,
    "Pad": lambda a, n: a.get("mode", "constant") != "constant" or n > 3,
}

"""ONNX files of face recognizers as torch modules: the file, its graph, and the operators that graphs are made of.

Protobuf only: nothing is unpickled and no code of a file runs. Operators are torch functions
(attributes, *inputs) -> output, with ONNX's broadcasting and defaults, from opset 7 on.
"""

import contextlib
import fcntl
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError, blame
from common.images import require_file

RELEASES = "https://github.com/deepinsight/insightface/releases/tag/model-zoo"


def read_onnx(path: str | Path, weights: bool = True):
    """An ONNX file as onnx.ModelProto; `weights` False leaves those in companion files unread. UserError if damaged."""
    import onnx

    require_file(path, "ONNX model")
    with blame(f"{path} cannot be read as an ONNX model", "; fetch it again"):
        model = onnx.load(str(path), format="protobuf", load_external_data=weights)
    if not model.graph.node:  # an empty file is a valid, empty message
        raise UserError(f"{path} holds no ONNX graph (cut short?): fetch it again")
    return model


def input_shapes(graph) -> dict[str, list[int]]:
    """Shape of each input by name, 0 for an open size."""
    weights = {w.name for w in graph.initializer}  # old exporters list them among the inputs
    inputs = [i for i in graph.input if i.name not in weights]
    return {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in inputs}


def refuse_not_finite(path: str | Path) -> None:
    """Raise UserError with the first weight of an ONNX file that holds NaN or infinity."""
    for proto in read_onnx(path).graph.initializer:
        _tensor(proto, str(path))


def _tensor(proto, path: str) -> Tensor:
    """A weight as a tensor, floating point numbers as float32. UserError if it is damaged or not finite."""
    from onnx import numpy_helper

    with blame(f"{path} is damaged: weight {proto.name}", "; fetch it again"):
        value = torch.from_numpy(numpy_helper.to_array(proto).copy())
    if value.isnan().any() or (value.numel() > 1 and value.isinf().any()):  # one infinity may be the bound of a Clip
        raise UserError(f"{path}: weight {proto.name} holds NaN or infinity; fetch the file again")
    return value.float() if value.is_floating_point() else value


def _onnx_files(folder: Path) -> list[Path]:
    # antelopev2's archive holds a folder of its own name: unpacked, its files lie one level too deep.
    return sorted(folder.glob("*.onnx")) or sorted((folder / folder.name).glob("*.onnx"))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block with the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _download(pack: str, root: str) -> None:
    from insightface.utils import download

    with contextlib.redirect_stdout(io.StringIO()):  # names of folders; the progress goes to stderr
        download("models", pack, force=True, root=root)  # force: a broken download left a folder


def pack_files(pack: str | Path, root: str | Path) -> list[Path]:
    """The .onnx files of a model pack: a local folder, or a name under `root`/models, downloaded if it is not there."""
    local = Path(pack).expanduser()
    is_name = local.name == str(pack) and not local.is_dir()
    folder = Path(root).expanduser() / "models" / local if is_name else local
    reason = "it holds no .onnx file" if folder.is_dir() else "there is no such folder"
    if is_name:
        try:
            with _alone(folder.parent):  # processes of torchrun: the first downloads, and the others find the files
                if not _onnx_files(folder):
                    _download(str(pack), str(root))
        except Exception as error:  # requests, zipfile and insightface have classes of their own
            reason = f"its download failed ({type(error).__name__})"
    if files := _onnx_files(folder):
        return files
    raise UserError(f"face model pack {pack}: {reason}; unpack one from {RELEASES} into {folder}")


class OnnxGraph(nn.Module):
    """A graph with one input and one output. Frozen: its weights are float32 buffers, outside the state_dict.

    It takes any batch size, also where the export was made for one. UserError, with file and node, for an operator that
    is computed differently here or not at all.
    """

    def __init__(self, model, path: str | Path):
        super().__init__()
        graph = model.graph
        opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
        if opset < 7:
            raise UserError(f"{path} is written for ONNX opset {opset}, 7 is the oldest known; export it again")
        ((self.input, shape),) = input_shapes(graph).items()
        self.output = graph.output[0].name
        constants = {w.name: _tensor(w, str(path)) for w in graph.initializer} | {"": None}
        computed = {self.input}
        self.nodes: list[tuple[str, dict, list[str], str]] = []  # operator, attributes, inputs, output
        for node in graph.node:
            where = f"operator {node.op_type} (node {node.name or node.output[0]}) of {path}"
            if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
                raise UserError(f"unknown {where}; add it to common/onnx_reader.py or export without it")
            a = {proto.name: _attribute(proto, str(path)) for proto in node.attribute}
            if node.op_type in REFUSED and REFUSED[node.op_type](a, len(node.input)):
                raise UserError(f"attributes of {where} are not supported; export in inference mode, without them")
            if missing := [name for name in node.input if name not in constants and name not in computed]:
                raise UserError(f"{where} reads {missing[0]}, which nothing before it computes; export it again")
            if computed.isdisjoint(node.input):  # weights reshaped, shapes concatenated: computed once, here
                with blame(f"{where} cannot be computed", "; fetch the file again"):
                    constants[node.output[0]] = OPERATORS[node.op_type](a, *[constants[name] for name in node.input])
            else:
                a["batch"] = shape[0] or 1  # the batch size of the export, which constants of the graph may repeat
                self.nodes.append((node.op_type, a, list(node.input), node.output[0]))
                computed.add(node.output[0])
        if self.output not in computed:
            raise UserError(f"the output {self.output} of {path} does not depend on its input; export it again")
        last = {name: i for i, (_, _, inputs, _) in enumerate(self.nodes) for name in inputs} | {self.output: -1}
        self.dead = [[n for n in set(node[2]) if last[n] == i] for i, node in enumerate(self.nodes)]
        self.buffer_of, self.integers = {}, {"": None}  # integers are shapes and stay on the CPU, where they are read
        for name in (name for name in last if name in constants and name):
            if constants[name].is_floating_point():
                self.buffer_of[name] = f"weight_{len(self.buffer_of)}"
                self.register_buffer(self.buffer_of[name], constants[name], persistent=False)
            else:
                self.integers[name] = constants[name]

    def forward(self, x: Tensor) -> Tensor:
        """The graph's output for x, in the precision of the weights, under autocast too."""
        values = self.integers | {name: getattr(self, buffer) for name, buffer in self.buffer_of.items()}
        with torch.autocast(x.device.type, enabled=False):
            values[self.input] = x.to(next(self.buffers()).dtype)
            for (operator, a, inputs, output), dead in zip(self.nodes, self.dead):
                values[output] = OPERATORS[operator](a, *[values[name] for name in inputs])
                for name in dead:  # free what no later node reads
                    del values[name]
        return values[self.output]


def _attribute(proto, path: str):
    from onnx import TensorProto, helper

    value = helper.get_attribute_value(proto)
    value = value.decode() if isinstance(value, bytes) else value
    return _tensor(value, path) if isinstance(value, TensorProto) else value


def _window(a: dict, x: Tensor, kernel: list[int], fill: float = 0.0) -> tuple[Tensor, list[int], list[int]]:
    """For operators with a moving window: x padded by the attributes, strides, dilations."""
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
    ones = [i for i, size in enumerate(x.shape) if size == 1 and not (i == 0 and "batch" in a)]  # a batch may be one
    dims = _axes(a, axes)
    return x.squeeze(ones if dims is None else dims)


def _unsqueeze(a: dict, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = _axes(a, axes)
    for dim in sorted(d % (x.dim() + len(dims)) for d in dims):
        x = x.unsqueeze(dim)
    return x


def _pad(a: dict, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None) -> Tensor:
    pads = a["pads"] if pads is None else pads.tolist()
    pairs = np.reshape(pads, (2, -1)).T[::-1]  # front and end of each axis; torch wants the last axis first
    return F.pad(x, pairs.flatten().tolist(), value=a.get("value", 0.0) if value is None else float(value))


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
    "Gather": lambda a, x, index: x[(slice(None),) * (a.get("axis", 0) % x.dim()) + (index,)],
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": lambda a, *xs: torch.cat(xs, a["axis"]),
    "Pad": _pad,
    "Clip": _clip,
    "ReduceMean": lambda a, x, axes=None: x.mean(_axes(a, axes), keepdim=bool(a.get("keepdims", 1))),
}
REFUSED = {  # variants that no known model has, and that are not computed here: (attributes, number of inputs) -> bool
    "Conv": lambda a, n: a.get("auto_pad", "").startswith("SAME") and set(a.get("dilations", [1])) != {1},
    "AveragePool": lambda a, n: set(a.get("dilations", [1])) != {1},
    "BatchNormalization": lambda a, n: a.get("training_mode", 0) != 0,
    "Flatten": lambda a, n: a.get("axis", 1) != 1,
    "Pad": lambda a, n: a.get("mode", "constant") != "constant" or n > 3,
}

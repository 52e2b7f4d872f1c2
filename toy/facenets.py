"""Two small face networks in the shapes of InsightFace's, with their losses, which write themselves as ONNX.

    Detector     (B, 3, 128, 128) ──> at 8, 16 and 32 pixels a cell, two anchors in each: score, box, landmarks
                                      trained by a focal loss and distances in strides: SCRFD
    Recognizer   (B, 3, 112, 112) ──> 64 numbers, trained so that cos(theta + m) wins among many people: ArcFace

The paper's identity losses (Eq. 8-10) run on files that InsightFace publishes. toy_faces.py trains these for the drawn
people; what they save are files of the same kind, with the batch norms folded into the convolutions.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import whole_file
from face import CROP

SIDE = 128  # of the detector's input
ANCHORS = {8: (16, 28), 16: (48, 76), 32: (112, 160)}  # stride -> the longer side of the face that each anchor is for
WIDTH = 64  # of an embedding
SCALE = 32.0  # s of ArcFace


# ---------------------------------------------------------------------------------------------------------------------
# Networks


class Graph:
    """An ONNX graph in the making."""

    def __init__(self):
        self.nodes, self.weights = [], []

    def weight(self, values: np.ndarray | list | Tensor, kind: type = np.float32) -> str:
        from onnx import numpy_helper

        values = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
        self.weights.append(numpy_helper.from_array(np.asarray(values, kind), f"w{len(self.weights)}"))
        return self.weights[-1].name

    def add(self, operator: str, *inputs: str, **attributes: object) -> str:
        from onnx import helper

        name = f"{operator}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name, **attributes))
        return name

    def save(
        self, path: Path, shape: list[int | str], outputs: dict[str, list[int | str]], told: dict[str, str]
    ) -> None:
        import onnx
        from onnx import TensorProto, helper

        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()]
        frame = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, path.stem, [frame], values, self.weights)
        opset = [helper.make_opsetid("", 11)]
        text = "; ".join(f"{key}: {value}" for key, value in told.items())
        model = helper.make_model(graph, opset_imports=opset, ir_version=7, producer_name="toy_faces", doc_string=text)
        helper.set_model_props(model, told)
        with whole_file(path) as temporary:
            onnx.save(model, str(temporary))


def _folded(weight: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear map with the batch norm that follows it."""
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * gain.view(-1, *[1] * (weight.dim() - 1)), norm.bias - norm.running_mean * gain


class Conv(nn.Module):
    """Convolution, batch norm, PReLU; one node and one more in ONNX."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, bend: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.bend = nn.PReLU(outputs) if bend else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return x if self.bend is None else self.bend(x)

    def write(self, graph: Graph, x: str) -> str:
        kernel, stride, pad = self.conv.kernel_size, self.conv.stride, self.conv.padding
        weight, bias = _folded(self.conv.weight, self.norm)
        x = graph.add(
            "Conv", x, graph.weight(weight), graph.weight(bias), kernel_shape=kernel, strides=stride, pads=pad * 2
        )
        return x if self.bend is None else graph.add("PRelu", x, graph.weight(self.bend.weight.view(-1, 1, 1)))


class Residual(nn.Module):
    """x plus two convolutions of it."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = Conv(width, width), Conv(width, width, bend=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))

    def write(self, graph: Graph, x: str) -> str:
        return graph.add("Add", x, self.second.write(graph, self.first.write(graph, x)))


class Detector(nn.Module):
    """(B, 3, 128, 128) -> scores before the sigmoid (B, A), boxes (B, A, 4) and landmarks (B, A, 10) in strides."""

    def __init__(self):
        super().__init__()
        widths = 32, 44, 44
        fine = [Conv(3, 24, kernel=7, stride=4), Conv(24, widths[0], stride=2)]
        self.levels = nn.ModuleList(
            [
                nn.Sequential(*fine, Conv(widths[0], widths[0])),
                nn.Sequential(Conv(widths[0], widths[1], stride=2), Conv(widths[1], widths[1])),
                nn.Sequential(Conv(widths[1], widths[2], stride=2), Conv(widths[2], widths[2])),
            ]
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, 2 * (1 + 4 + 10), 3, 1, 1) for width in widths)
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.constant_(head.bias[:2], -4.0)  # almost nowhere is a face

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = []
        for level, head in zip(self.levels, self.heads):
            x = level(x)
            found.append(head(x).permute(0, 2, 3, 1).flatten(1, 2))  # (B, cells, 30)
        out = torch.cat(found, 1)
        n = len(out)
        return out[..., :2].reshape(n, -1), out[..., 2:10].reshape(n, -1, 4), out[..., 10:].reshape(n, -1, 10)

    def save(self, path: Path, told: dict[str, str]) -> None:
        graph, x, names = Graph(), "input.1", {1: [], 4: [], 10: []}
        for level, head in zip(self.levels, self.heads):
            for conv in level:
                x = conv.write(graph, x)
            for (size, outputs), first in zip(names.items(), (0, 2, 10)):
                part = slice(first, first + 2 * size)
                y = graph.add(
                    "Conv",
                    x,
                    graph.weight(head.weight[part]),
                    graph.weight(head.bias[part]),
                    kernel_shape=[3, 3],
                    pads=[1] * 4,
                )
                y = graph.add("Transpose", y, perm=[0, 2, 3, 1])
                y = graph.add("Reshape", y, graph.weight([-1, size], np.int64))
                outputs.append(graph.add("Sigmoid", y) if size == 1 else y)
        outputs = {
            name: [2 * (SIDE // stride) ** 2, size]
            for size, found in names.items()
            for name, stride in zip(found, ANCHORS)
        }
        graph.save(path, [1, 3, SIDE, SIDE], outputs, told)


class Recognizer(nn.Module):
    """(B, 3, 112, 112) -> (B, 64): a small IResNet."""

    def __init__(self):
        super().__init__()
        stem = [Conv(3, 32, kernel=7, stride=4), Residual(32)]  # a crop of a small frame is blown up: no detail is lost
        body = [Conv(32, 64, stride=2), Residual(64), Conv(64, 96, stride=2), Residual(96)]
        self.body = nn.Sequential(*stem, *body, Conv(96, 24, kernel=1))
        self.last = nn.Linear(24 * (CROP // 16) ** 2, WIDTH, bias=False)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.last(self.body(x).flatten(1)))

    def save(self, path: Path, told: dict[str, str]) -> None:
        graph, x = Graph(), "input.1"
        for part in self.body:
            x = part.write(graph, x)
        weight, bias = _folded(self.last.weight, self.norm)
        x = graph.add("Gemm", graph.add("Flatten", x), graph.weight(weight), graph.weight(bias), transB=1)
        graph.save(path, ["n", 3, CROP, CROP], {x: ["n", WIDTH]}, told)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def anchor_grid() -> tuple[Tensor, Tensor, Tensor]:
    """Of all anchors: upper left corner of the cell (A, 2), stride (A,), size of face (A,)."""
    corners, strides, sizes = [], [], []
    for stride, pair in ANCHORS.items():
        index = torch.arange(0, SIDE, stride).float()
        yx = torch.stack(torch.meshgrid(index, index, indexing="ij"), -1).reshape(-1, 2)
        corners.append(yx.flip(1).repeat_interleave(2, 0))
        strides.append(torch.full((2 * len(yx),), float(stride)))
        sizes.append(torch.tensor(pair).float().repeat(len(yx)))
    return torch.cat(corners), torch.cat(strides), torch.cat(sizes)


def detector_loss(found: tuple[Tensor, Tensor, Tensor], box: Tensor, points: Tensor, grid: tuple) -> Tensor:
    """found: what the network says; box (B, 4) and points (B, 5, 2) in pixels of the input, NaN where no face is.

    An anchor is to say yes if the face's centre is within a stride of it and the face is of about its size; it may say
    what it likes if both are nearly so. Focal loss for the score; boxes and landmarks count where the answer is yes.
    """
    (score, distance, kps), (corner, stride, size) = found, grid
    centre, side = (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]).amax(1, keepdim=True)  # (B, 2), (B, 1)
    off = ((corner - centre[:, None]).abs() / stride[:, None]).amax(2)  # (B, A), NaN without a face
    ratio = (side / size).log().abs()
    yes = (off <= 0.8) & (ratio <= 0.33)
    maybe = (off <= 1.6) & (ratio <= 0.7) & ~yes
    p = score.sigmoid()
    focal = F.binary_cross_entropy_with_logits(score, yes.float(), reduction="none") * (yes.float() - p).square()
    count = yes.sum().clamp(min=1)
    loss = 2 * torch.where(maybe, 0, focal).sum() / count
    row, anchor = yes.nonzero(as_tuple=True)
    at, unit = corner[anchor], stride[anchor, None]
    true_box = torch.cat([at - box[row, :2], box[row, 2:] - at], 1) / unit
    true_kps = ((points[row] - at[:, None]) / unit[:, None]).flatten(1)
    weight = stride[anchor, None] / side[row] * 8  # errors as parts of the face
    off_box = F.smooth_l1_loss(distance[row, anchor], true_box, reduction="none", beta=0.05) * weight
    off_kps = F.smooth_l1_loss(kps[row, anchor], true_kps, reduction="none", beta=0.05) * weight
    return loss + off_box.sum() / count / 4 + 2 * off_kps.sum() / count / 10


def arc_loss(e: Tensor, centres: Tensor, label: Tensor, margin: float) -> Tensor:
    """Additive angular margin: e (B, E), centres (people, E); the true person's angle counts as `margin` more."""
    cosine = F.normalize(e) @ F.normalize(centres).T
    true = cosine.gather(1, label[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
    harder = (true.acos() + margin).clamp(max=torch.pi).cos()
    return F.cross_entropy(SCALE * cosine.scatter(1, label[:, None], harder), label)

"""Two small face networks in the shapes of InsightFace's, their losses, and their export as ONNX.

    Detector     (B, 3, 128, 128) ──> cells of 8, 16 and 32 pixels, two anchors in each: score, box, landmarks
                                      trained by a focal loss and by distances in strides: SCRFD
    Recognizer   (B, 3, 112, 112) ──> 64 numbers, trained so that cos(theta + m) wins among many people: ArcFace

toy/faces.py trains them on drawn people. face.py and insightface read the files like any other pack.
"""

import io
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import whole_file
from face import CROP

SIDE = 128  # of the detector's input, pixels
ANCHORS = {8: (16, 28), 16: (48, 76), 32: (112, 160)}  # stride -> longer side of the face that each anchor is for
WIDTH, SCALE = 64, 32.0  # numbers in an embedding; s of ArcFace


def save_onnx(net: nn.Module, path: Path, side: int, outputs: list[str], metadata: dict[str, str]) -> None:
    """Export a network in eval mode. PyTorch folds the batch norms behind convolutions into their weights.

    The exporter is the one based on TorchScript: the newer one needs the package onnxscript and writes a newer opset
    than InsightFace's own files have. One output means a free batch size, several a batch of one, as in those files.
    """
    import onnx

    buffer, axes = io.BytesIO(), {"input.1": {0: "n"}, outputs[0]: {0: "n"}} if len(outputs) == 1 else None
    options = {"input_names": ["input.1"], "output_names": outputs, "dynamic_axes": axes, "opset_version": 11}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.zeros(1, 3, side, side),), buffer, dynamo=False, **options)
    model = onnx.load_model_from_string(buffer.getvalue())
    model.doc_string = "; ".join(f"{key}: {value}" for key, value in metadata.items())
    onnx.helper.set_model_props(model, metadata)
    with whole_file(path) as temporary:
        onnx.save(model, str(temporary))


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, bend: bool = True) -> nn.Sequential:
    """Convolution, batch norm, PReLU."""
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *[nn.PReLU(outputs)] * bend)


class Residual(nn.Sequential):
    """Two convolutions of x, added to x."""

    def __init__(self, width: int):
        super().__init__(conv(width, width), conv(width, width, bend=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Detector(nn.Module):
    """(B, 3, 128, 128) -> scores before the sigmoid (B, A), boxes (B, A, 4) and landmarks (B, A, 10) in strides."""

    def __init__(self):
        super().__init__()
        fine = nn.Sequential(conv(3, 24, kernel=7, stride=4), conv(24, 32, stride=2), conv(32, 32))
        coarser = [nn.Sequential(conv(width, 44, stride=2), conv(44, 44)) for width in (32, 44)]
        self.levels = nn.ModuleList([fine, *coarser])
        self.heads = nn.ModuleList(nn.Conv2d(width, 2 * (1 + 4 + 10), 3, 1, 1) for width in (32, 44, 44))
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.constant_(head.bias[:2], -4.0)  # a face is rare

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        levels = []
        for level, head in zip(self.levels, self.heads):
            x = level(x)
            levels.append(head(x).permute(0, 2, 3, 1).flatten(1, 2))  # (B, cells, 30)
        out = torch.cat(levels, 1)
        n = len(out)
        return out[..., :2].reshape(n, -1), out[..., 2:10].reshape(n, -1, 4), out[..., 10:].reshape(n, -1, 10)

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        names = [f"{part}_{stride}" for part in ("score", "box", "landmarks") for stride in ANCHORS]
        save_onnx(ByStride(self).eval(), path, SIDE, names, metadata)


class ByStride(nn.Module):
    """A detector with InsightFace's nine outputs: probabilities (2 cells, 1), boxes, landmarks, each for 3 strides."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        score, box, points = self.detector(x)
        counts = [2 * (SIDE // stride) ** 2 for stride in ANCHORS]
        parts = score.sigmoid()[0, :, None], box[0], points[0]  # (A, 1), (A, 4), (A, 10)
        return tuple(piece for part in parts for piece in part.split(counts))


class Recognizer(nn.Sequential):
    """(B, 3, 112, 112) -> (B, 64): a small IResNet."""

    def __init__(self):
        stem = [conv(3, 32, kernel=7, stride=4), Residual(32)]  # crops are enlarged small frames: no detail is lost
        body = [conv(32, 64, stride=2), Residual(64), conv(64, 96, stride=2), Residual(96), conv(96, 24, kernel=1)]
        last = nn.Linear(24 * (CROP // 16) ** 2, WIDTH, bias=False)
        super().__init__(*stem, *body, nn.Flatten(), last, nn.BatchNorm1d(WIDTH))

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        save_onnx(self, path, CROP, ["embedding"], metadata)


def anchor_grid() -> tuple[Tensor, Tensor, Tensor]:
    """For each anchor: upper left corner of its cell (A, 2), stride (A,), size of its face (A,)."""
    corners, strides, sizes = [], [], []
    for stride, pair in ANCHORS.items():
        index = torch.arange(0, SIDE, stride).float()
        yx = torch.cartesian_prod(index, index)  # (cells, 2)
        corners.append(yx.flip(1).repeat_interleave(2, 0))
        strides.append(torch.full((2 * len(yx),), float(stride)))
        sizes.append(torch.tensor(pair).float().repeat(len(yx)))
    return torch.cat(corners), torch.cat(strides), torch.cat(sizes)


def detector_loss(output: tuple[Tensor, Tensor, Tensor], box: Tensor, points: Tensor, grid: tuple) -> Tensor:
    """Focal loss of the scores, plus the errors of boxes and landmarks at positive anchors.

    `box` (B, 4) and `points` (B, 5, 2) are the truth in pixels of the input, NaN without a face. An anchor is positive
    if the face's centre is within a stride of it and the face has about its size. The focal loss leaves out anchors
    that nearly meet both conditions.
    """
    (score, distance, kps), (corner, stride, size) = output, grid
    centre, side = (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]).amax(1, keepdim=True)  # (B, 2), (B, 1)
    off = ((corner - centre[:, None]).abs() / stride[:, None]).amax(2)  # (B, A), NaN without a face
    ratio = (side / size).log().abs()
    positive = (off <= 0.8) & (ratio <= 0.33)
    unclear = (off <= 1.6) & (ratio <= 0.7) & ~positive
    count, label = positive.sum().clamp(min=1), positive.float()
    focal = F.binary_cross_entropy_with_logits(score, label, reduction="none") * (label - score.sigmoid()).square()
    loss = 2 * torch.where(unclear, 0, focal).sum() / count
    row, anchor = positive.nonzero(as_tuple=True)
    at, unit = corner[anchor], stride[anchor, None]
    true_box = torch.cat([at - box[row, :2], box[row, 2:] - at], 1) / unit
    true_kps = ((points[row] - at[:, None]) / unit[:, None]).flatten(1)
    weight = stride[anchor, None] / side[row] * 8  # errors as parts of the face
    off_box = F.smooth_l1_loss(distance[row, anchor], true_box, reduction="none", beta=0.05) * weight
    off_kps = F.smooth_l1_loss(kps[row, anchor], true_kps, reduction="none", beta=0.05) * weight
    return loss + off_box.sum() / count / 4 + 2 * off_kps.sum() / count / 10


def arc_loss(e: Tensor, centres: Tensor, label: Tensor, margin: float) -> Tensor:
    """Cross-entropy of cosines to `centres` (people, E), with a margin on the angle of e (B, E) to its own centre."""
    cosine = F.normalize(e) @ F.normalize(centres).T
    true = cosine.gather(1, label[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
    harder = (true.acos() + margin).clamp(max=torch.pi).cos()
    return F.cross_entropy(SCALE * cosine.scatter(1, label[:, None], harder), label)

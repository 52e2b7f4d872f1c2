"""Eq. 8 piece by piece against what insightface itself computes: skimage's Umeyama, OpenCV's warp, onnxruntime.

The recognition models are small graphs built here with onnx.helper in the ways real exporters write them; the detector
is a hand-weighted SCRFD that fires on red squares, loaded by insightface unchanged.
"""

import math
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from skimage.transform import SimilarityTransform

from common import onnx_reader
from common.errors import UserError
from face import ARCFACE_TEMPLATE, ArcFace, FaceDetector, align, embed, recognition_file, similarity_matrix

torch.set_num_threads(2)
onnxruntime.set_default_logger_severity(3)

# OpenCV 5 interpolates in floating point; OpenCV 4 rounds coordinates to 1/32 pixel, which noise shows most.
NOISE_LEVELS = 0.6 if int(cv2.__version__.split(".")[0]) >= 5 else 255 * 2 / 32


def test_of_many_processes_one_downloads_and_all_find_the_whole_pack(tmp_path, monkeypatch):
    downloads = []

    def download(pack, root):
        downloads.append(pack)
        folder = Path(root) / "models" / pack
        for name in ("detector.onnx", "recognizer.onnx"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
            time.sleep(0.05)  # meanwhile the pack is there, and not whole

    monkeypatch.setattr(onnx_reader, "_download", download)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: onnx_reader.pack_files("pack", tmp_path), range(8)))
    assert downloads == ["pack"]
    assert [[path.name for path in files] for files in found] == [["detector.onnx", "recognizer.onnx"]] * 8


# ---------------------------------------------------------------------------------------------------------------------
# Alignment


def umeyama(points: np.ndarray) -> np.ndarray:
    """skimage's similarity from points onto the template, (2, 3), by whichever name its version has for it."""
    target = ARCFACE_TEMPLATE.double().numpy()
    if hasattr(SimilarityTransform, "from_estimate"):
        return SimilarityTransform.from_estimate(points, target).params[:2]
    transform = SimilarityTransform()  # scikit-image 0.25, the last for Python 3.10
    assert transform.estimate(points, target)
    return transform.params[:2]


def random_landmarks(n: int, height: int, width: int, seed: int, anywhere: bool = True) -> np.ndarray:
    """Turned, scaled, shifted and dented templates; with `anywhere`, many of them partly or wholly outside."""
    rng = np.random.default_rng(seed)
    faces = []
    for _ in range(n):
        scale, angle = rng.uniform(0.3, 3), rng.uniform(-math.pi, math.pi)
        turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        center = rng.uniform(*((0, 1) if anywhere else (0.4, 0.6)), 2) * [width, height]
        faces.append((ARCFACE_TEMPLATE.numpy() - 56) @ turn.T + center + rng.normal(0, 3 * scale, (5, 2)))
    return np.stack(faces).astype(np.float32)  # (n, 5, 2)


def to_frames(image: np.ndarray, n: int = 1) -> torch.Tensor:
    """uint8 (H, W, 3) -> (n, 3, H, W) in [-1, 1]."""
    return (torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1).expand(n, -1, -1, -1)


def norm_crops(image: np.ndarray, landmarks: np.ndarray) -> torch.Tensor:
    from insightface.utils.face_align import norm_crop

    with warnings.catch_warnings():  # insightface calls a method that skimage deprecates
        warnings.simplefilter("ignore")
        return torch.cat([to_frames(norm_crop(image, points)) for points in landmarks])


def test_similarity_matrix_is_umeyama():
    landmarks = random_landmarks(40, 480, 832, seed=0).astype(np.float64)
    landmarks[0] = landmarks[0] * [-1, 1] + [832, 0]  # mirrored: the best similarity must not reflect
    ours = similarity_matrix(torch.from_numpy(landmarks))
    for matrix, points in zip(ours, landmarks):
        truth = umeyama(points)
        np.testing.assert_allclose(matrix.numpy(), truth, atol=1e-8)
    single = similarity_matrix(torch.from_numpy(landmarks).float())
    assert (single - ours).abs().max() < 1e-4


@pytest.mark.parametrize("height, width", [(480, 832), (64, 64)])
def test_align_is_norm_crop(height, width):
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.uint8)
    smooth = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 6), None, 0, 255, cv2.NORM_MINMAX)
    white = np.full_like(noise, 255)  # the border alone: half-covered pixels are blended with black
    landmarks = random_landmarks(24, height, width, seed=2)
    for image, levels in ((smooth, 1.0), (noise, NOISE_LEVELS), (white, NOISE_LEVELS)):
        truth = norm_crops(image, landmarks)
        ours = align(to_frames(image, len(landmarks)), torch.from_numpy(landmarks))
        assert ours.shape == (24, 3, 112, 112) and ours.dtype == torch.float32
        assert 0.05 < (truth == -1).float().mean() < 0.95  # faces partly out of the image are among them
        error = (ours - truth).abs() * 127.5  # norm_crop rounds to whole levels: 0.5 is no error
        assert error.max() < levels, (error.max(), error.mean())
        assert error.mean() < 0.5


def test_align_takes_pixel_centers_at_integers():
    """The template itself, shifted by whole pixels, copies pixels; and nothing is left of -1 but what is outside."""
    frames = torch.rand(1, 3, 150, 140) * 2 - 1
    crop = align(frames, (ARCFACE_TEMPLATE + torch.tensor([20.0, 30.0]))[None])
    torch.testing.assert_close(crop, frames[:, :, 30:142, 20:132], atol=1e-4, rtol=0)


def test_align_gradient_reaches_frames_not_landmarks():
    frames = (torch.rand(2, 3, 40, 50, dtype=torch.float64) * 2 - 1).requires_grad_()
    landmarks = torch.from_numpy(random_landmarks(2, 40, 50, seed=3, anywhere=False)).double().requires_grad_()
    weight = torch.randn(2, 3, 112, 112, dtype=torch.float64)

    def f(x):
        return (align(x, landmarks) * weight).sum()

    value = f(frames)
    (gradient,) = torch.autograd.grad(value, frames)
    direction = torch.randn_like(frames)
    finite = (f(frames + 0.5 * direction) - f(frames - 0.5 * direction)).item()  # the warp is linear in the pixels
    assert abs((gradient * direction).sum().item() - finite) < 1e-8 * abs(finite)
    assert finite != 0 and not align(frames.detach(), landmarks).requires_grad


def test_align_without_a_face_is_black_and_has_no_nan():
    frames = torch.rand(7, 3, 32, 32).requires_grad_()
    landmarks = torch.zeros(7, 5, 2)  # row 0: what detect gives where there is no face
    landmarks[1] = ARCFACE_TEMPLATE / 400 + 17.3  # a face of a third of a pixel
    landmarks[2] = ARCFACE_TEMPLATE / 4
    landmarks[2, 3, 1] = math.nan
    landmarks[3] = ARCFACE_TEMPLATE / 4
    landmarks[3, 0, 0] = math.inf
    landmarks[4] = ARCFACE_TEMPLATE * 1e12  # far outside
    landmarks[5] = torch.tensor([[1.0, 1], [9, 1], [5, 5], [9, 9], [1, 9]]).flip(1)  # a mirrored face, small but sound
    landmarks[6] = ARCFACE_TEMPLATE / 4
    matrix = similarity_matrix(landmarks)
    assert matrix.isfinite().all() and (matrix[:4] == 0).all() and (matrix[4:] != 0).any(2).all()
    crops = align(frames, landmarks)
    assert (crops[:4] == -1).all() and crops.isfinite().all() and (crops[5:] > -1).flatten(1).any(1).all()
    (gradient,) = torch.autograd.grad(crops.square().sum(), frames)
    assert gradient.isfinite().all() and (gradient[:4] == 0).all()
    assert (gradient[5:] != 0).flatten(1).any(1).all()
    assert align(frames[:0], landmarks[:0]).shape == (0, 3, 112, 112)


def test_align_keeps_float32_coordinates_in_bfloat16():
    image = cv2.GaussianBlur(np.random.default_rng(4).integers(0, 256, (300, 400, 3)).astype(np.uint8), (0, 0), 3)
    frames = to_frames(image).bfloat16()
    landmarks = torch.from_numpy(random_landmarks(1, 300, 400, seed=5, anywhere=False))
    truth = align(frames.float(), landmarks)
    assert torch.equal(align(frames, landmarks), truth) and truth.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(align(frames, landmarks), truth)


# ---------------------------------------------------------------------------------------------------------------------
# ArcFace: graphs as exporters write them, against onnxruntime


class Graph:
    """A growing ONNX graph with random weights; methods append a node and return the name of its output."""

    def __init__(self, seed: int = 0, batch="n"):
        self.rng, self.nodes, self.weights, self.batch, self.count = np.random.default_rng(seed), [], [], batch, 0

    def weight(self, value) -> str:
        name = f"w.{len(self.weights)}"  # dots, as PyTorch's exporter has them
        value = np.asarray(value, np.int64 if np.asarray(value).dtype.kind == "i" else np.float32)
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def normal(self, *shape, scale=1.0) -> str:
        return self.weight(self.rng.normal(0, scale, shape))

    def add(self, op: str, *inputs: str, name: str | None = None, **attributes) -> str:
        self.count += 1
        output = f"{op.lower()}.{self.count}"
        self.nodes.append(helper.make_node(op, inputs, [output], name or f"{op}_{self.count}", **attributes))
        return output

    def conv(self, x, channels, out, kernel=3, stride=2, group=1, bias=True, **attributes):
        weight = self.normal(out, channels // group, kernel, kernel, scale=(channels // group * kernel**2) ** -0.5)
        attributes.setdefault("pads", [kernel // 2] * 4)
        if "auto_pad" in attributes:
            del attributes["pads"]
        bias = [self.normal(out)] if bias else []
        return self.add("Conv", x, weight, *bias, kernel_shape=[kernel] * 2, strides=[stride] * 2, group=group,
                        **attributes)  # fmt: skip

    def norm(self, x, channels, **attributes):
        scale, bias, mean = (self.normal(channels) for _ in range(3))
        var = self.weight(self.rng.uniform(0.5, 2, channels))
        return self.add("BatchNormalization", x, scale, bias, mean, var, **attributes)

    def prelu(self, x, channels):
        return self.add("PRelu", x, self.weight(self.rng.uniform(-0.2, 0.5, (channels, 1, 1))))

    def block(self, x, channels):
        """IResNet's residual block: BN, conv, BN, PReLU, conv, BN, add."""
        y = self.norm(x, channels)
        y = self.prelu(self.norm(self.conv(y, channels, channels, stride=1, bias=False), channels), channels)
        return self.add("Add", self.norm(self.conv(y, channels, channels, stride=1), channels), x)

    def body(self, x="input.1"):
        """-> (n, 16, 7, 7)"""
        x = self.prelu(self.conv(x, 3, 8), 8)
        x = self.block(x, 8)
        x = self.conv(x, 8, 16)
        x = self.block(x, 16)
        return self.norm(self.conv(self.conv(x, 16, 16), 16, 16), 16)

    def save(self, path: Path, output: str, shape=("n", 16), size=(3, 112, 112), opset=11, **options) -> Path:
        inputs = [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [self.batch, *size])]
        if options.get("weights_as_inputs"):  # as exporters did before IR version 4
            inputs += [helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in self.weights]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)]
        graph = helper.make_graph(self.nodes, "net", inputs, outputs, self.weights)
        opsets = [helper.make_opsetid("", opset)] + [helper.make_opsetid("custom", 1)] * bool(options.get("custom"))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=7)
        onnx.save(model, str(path))
        return path


def build_iresnet(path: Path) -> Path:
    """As w600k_r50: dynamic batch, Flatten, Gemm, BatchNormalization on (n, E)."""
    g = Graph(1)
    x = g.add("Flatten", g.add("Dropout", g.body()))
    x = g.add("Gemm", x, g.normal(16, 16 * 49, scale=0.03), g.normal(16), alpha=1.5, beta=0.5, transB=1)
    return g.save(path, g.norm(x, 16, epsilon=2e-5))


def build_mxnet(path: Path) -> Path:
    """0..255 in, normalized by the graph's first two nodes; weights also listed as inputs; opset 8; Reshape head."""
    g = Graph(2)
    x = g.add("Sub", "input.1", g.weight([127.5]), name="_minusscalar0")
    x = g.body(g.add("Mul", x, g.weight([0.0078125]), name="_mulscalar0"))
    x = g.add("Reshape", g.add("Identity", x), g.weight([0, -1]))
    x = g.add("MatMul", x, g.normal(16 * 49, 16, scale=0.03))
    return g.save(path, g.norm(x, 16), opset=8, weights_as_inputs=True)


def build_named_otherwise(path: Path) -> Path:
    """Sub and Mul in front, but under names that insightface does not recognize: it feeds [-1, 1]. (n, E, 1, 1) out."""
    g = Graph(3)
    x = g.add("Sub", "input.1", g.weight([0.1]), name="/Sub")
    x = g.body(g.add("Mul", x, g.weight([2.0]), name="/Mul"))
    x = g.add("GlobalAveragePool", x)
    g.add("Identity", x)  # leads nowhere
    return g.save(path, x, shape=("n", 16, 1, 1))


def build_fixed_batch(path: Path) -> Path:
    """As PyTorch exports with batch 1: every reshape has it written in."""
    g = Graph(4, batch=1)
    x = g.add("Reshape", g.body(), g.weight([1, -1]))
    x = g.add("Gemm", x, g.normal(16 * 49, 16, scale=0.03))
    x = g.add("Reshape", x, g.weight([1, 16, 1, 1]))
    return g.save(path, g.add("Squeeze", g.norm(x, 16), axes=[2, 3]), shape=(1, 16))


def build_fixed_batch_squeeze(path: Path) -> Path:
    """Batch 1, and a Squeeze of all axes of size one: the output has no batch axis at all."""
    g = Graph(5, batch=1)
    return g.save(path, g.add("Squeeze", g.add("ReduceMean", g.body(), axes=[2, 3], keepdims=1)), shape=(16,))


def build_view(path: Path) -> Path:
    """`x.view(x.size(0), -1)`: Shape, Gather, Unsqueeze, Concat, Reshape; attributes as inputs (opset 13)."""
    g = Graph(6)
    x = g.add("Clip", g.body(), "", g.weight(1.5))
    size = g.add("Gather", g.add("Shape", x), g.weight(-4), axis=0)
    rest = g.add("Constant", value=numpy_helper.from_array(np.array([-1], np.int64)))
    shape = g.add("Concat", g.add("Unsqueeze", size, g.weight([0])), rest, axis=0)
    x = g.add("Reshape", g.add("Transpose", x, perm=[0, 2, 3, 1]), shape)
    x = g.add("Mul", g.add("MatMul", x, g.normal(16 * 49, 16, scale=0.03)), g.add("Constant", value_float=0.5))
    return g.save(path, x, opset=13)


def build_opset18(path: Path) -> Path:
    """As newer exporters: Shape of a range, axes as inputs, negative ones, out of order; and a transposed Gemm."""
    g = Graph(8)
    x = g.add("ReduceMean", g.body(), g.weight([-1]), keepdims=1)  # (n, 16, 7, 1)
    shape = g.add("Concat", g.add("Shape", x, start=0, end=1), g.weight([16 * 7]), axis=0)
    x = g.add("Transpose", g.add("Reshape", x, shape, allowzero=1))  # (112, n)
    x = g.add("Gemm", x, g.normal(16 * 7, 16, scale=0.1), transA=1)
    x = g.add("Squeeze", g.add("Unsqueeze", x, g.weight([3, -3])), g.weight([-1, 1]))  # (n, 1, 16, 1) and back
    return g.save(path, x, opset=18)


def build_mobile(path: Path) -> Path:
    """Depthwise and grouped convolutions, dilation, uneven and automatic padding, pools, the other activations."""
    g = Graph(7)
    x = g.add("LeakyRelu", g.conv("input.1", 3, 8, pads=[0, 1, 2, 1]), alpha=0.2)
    x = g.conv(x, 8, 8, group=8, stride=1, dilations=[2, 2], pads=[2] * 4)
    x = g.add("Pad", x, g.weight([0, 0, 1, 0, 0, 0, 2, 1]), g.weight(-0.3))
    x = g.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 0], ceil_mode=1)
    x = g.add("Tanh", g.conv(x, 8, 16, group=4, auto_pad="SAME_UPPER", kernel=4))
    x = g.add("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 1], ceil_mode=1)
    x = g.add("AveragePool", x, kernel_shape=[2, 2], strides=[1, 1], pads=[1, 0, 0, 1], count_include_pad=1)
    x = g.add("Relu", g.conv(x, 16, 16, stride=1, auto_pad="SAME_LOWER", kernel=2))
    x = g.add("Div", g.conv(x, 16, 16, auto_pad="SAME_LOWER", kernel=4), g.weight([2.0]))
    x = g.add("Mul", x, g.add("Sigmoid", g.conv(x, 16, 16, kernel=1, stride=1, auto_pad="VALID")))
    x = g.add("Sub", x, g.add("Reshape", g.normal(1, 16), g.weight([16, 1, 1])))  # a constant, folded once
    return g.save(path, g.add("ReduceMean", x, axes=[2, 3], keepdims=0))


BUILDERS = [build_iresnet, build_mxnet, build_named_otherwise, build_fixed_batch, build_fixed_batch_squeeze,
            build_view, build_opset18, build_mobile]  # fmt: skip


def onnx_embeddings(path: Path, crops: np.ndarray, one_by_one: bool) -> np.ndarray:
    """As insightface feeds them: its ArcFaceONNX decides mean and std."""
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    theirs = ArcFaceONNX(str(path), session)
    pixels = (crops + 1) * 127.5
    parts = np.split(pixels, len(pixels)) if one_by_one else [pixels]
    outputs = [theirs.forward(part.astype(np.float32)) for part in parts]
    return np.concatenate([e.reshape(len(part), -1) for e, part in zip(outputs, parts)])


@pytest.mark.parametrize("build", BUILDERS)
def test_arcface_is_onnxruntime(build, tmp_path):
    path = build(tmp_path / "model.onnx")
    arcface = ArcFace.from_onnx(path)
    crops = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    truth = onnx_embeddings(path, crops.numpy(), one_by_one="fixed" in build.__name__)
    ours = arcface(crops)
    assert ours.shape == truth.shape == (3, 16) and truth.std() > 0.01
    assert np.abs(truth[0] - truth[1]).max() > 1e-3  # it does depend on the crop
    np.testing.assert_allclose(ours.numpy(), truth, atol=1e-4)
    torch.testing.assert_close(arcface(crops[1:2]), ours[1:2], atol=1e-5, rtol=0)


def test_arcface_is_frozen_float32_and_follows_to(tmp_path):
    arcface = ArcFace.from_onnx(build_iresnet(tmp_path / "model.onnx"))
    crops = torch.rand(2, 3, 112, 112).requires_grad_()
    assert not list(arcface.parameters()) and not arcface.state_dict()
    assert {b.dtype for b in arcface.buffers()} == {torch.float32}
    e = arcface(crops)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(arcface(crops), e)
    assert arcface(crops.bfloat16()).dtype == torch.float32
    double = ArcFace.from_onnx(tmp_path / "model.onnx").double()(crops.double())
    assert double.dtype == torch.float64 and (double - e).abs().max() < 1e-4
    (gradient,) = torch.autograd.grad(e.sum(), crops)
    assert (gradient != 0).any()


def test_half_precision_files_are_computed_in_float32(tmp_path):
    model = onnx.load(str(build_iresnet(tmp_path / "model.onnx")))
    for weight in model.graph.initializer:
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))
    onnx.save(model, str(tmp_path / "half.onnx"))
    crops = torch.rand(1, 3, 112, 112)
    half = ArcFace.from_onnx(tmp_path / "half.onnx")(crops)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, ArcFace.from_onnx(tmp_path / "model.onnx")(crops), atol=1e-2, rtol=0)


def test_identity_gradient_is_that_of_opencv_and_onnxruntime(tmp_path):
    """d cos(Phi(Align(x)), e_ref) / dx: exact in float64, and equal to differences of insightface's own pipeline."""
    path = build_iresnet(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(8)
    frame = cv2.GaussianBlur(rng.uniform(-1, 1, (90, 120, 3)), (0, 0), 2) * 3
    points = (ARCFACE_TEMPLATE.double().numpy() - 56) * 0.7 + [60, 40] + rng.normal(0, 2, (5, 2))  # top is cut off
    matrix = umeyama(points)
    e_ref = rng.normal(0, 1, 16)

    def theirs(image):  # (H, W, 3), opencv in float32 and onnxruntime in float32
        crop = cv2.warpAffine(image.astype(np.float32), matrix, (112, 112), borderValue=(-1, -1, -1))
        e = session.run(None, {"input.1": crop.transpose(2, 0, 1)[None]})[0][0].astype(np.float64)
        return e @ e_ref / np.linalg.norm(e) / np.linalg.norm(e_ref)

    arcface = ArcFace.from_onnx(path).double()
    landmarks, target = torch.from_numpy(points)[None], torch.from_numpy(e_ref)[None]

    def ours(x):  # (1, 3, H, W)
        return torch.cosine_similarity(embed(x, landmarks, arcface), target).sum()

    x = torch.from_numpy(frame).permute(2, 0, 1)[None].requires_grad_()
    value = ours(x)
    assert abs(value.item() - theirs(frame)) < 1e-4
    (gradient,) = torch.autograd.grad(value, x)
    for _ in range(5):
        direction = torch.from_numpy(rng.normal(0, 1, tuple(x.shape)))
        slope = (gradient * direction).sum().item()
        with torch.no_grad():
            exact = (ours(x + 1e-6 * direction) - ours(x - 1e-6 * direction)).item() / 2e-6
        d = direction[0].permute(1, 2, 0).numpy()
        finite = (theirs(frame + 1e-3 * d) - theirs(frame - 1e-3 * d)) / 2e-3
        scale = gradient.norm().item()  # the slope of a random direction has this spread
        assert abs(slope - exact) < 1e-5 * scale, (slope, exact, scale)
        # float32 (onnxruntime has no double convolution) and the kinks of PReLU leave 0.026 at this step, measured
        assert abs(slope - finite) < 5e-2 * scale, (slope, finite, scale)


# ---------------------------------------------------------------------------------------------------------------------
# What can be wrong with a file


def test_unknown_operators_are_named(tmp_path):
    g = Graph()
    path = g.save(tmp_path / "odd.onnx", g.add("Flatten", g.add("Erf", g.body(), name="strange_node")))
    with pytest.raises(UserError, match=r"Erf.*strange_node.*odd\.onnx"):
        ArcFace.from_onnx(path)
    g = Graph()
    x = g.add("Relu", g.body(), domain="custom", name="not_ours")  # a known name in another domain
    path = g.save(tmp_path / "custom.onnx", g.add("Flatten", x), custom=True)
    with pytest.raises(UserError, match=r"Relu.*not_ours.*custom\.onnx"):
        ArcFace.from_onnx(path)


@pytest.mark.parametrize(
    "operator, inputs, attributes",
    [
        ("Conv", 1, {"auto_pad": "SAME_UPPER", "dilations": [2, 2]}),
        ("Pad", 1, {"mode": "reflect"}),
        ("Pad", 3, {}),  # along chosen axes
        ("AveragePool", 0, {"kernel_shape": [2, 2], "dilations": [2, 2]}),
        ("BatchNormalization", 4, {"training_mode": 1}),
        ("Flatten", 0, {"axis": 2}),
    ],
)
def test_variants_that_would_be_computed_wrongly_are_refused(operator, inputs, attributes, tmp_path):
    g = Graph()
    x = g.add(operator, g.body(), *[g.weight([0, 0, 1, 1] * 2) for _ in range(inputs)], **attributes, name="odd_one")
    with pytest.raises(UserError, match=rf"{operator}.*odd_one.*variant\.onnx"):
        ArcFace.from_onnx(g.save(tmp_path / "variant.onnx", x, opset=19))


def test_files_that_are_no_recognition_model(tmp_path):
    whole = build_iresnet(tmp_path / "whole.onnx").read_bytes()
    for name, content in {
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 174383860\n",
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "zeros": bytes(1000),
    }.items():
        (tmp_path / f"{name}.onnx").write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.onnx (cannot be read|holds no ONNX graph)"):
            ArcFace.from_onnx(tmp_path / f"{name}.onnx")
    with pytest.raises(UserError, match=r"missing\.onnx"):
        ArcFace.from_onnx(tmp_path / "missing.onnx")
    g = Graph()
    x = g.add("Flatten", g.conv("input.1", 3, 8))
    with pytest.raises(UserError, match=r"age\.onnx.*96, 96.*112"):  # as genderage.onnx of buffalo_l
        ArcFace.from_onnx(g.save(tmp_path / "age.onnx", x, size=(3, 96, 96)))
    with pytest.raises(UserError, match=r"old\.onnx.*opset 6"):
        ArcFace.from_onnx(g.save(tmp_path / "old.onnx", x, opset=6))


def test_a_graph_that_does_not_hold_together(tmp_path):
    g = Graph()
    x = g.add("Flatten", g.conv("input.1", 3, 8))
    g.nodes.reverse()
    with pytest.raises(UserError, match=r"Flatten.*reads conv\.1"):
        ArcFace.from_onnx(g.save(tmp_path / "order.onnx", x))
    g = Graph()
    x = g.add("Flatten", g.conv("input.1", 3, 8))
    with pytest.raises(UserError, match=r"w\.0 of .*constant\.onnx does not depend"):
        ArcFace.from_onnx(g.save(tmp_path / "constant.onnx", "w.0"))
    g.weights[0].raw_data = g.weights[0].raw_data[:-4]
    with pytest.raises(UserError, match=r"short\.onnx is damaged"):
        ArcFace.from_onnx(g.save(tmp_path / "short.onnx", x))


def test_external_weights(tmp_path):
    path = build_iresnet(tmp_path / "whole.onnx")
    onnx.save(onnx.load(str(path)), str(tmp_path / "split.onnx"), save_as_external_data=True, location="weights.bin",
              size_threshold=0)  # fmt: skip
    crops = torch.rand(1, 3, 112, 112)
    assert torch.equal(ArcFace.from_onnx(tmp_path / "split.onnx")(crops), ArcFace.from_onnx(path)(crops))
    (tmp_path / "weights.bin").unlink()
    assert recognition_file(tmp_path).name == "split.onnx"  # found without reading them
    with pytest.raises(UserError, match=r"split\.onnx.*weights\.bin"):
        ArcFace.from_onnx(tmp_path / "split.onnx")


# ---------------------------------------------------------------------------------------------------------------------
# The detector, and packs


def build_detector(path: Path, landmarks: bool = True) -> Path:
    """An SCRFD whose cell fires where its mean color is red; the box is the cell, the landmarks are POINTS of it."""
    g, outputs = Graph(batch=1), []

    def head(x, per_anchor, weight, bias):  # 2 anchors per cell: (1, 2 * k, h, w) -> (h * w * 2, k)
        x = g.add("Conv", x, g.weight(weight), g.weight(bias), kernel_shape=[1, 1])
        return g.add("Reshape", g.add("Transpose", x, perm=[0, 2, 3, 1]), g.weight([-1, per_anchor]))

    cells = [g.add("AveragePool", "input.1", kernel_shape=[s, s], strides=[s, s]) for s in (8, 16, 32)]
    red = np.zeros((2, 3, 1, 1))
    red[0, :, 0, 0] = [4, -2, -2]  # +-1 in each channel: 4 for red, -4 for black, white and blue; anchor 2 never fires
    scores = [g.add("Sigmoid", head(x, 1, red, [-4.0, -20.0])) for x in cells]
    boxes = [head(x, 4, np.zeros((8, 3, 1, 1)), [0.0, 0.0, 1.0, 1.0] * 2) for x in cells]  # in strides
    points = [head(x, 10, np.zeros((20, 3, 1, 1)), [*POINTS.ravel()] * 2) for x in cells]
    outputs = [*scores, *boxes, *(points if landmarks else [])]
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"n{i}", (1, 4, 10)[i // 3]])
        for i, name in enumerate(outputs)
    ]
    frame = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, "height", "width"])
    graph = helper.make_graph(g.nodes, "scrfd", [frame], infos, g.weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7), str(path))
    return path


POINTS = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])  # of a cell, from its upper left


def test_detector_finds_the_largest_face(tmp_path, monkeypatch, capfd, recwarn):
    from insightface.app import FaceAnalysis

    prepare = FaceAnalysis.prepare  # older versions report what they do on stdout: not ours to show
    monkeypatch.setattr(FaceAnalysis, "prepare", lambda self, **a: (print("set det-size"), prepare(self, **a)))
    build_detector(tmp_path / "det.onnx")
    build_iresnet(tmp_path / "rec.onnx")  # not to be run
    detector = FaceDetector(tmp_path, det_size=(64, 64))
    frames = torch.full((5, 3, 64, 64), -1.0)
    frames[0, 0, 8:16, 40:48] = 1  # one small face
    frames[1, 0, 8:16, 40:48] = 1  # a small one, found with the same score as
    frames[1, 0, 32:64, 0:32] = 1  # a large one: it counts
    frames[2, 2, 32:64, 0:32] = 1  # blue: a face only to who swaps the channels
    frames[3] = 1  # white: none
    frames[4, 0, 32:64, 0:32] = 1.1  # out of range: clipped, not wrapped around
    landmarks, boxes, valid = detector.detect(frames.requires_grad_())
    assert valid.tolist() == [True, True, False, False, True] and valid.dtype == torch.bool
    assert landmarks.dtype == boxes.dtype == torch.float32 and not landmarks.requires_grad
    points = torch.from_numpy(POINTS).float()
    torch.testing.assert_close(boxes[:2], torch.tensor([[40.0, 8, 48, 16], [0, 32, 32, 64]]))
    torch.testing.assert_close(landmarks[0], points * 8 + torch.tensor([40.0, 8]))
    torch.testing.assert_close(landmarks[1], points * 32 + torch.tensor([0.0, 32]))
    torch.testing.assert_close(boxes[4], boxes[1])
    assert (boxes[2:4] == 0).all() and (landmarks[2:4] == 0).all()
    assert [t.shape for t in detector.detect(frames[:0])] == [(0, 5, 2), (0, 4), (0,)]
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_all_faces_of_an_image_largest_first(tmp_path):
    build_detector(tmp_path / "det.onnx")
    detector = FaceDetector(tmp_path, det_size=(64, 64))
    frames = torch.full((3, 3, 64, 64), -1.0)
    frames[0, 0, 8:16, 40:48] = 1
    frames[0, 0, 32:64, 0:32] = 1
    frames[0, 0, 0:16, 0:16] = 1
    frames[1, 0, 56:64, 56:64] = 1
    landmarks, boxes = detector.faces(frames[0].requires_grad_())
    # A red square is a face of its own size and, to this detector, of all smaller sizes that it holds.
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert areas.tolist() == [1024.0] + (4 + 1) * [256.0] + (16 + 4 + 1) * [64.0]
    torch.testing.assert_close(boxes[0], torch.tensor([0.0, 32, 32, 64]))
    sides, corners = boxes[:, None, 2:] - boxes[:, None, :2], boxes[:, None, :2]
    torch.testing.assert_close(landmarks, torch.from_numpy(POINTS).float() * sides + corners)
    assert [len(detector.faces(frame)[1]) for frame in frames] == [27, 1, 0]
    assert [t.shape for t in detector.faces(frames[2])] == [(0, 5, 2), (0, 4)]
    points, first, valid = detector.detect(frames)  # of several faces, the first of this list counts
    assert valid.tolist() == [True, True, False]
    assert torch.equal(first[0], boxes[0]) and torch.equal(points[0], landmarks[0])
    for shape in ((3, 1, 20000), (3, 4000, 1)):  # fitted into the detector's input, nothing of it is left
        assert len(detector.faces(torch.ones(shape))[1]) == 0 and not detector.detect(torch.ones(1, *shape))[2].any()


def test_detector_default_size_suits_small_and_large_frames(tmp_path):
    build_detector(tmp_path / "det.onnx")
    detector = FaceDetector(str(tmp_path))
    for height, width, cell in ((64, 64, 16), (480, 832, 208)):
        frames = torch.full((1, 3, height, width), -1.0)
        frames[0, 0, :cell, cell : 2 * cell] = 1
        landmarks, boxes, valid = detector.detect(frames.bfloat16())
        assert valid.all()
        center = torch.tensor([1.5 * cell, 0.5 * cell])
        assert (boxes[0].view(2, 2).mean(0) - center).abs().max() < 0.5 * cell
        inside = (landmarks[0] - boxes[0, :2]) / (boxes[0, 2:] - boxes[0, :2])
        torch.testing.assert_close(inside, torch.from_numpy(POINTS).float(), atol=1e-4, rtol=0)


def test_detector_takes_no_more_threads_than_torch(root):
    """Under torchrun, which gives each rank one, onnxruntime's own default would be all cores for every rank."""
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            session = FaceDetector(root / "assets" / "faces").app.det_model.session
            assert session.get_session_options().intra_op_num_threads == count
    finally:
        torch.set_num_threads(threads)


def test_detector_threshold(tmp_path):
    build_detector(tmp_path / "det.onnx")
    frames = torch.full((1, 3, 64, 64), -1.0)
    frames[0, 0, :8, :8] = 1  # score sigmoid(4) = 0.982
    assert FaceDetector(tmp_path, det_size=(64, 64), det_thresh=0.98).detect(frames)[2].item()
    assert not FaceDetector(tmp_path, det_size=(64, 64), det_thresh=0.985).detect(frames)[2].item()


def change_weight(path, name, value):
    """Write `value` into one element of a weight; without a name, into the first that has several."""
    model = onnx.load(str(path))
    weight = next(w for w in model.graph.initializer if w.name == name or (not name and np.prod(w.dims) > 1))
    values = numpy_helper.to_array(weight).copy()
    values.flat[len(values.flat) // 2] = value
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, str(path))
    return weight.name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_named(tmp_path, value):
    build_detector(tmp_path / "det.onnx")
    build_iresnet(tmp_path / "rec.onnx")
    name = change_weight(tmp_path / "rec.onnx", None, value)
    with pytest.raises(UserError, match=rf"rec\.onnx.*weight {name} holds NaN or infinity"):
        ArcFace.from_onnx(tmp_path / "rec.onnx")
    name = change_weight(tmp_path / "det.onnx", None, value)
    with pytest.raises(UserError, match=rf"det\.onnx.*weight {name} holds NaN or infinity"):
        FaceDetector(tmp_path)


def test_a_bound_may_be_infinite(tmp_path):
    g = Graph()
    x = g.add("Clip", g.body(), g.weight(-math.inf), g.weight(1.5))
    path = g.save(tmp_path / "clip.onnx", g.add("Flatten", x), shape=("n", 784), opset=13)
    crops = torch.rand(2, 3, 112, 112)
    np.testing.assert_allclose(
        ArcFace.from_onnx(path)(crops).numpy(), onnx_embeddings(path, crops.numpy(), False), atol=1e-4
    )


def test_constants_in_nodes_are_checked_too(tmp_path):
    g = Graph()
    odd = g.add("Constant", value=numpy_helper.from_array(np.full((16, 1, 1), np.nan, np.float32), "odd"))
    with pytest.raises(UserError, match=r"constant\.onnx.*odd holds NaN"):
        ArcFace.from_onnx(g.save(tmp_path / "constant.onnx", g.add("Flatten", g.add("Mul", g.body(), odd))))


def test_weights_that_do_not_fit_together_show_when_the_file_is_read(tmp_path):
    g = Graph()
    x = g.add("MatMul", g.add("Flatten", g.body()), g.normal(99, 16))  # 784 columns meet 99 rows
    with pytest.raises(UserError, match=r"sizes\.onnx is damaged"):
        ArcFace.from_onnx(g.save(tmp_path / "sizes.onnx", x))
    g = Graph()
    x = g.add("Mul", g.body(), g.add("Reshape", g.normal(16), g.weight([5, 1, 1])))  # 16 numbers as 5
    with pytest.raises(UserError, match=r"Reshape.*folded\.onnx cannot be computed"):
        ArcFace.from_onnx(g.save(tmp_path / "folded.onnx", g.add("Flatten", x)))


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_detector_file_has_one_error(root, tmp_path, seed):
    """Cut, or hit in its first bytes, where the graph is: refused, or read as it is; never another exception."""
    rng, data = np.random.default_rng(seed), bytearray((root / "assets" / "faces" / "det_toy.onnx").read_bytes())
    if seed % 3 == 0:
        data = data[: rng.integers(len(data) // 2)]
    else:
        for place in rng.integers(1000, size=20):
            data[place] = rng.integers(256)
    (tmp_path / "det.onnx").write_bytes(data)
    with pytest.raises(UserError, match="no face detector in"):
        FaceDetector(tmp_path)


FRESH_HOME = """
import sys, time, torch
from face import ArcFace, FaceDetector, recognition_file
FaceDetector("assets/faces").detect(torch.zeros(1, 3, 64, 64))
ArcFace.from_onnx(recognition_file("assets/faces"))
assert "onnxruntime" in sys.modules
time.sleep(0.5)
"""


def test_no_file_appears_in_the_users_home(root, tmp_path):
    """onnxruntime stores a device id and usage events below ~/.cache, unless that is off before it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "ORT_"))}
    environment |= {"HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    subprocess.run([sys.executable, "-c", FRESH_HOME], cwd=root, env=environment, check=True, timeout=600)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "matplotlib" not in path.parts] == []


def test_packs_that_are_not_there(tmp_path, monkeypatch, capfd):
    import requests

    def offline(*args, **options):
        raise requests.ConnectionError("Name or service not known")

    monkeypatch.setattr(requests, "get", offline)
    release = r"github\.com/deepinsight/insightface/releases/tag/model-zoo"
    for call in (lambda p: FaceDetector(p, root=tmp_path), lambda p: recognition_file(p, root=tmp_path)):
        with pytest.raises(UserError, match=rf"nopack.*download.*{release}.*models/nopack"):
            call("nopack")
        with pytest.raises(UserError, match=rf"no such folder.*{release}.*elsewhere"):
            call(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=rf"no \.onnx file.*{release}"):
            call(tmp_path)
    assert not list(tmp_path.rglob("*.onnx")) and capfd.readouterr() == ("", "")


def test_packs_without_the_model(tmp_path):
    build_detector(tmp_path / "det.onnx")
    with pytest.raises(UserError, match=r"no face recognition model"):
        recognition_file(tmp_path)
    (tmp_path / "det.onnx").unlink()
    build_iresnet(tmp_path / "rec.onnx")
    with pytest.raises(UserError, match=r"no face detector in .*no file is a detector"):
        FaceDetector(tmp_path)
    (tmp_path / "rec.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(UserError, match=r"no face detector in"):
        FaceDetector(tmp_path)
    build_detector(tmp_path / "rec.onnx", landmarks=False)
    with pytest.raises(UserError, match=r"gives no landmarks"):
        FaceDetector(tmp_path)


def test_packs_by_name_and_nested_as_antelopev2(tmp_path):
    folder = tmp_path / "models" / "antelopev2" / "antelopev2"
    folder.mkdir(parents=True)
    build_detector(folder / "a_detector.onnx")
    build_iresnet(folder / "glint.onnx")
    build_iresnet(folder / "later.onnx")
    assert recognition_file("antelopev2", root=tmp_path) == folder / "glint.onnx"
    assert FaceDetector("antelopev2", root=tmp_path).detect(torch.zeros(1, 3, 32, 32))[2].tolist() == [False]
    assert recognition_file(folder) == folder / "glint.onnx"

"""Who is in the picture: find the face, straighten it, embed it. Eq. 8, e_f = Phi(Align(x_f)), differentiable in x_f.

A flow-matching loss knows nothing about identity: two pixels of eyelid weigh as much as two of wall. The paper
decodes a few frames of the clean estimate (Eq. 7) and asks a frozen face recognizer who they show; Eq. 9 and 10
compare the answers. So the gradient must run from the embedding back to the pixels:

    pixels (n, 3, H, W) ──┬────────────────────────> similarity warp ──> 112x112 ──> ArcFace Phi ──> e (n, E)
    RGB in [-1, 1]        │                               ^              crop        frozen
                          └──> detector: box, 5 landmarks ┘
                               InsightFace, no gradient

The lower branch is a constant: a detector's output is a decision (is there a face, where), and a loss that could move
the landmarks would learn to fool the crop. The warp and Phi are ordinary torch operations, equal to what insightface
itself computes (`norm_crop`, then onnxruntime), so that the network is trained on the same number that an evaluation
reports. Phi is read from the recognition ONNX of a model pack, node by node (onnx_operators.py).

    detector, phi = FaceDetector("buffalo_l"), ArcFace.from_onnx(recognition_file("buffalo_l"))
    landmarks, boxes, valid = detector.detect(frames)       # valid is m_f of Eq. 9
    e = embed(frames, landmarks, phi)

A pack is a name, which insightface downloads into ~/.insightface/models, or a local folder of .onnx files.
"""

import contextlib
import io
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.onnx_operators import OPERATORS, REFUSED

RELEASES = "https://github.com/deepinsight/insightface/releases/tag/model-zoo"
CROP = 112  # side of ArcFace's input, pixels
ARCFACE_TEMPLATE = torch.tensor(  # left eye, right eye, nose, left and right corner of the mouth; (x, y) in the crop
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


# --- Detection: where is the face (no gradient) -----------------------------------------------------------------------


def _onnx_files(folder: Path) -> list[Path]:
    # antelopev2's archive holds a folder of its own name: unpacked, its files lie one level too deep.
    return sorted(folder.glob("*.onnx")) or sorted((folder / folder.name).glob("*.onnx"))


def _pack_files(pack: str | Path, root: str | Path) -> list[Path]:
    """The .onnx files of a model pack: a local folder, or a name under `root`/models, downloaded if it is not there."""
    local = Path(pack).expanduser()
    is_name = local.name == str(pack) and not local.is_dir()
    folder = Path(root).expanduser() / "models" / local if is_name else local
    reason = "it holds no .onnx file" if folder.is_dir() else "there is no such folder"
    if is_name and not _onnx_files(folder):
        from insightface.utils import download

        try:
            with contextlib.redirect_stdout(sys.stderr):  # progress of a few hundred MB: worth seeing, not output
                download("models", str(pack), force=True, root=str(root))  # force: a broken download left a folder
        except Exception as error:  # whatever requests, zipfile or insightface say about network, name and disk
            reason = f"its download failed ({type(error).__name__})"
    if files := _onnx_files(folder):
        return files
    raise UserError(f"face model pack {pack}: {reason}; unpack one from {RELEASES} into {folder}")


class FaceDetector:
    """InsightFace's detector (SCRFD or RetinaFace): one face per frame, the largest.

    pack: name or folder of a model pack. device: onnxruntime's CUDA provider on that GPU if `device` is a CUDA device
    and onnxruntime has the provider, else the CPU. det_size: (width, height) in pixels that frames are fitted into
    before they are looked at, or a list of such; None is insightface's own choice (since 2.x 128x128 and 640x640
    together, so a face that fills the frame is found as well as a small one). A detector with a fixed input size keeps
    that. det_thresh: least score of a face. Errors: UserError when the pack, or a detector with landmarks in it, is
    not there.
    """

    def __init__(
        self,
        pack: str | Path = "buffalo_l",
        device: str | torch.device = "cpu",
        det_size: tuple[int, int] | list[tuple[int, int]] | None = None,
        det_thresh: float = 0.5,
        root: str | Path = "~/.insightface",
    ):
        folder = _pack_files(pack, root)[0].parent.resolve()  # first: importing insightface takes a second
        import onnxruntime
        from insightface.app import FaceAnalysis

        device, providers = torch.device(device), ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            index = torch.cuda.current_device() if device.index is None else device.index
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": index}))
        sessions = onnxruntime.SessionOptions()
        sessions.intra_op_num_threads = torch.get_num_threads()  # its own default, all cores, is too many for each rank
        options = {"providers": providers, "sess_options": sessions}
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some versions list every model they find
                self.app = FaceAnalysis(name=str(folder), allowed_modules=["detection"], **options)
                self.app.prepare(ctx_id=0, det_thresh=det_thresh, **({"det_size": det_size} if det_size else {}))
        except Exception as error:  # an assertion, or anything onnxruntime says about a file
            cause = str(error) or "no file is a detector"
            raise UserError(f"no face detector in {folder}: {cause}; take a pack from {RELEASES}") from error
        if not self.app.det_model.use_kps:
            raise UserError(f"the face detector in {folder} gives no landmarks; take a pack from {RELEASES}")

    @torch.no_grad()
    def detect(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """frames (n, 3, H, W), RGB in [-1, 1] -> landmarks (n, 5, 2), boxes (n, 4), valid (n,), on frames' device.

        Landmarks (x, y) and boxes (left, top, right, bottom) are float32 pixel coordinates, 0 at the centre of the
        first pixel; a box may reach beyond the frame. valid is m_f of Eq. 9; rows without a face are zeros. The paper
        does not say which of several faces counts: the one with the largest box.
        """
        images = ((frames.float() + 1) * 127.5).round().clamp(0, 255).byte()
        images = images.flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy()  # (n, H, W, 3), BGR as OpenCV has it
        landmarks, boxes = torch.zeros(len(images), 5, 2), torch.zeros(len(images), 4)
        valid = torch.zeros(len(images), dtype=torch.bool)
        for i, image in enumerate(images):
            faces = self.app.get(image)
            if faces:
                face = max(faces, key=lambda f: (f.bbox[2] - f.bbox[0]) * (f.bbox[3] - f.bbox[1]))
                landmarks[i], boxes[i], valid[i] = torch.from_numpy(face.kps), torch.from_numpy(face.bbox), True
        return landmarks.to(frames.device), boxes.to(frames.device), valid.to(frames.device)


# --- Alignment: the similarity warp (differentiable in the pixels) ----------------------------------------------------


def similarity_matrix(landmarks: Tensor, size: int = CROP) -> Tensor:
    """landmarks (n, 5, 2) in pixels -> (n, 2, 3): x_crop = M [x, y, 1], the least-squares similarity, no reflection.

    With both point sets centred and read as complex numbers s and d, the best d = z s is z = sum(conj(s) d) /
    sum(|s|^2): its modulus is the scale and its argument the rotation. That is Umeyama's solution in the plane
    (skimage's SimilarityTransform). Detached, and in float64: five points cost nothing, and a shift of a thousand
    pixels has no digits to spare in float32. Landmarks that are not finite or lie within about half a pixel of each
    other are no face: their matrix is zero.
    """
    source, target = landmarks.detach().double(), ARCFACE_TEMPLATE.to(landmarks.device).double() * (size / CROP)
    source_mean, target_mean = source.mean(1), target.mean(0)  # (n, 2), (2,)
    s, d = source - source_mean[:, None], target - target_mean  # (n, 5, 2), (5, 2)
    spread = s.square().sum((1, 2))
    re = (s * d).sum((1, 2)) / spread
    im = (s[..., 0] * d[:, 1] - s[..., 1] * d[:, 0]).sum(1) / spread
    rotation = torch.stack([re, -im, im, re], 1).view(-1, 2, 2)  # and scale
    matrix = torch.cat([rotation, (target_mean - (rotation @ source_mean[..., None])[..., 0])[..., None]], 2)
    return torch.where((spread >= 1)[:, None, None], matrix, 0)  # a NaN is not >= 1 either


def align(frames: Tensor, landmarks: Tensor, size: int = CROP) -> Tensor:
    """Align of Eq. 8: frames (n, 3, H, W) in [-1, 1], landmarks (n, 5, 2) in pixels -> crops (n, 3, size, size).

    Equals insightface's `norm_crop` within interpolation error (OpenCV may round coordinates to 1/32 pixel), also in
    that it does not smooth: a face much larger than 112 pixels is subsampled with aliasing, as it was when ArcFace was
    trained. What lies outside the frame is black, -1, blended in at the border. The gradient reaches the frames; the
    landmarks are constants. At least float32, under autocast too: bfloat16 cannot tell one pixel from the next.
    A row whose landmarks are no face (see `similarity_matrix`) gives a black crop and a gradient of zero.
    """
    n, _, height, width = frames.shape
    dtype = torch.promote_types(frames.dtype, torch.float32)
    matrix = similarity_matrix(landmarks.to(frames.device), size)  # float64, which autocast leaves alone
    rotation, shift = matrix[:, :, :2], matrix[:, :, 2:]
    area = rotation[:, 0].square().sum(1)[:, None, None]  # scale^2: the inverse is the transpose divided by it
    usable = area > 1e-12
    inverse = rotation.mT / torch.where(usable, area, 1)
    index = torch.arange(size, dtype=matrix.dtype, device=frames.device)
    crop_xy = torch.stack(torch.meshgrid(index, index, indexing="xy")).flatten(1)  # (2, size * size)
    frame_xy = inverse @ (crop_xy - shift)  # (n, 2, size * size), pixel centres at integers
    # grid_sample puts -1 and 1 at the outer edges of the frame; its zeros begin half a pixel further out.
    grid = (2 * frame_xy + 1) / frame_xy.new_tensor([[width], [height]]) - 1
    grid = torch.where(usable, grid, -3).mT.reshape(n, size, size, 2).to(dtype)
    return F.grid_sample(frames.to(dtype) + 1, grid, align_corners=False) - 1  # zero outside is black: hence + 1


# --- Phi: a recognition ONNX as a torch module ------------------------------------------------------------------------


def _read_onnx(path: str | Path, weights: bool = True):
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=weights)
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as error:
        raise UserError(f"{path} cannot be read as an ONNX model: {error}; take it anew from {RELEASES}") from error
    if not model.graph.node:  # an empty file is a valid, empty message
        raise UserError(f"{path} holds no ONNX graph (cut short?); take it anew from {RELEASES}")
    return model


def _inputs(graph) -> dict[str, list[int]]:
    weights = {w.name for w in graph.initializer}  # listed among the inputs by old exporters
    dims = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    return {name: shape for name, shape in dims.items() if name not in weights}


def _is_recognition(graph) -> bool:
    shapes = list(_inputs(graph).values())
    return len(shapes) == 1 and shapes[0][1:] == [3, CROP, CROP] and len(graph.output) == 1


def recognition_file(pack: str | Path, root: str | Path = "~/.insightface") -> Path:
    """The recognition model of a pack (name or folder): the first .onnx by name, as insightface has it, with one
    3x112x112 input and one output. UserError when there is none."""
    files = _pack_files(pack, root)
    for file in files:
        if _is_recognition(_read_onnx(file, weights=False).graph):
            return file
    raise UserError(f"no face recognition model (3x112x112 input) in {files[0].parent}; take a pack from {RELEASES}")


class ArcFace(nn.Module):
    """Phi of Eq. 8: crops (n, 3, 112, 112), RGB in [-1, 1] -> embeddings (n, E), raw as the file has them.

    Not normalized to length one: the cosines of Eq. 9 and 10 do that. Frozen: the weights are float32 buffers, which
    follow `.to`, take no gradient and stay out of the state_dict (their home is the ONNX file). Any batch size, also
    where the export was made for one. On a CPU it equals onnxruntime within 1e-4.
    """

    @classmethod
    def from_onnx(cls, path: str | Path) -> "ArcFace":
        """Read a recognition ONNX (w600k_r50, glint360k_r100, any IResNet-like export). Protobuf only, no pickle.

        UserError, naming file and cause: not ONNX, not a recognition model, older than opset 7, an unknown operator.
        """
        model = _read_onnx(path)
        if not _is_recognition(model.graph):
            shapes = ", ".join(str(shape) for shape in _inputs(model.graph).values())
            raise UserError(f"{path} is no face recognition model: its input is {shapes}, not one of [n, 3, 112, 112]")
        opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
        if opset < 7:
            raise UserError(f"{path} is written for ONNX opset {opset}, 7 is the oldest known; export it again")
        try:
            return cls(model.graph, str(path))
        except (ValueError, TypeError) as error:  # a weight whose bytes do not match its shape or type
            raise UserError(f"{path} is damaged: {error}; take it anew from {RELEASES}") from error

    def __init__(self, graph, path: str):
        super().__init__()
        from onnx import TensorProto, helper, numpy_helper

        def tensor(proto: TensorProto) -> Tensor:
            value = torch.from_numpy(numpy_helper.to_array(proto).copy())
            return value.float() if value.is_floating_point() else value

        def attribute(proto):
            value = helper.get_attribute_value(proto)
            value = value.decode() if isinstance(value, bytes) else value
            return tensor(value) if isinstance(value, TensorProto) else value

        ((self.input, shape),) = _inputs(graph).items()
        self.output = graph.output[0].name
        # insightface's own rule for graphs that normalize by themselves (mxnet's): they are fed 0..255.
        first = [node.name for node in graph.node[:8]]
        self.raw_pixels = any(n.startswith(("Sub", "_minus")) for n in first) and any(
            n.startswith(("Mul", "_mul")) for n in first
        )
        constants, computed = {w.name: tensor(w) for w in graph.initializer} | {"": None}, {self.input}
        self.nodes: list[tuple[str, dict, list[str], str]] = []  # operator, attributes, inputs, output
        for node in graph.node:
            where = f"operator {node.op_type} (node {node.name or node.output[0]}) of {path}"
            if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
                raise UserError(f"unknown {where}; add it to onnx_operators.py or export without it")
            a = {proto.name: attribute(proto) for proto in node.attribute}
            if node.op_type in REFUSED and REFUSED[node.op_type](a, len(node.input)):
                raise UserError(f"attributes of {where} are not supported; export in inference mode, without them")
            if missing := [name for name in node.input if name not in constants and name not in computed]:
                raise UserError(f"{where} reads {missing[0]}, which nothing before it computes; export it again")
            if computed.isdisjoint(node.input):  # weights reshaped, shapes concatenated: once is enough
                constants[node.output[0]] = OPERATORS[node.op_type](a, *[constants[name] for name in node.input])
            else:
                a["batch"] = shape[0] or 1
                self.nodes.append((node.op_type, a, list(node.input), node.output[0]))
                computed.add(node.output[0])
        if self.output not in computed:
            raise UserError(f"the output {self.output} of {path} does not depend on its input; export it again")
        last = {name: i for i, (_, _, inputs, _) in enumerate(self.nodes) for name in inputs} | {self.output: -1}
        self.dead = [[n for n in set(node[2]) if last[n] == i] for i, node in enumerate(self.nodes)]
        self.buffer_of, self.integers = {}, {"": None}  # integers are shapes: they stay on the CPU, where they are read
        for name in (name for name in last if name in constants and name):
            if constants[name].is_floating_point():
                self.buffer_of[name] = f"weight_{len(self.buffer_of)}"
                self.register_buffer(self.buffer_of[name], constants[name], persistent=False)
            else:
                self.integers[name] = constants[name]

    def forward(self, crops: Tensor) -> Tensor:
        assert crops.shape[1:] == (3, CROP, CROP), f"crops are {tuple(crops.shape)}, expected (n, 3, {CROP}, {CROP})"
        values = self.integers | {name: getattr(self, buffer) for name, buffer in self.buffer_of.items()}
        with torch.autocast(crops.device.type, enabled=False):
            x = crops.to(next(self.buffers()).dtype)
            values[self.input] = (x + 1) * 127.5 if self.raw_pixels else x
            for (operator, a, inputs, output), dead in zip(self.nodes, self.dead):
                values[output] = OPERATORS[operator](a, *[values[name] for name in inputs])
                for name in dead:
                    del values[name]
        return values[self.output].flatten(1)  # (n, E), also from a head that ends in (n, E, 1, 1)


def embed(frames: Tensor, landmarks: Tensor, arcface: ArcFace) -> Tensor:
    """Eq. 8: e_f = Phi(Align(x_f)). frames (n, 3, H, W) in [-1, 1], landmarks (n, 5, 2) in pixels -> (n, E).

    Rows without a face (landmarks zero) give the embedding of a black crop, finite and without gradient: mask them
    with `valid`, m_f of Eq. 9.
    """
    return arcface(align(frames, landmarks))

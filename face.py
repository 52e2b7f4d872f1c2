"""Faces: find, straighten, embed. Eq. 8, e_f = Phi(Align(x_f)), differentiable in x_f.

L_flow weighs all latent tokens alike. A face fills few of them, so identity is diluted. The paper decodes a few frames
of the clean estimate (Eq. 7) and embeds their faces with a frozen recognizer; Eq. 9 and 10 compare the embeddings. So
the gradient must run from the embedding back to the pixels:

    pixels (n, 3, H, W) ──┬────────────────────────> similarity warp ──> 112x112 ──> ArcFace Phi ──> e (n, E)
    RGB in [-1, 1]        │                               ^              crop        frozen
                          └──> detector: box, 5 landmarks ┘
                               InsightFace, no gradient

The lower branch is a constant: a loss that could move the landmarks would learn to fool the crop. The warp and Phi
are torch operations, equal to insightface's own (`norm_crop`, then onnxruntime) up to interpolation. Training and
evaluation use them both. Phi is read from the recognition ONNX of a model pack, node by node (common/onnx_reader.py).

    detector, phi = FaceDetector("buffalo_l"), ArcFace.from_onnx(recognition_file("buffalo_l"))
    landmarks, boxes, valid = detector.detect(frames)       # valid is m_f of Eq. 9
    e = embed(frames, landmarks, phi)

A pack is a name, which insightface downloads into ~/.insightface/models, or a local folder of .onnx files.
"""

import contextlib
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError, blame
from common.images import to_bytes
from common.onnx_reader import RELEASES, OnnxGraph, input_shapes, pack_files, read_onnx, refuse_not_finite

CROP = 112  # side of ArcFace's input, pixels
ARCFACE_TEMPLATE = torch.tensor(  # left eye, right eye, nose, left and right corner of the mouth; (x, y) in the crop
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


# --- Detection: where is the face (no gradient) -----------------------------------------------------------------------


class FaceDetector:
    """InsightFace's detector (SCRFD or RetinaFace) in a model pack, on onnxruntime's CUDA provider if there is one.

    det_size    (width, height) in pixels of the detector's input, or a list of sizes; None: insightface's own choice
                (128x128 and 640x640 together, for faces that fill the frame and for small ones)
    det_thresh  least score of a face

    UserError if the pack is missing, or holds no detector with landmarks, or a damaged one.
    """

    def __init__(
        self,
        pack: str | Path = "buffalo_l",
        device: str | torch.device = "cpu",
        det_size: tuple[int, int] | list[tuple[int, int]] | None = None,
        det_thresh: float = 0.5,
        root: str | Path = "~/.insightface",
    ):
        folder = pack_files(pack, root)[0].parent.resolve()  # first: importing insightface takes a second
        import onnxruntime
        from insightface.app import FaceAnalysis

        device, providers = torch.device(device), ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            index = torch.cuda.current_device() if device.index is None else device.index
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": index}))
        sessions = onnxruntime.SessionOptions()
        sessions.log_severity_level = 4  # its exceptions say the same
        sessions.intra_op_num_threads = torch.get_num_threads()  # its own default, all cores, is too many for each rank
        options = {"allowed_modules": ["detection"], "providers": providers, "sess_options": sessions}
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some versions list every model of the folder
                self.app = FaceAnalysis(name=str(folder), **options)
                self.app.prepare(ctx_id=0, det_thresh=det_thresh, **({"det_size": det_size} if det_size else {}))
            assert self.app.det_model.use_kps, "it gives no landmarks"
            self.faces(torch.zeros(3, 64, 64))  # damage may show only when the model runs
        except Exception as error:  # an assertion without text, or any exception of onnxruntime's about a file
            reason = str(error) or "no file is a detector"
            raise UserError(f"no face detector in {folder}: {reason}; take a pack from {RELEASES}") from error
        refuse_not_finite(self.app.det_model.model_file)

    def detect(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The face of each frame (n, 3, H, W), RGB in [-1, 1] -> landmarks (n, 5, 2), boxes (n, 4), valid (n,).

        Landmarks (x, y) and boxes (left, top, right, bottom) are float32 pixel coordinates on the device of `frames`,
        0 at the center of the first pixel; a box may reach beyond the frame. valid is m_f of Eq. 9; rows without a
        face are zeros. The paper leaves open which of several faces counts: here the one with the largest box.
        """
        n = len(frames)
        landmarks, boxes, valid = torch.zeros(n, 5, 2), torch.zeros(n, 4), torch.zeros(n, dtype=torch.bool)
        for i, (points, corners) in enumerate(map(self.faces, frames)):
            if len(corners):
                landmarks[i], boxes[i], valid[i] = points[0], corners[0], True
        return landmarks.to(frames.device), boxes.to(frames.device), valid.to(frames.device)

    @torch.no_grad()
    def faces(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """All k faces of one frame (3, H, W), the largest box first -> landmarks (k, 5, 2), boxes (k, 4), on the CPU.

        Coordinates as in `detect`. Frames with sides in a ratio above 64 are skipped: one side could become 0.
        """
        strip = max(frame.shape[1:]) > 64 * min(frame.shape[1:])
        image = to_bytes(frame).flip(0).permute(1, 2, 0).contiguous().cpu().numpy()  # (H, W, 3), BGR as in OpenCV
        faces = [] if strip else self.app.get(image)
        boxes = torch.tensor([face.bbox.tolist() for face in faces]).reshape(-1, 4)
        order = (boxes[:, 2:] - boxes[:, :2]).prod(1).argsort(descending=True, stable=True)
        return torch.tensor([face.kps.tolist() for face in faces]).reshape(-1, 5, 2)[order], boxes[order]


# --- Alignment: the similarity warp (differentiable in the pixels) ----------------------------------------------------


def similarity_matrix(landmarks: Tensor, size: int = CROP) -> Tensor:
    """landmarks (n, 5, 2) in pixels -> (n, 2, 3): x_crop = M [x, y, 1], the least-squares similarity, no reflection.

    Both point sets are centered and read as complex numbers s and d. The z that minimizes |d - z s|^2 is
    sum(conj(s) d) / sum(|s|^2): its modulus is the scale, its argument the rotation (Umeyama's solution in the plane,
    skimage's SimilarityTransform). Detached, and in float64, because a shift of a thousand pixels needs the digits.
    Landmarks that are not finite, or lie within about half a pixel of their mean, give a zero matrix.
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

    Equals insightface's `norm_crop` within interpolation error (OpenCV may round coordinates to 1/32 pixel). Like
    `norm_crop` it does not smooth: a face much larger than 112 pixels is subsampled with aliasing, as in ArcFace's
    training. Pixels outside the frame are black, -1, blended in at the border. The landmarks are constants. Without a
    face they give a black crop and a gradient of zero. At least float32: bfloat16 cannot tell one pixel from the next.
    """
    n, _, height, width = frames.shape
    dtype = torch.promote_types(frames.dtype, torch.float32)
    matrix = similarity_matrix(landmarks.to(frames.device), size)  # float64
    rotation, shift = matrix[:, :, :2], matrix[:, :, 2:]
    area = rotation[:, 0].square().sum(1)[:, None, None]  # scale^2: the inverse is the transpose divided by it
    usable = area > 1e-12
    inverse = rotation.mT / torch.where(usable, area, 1)
    index = torch.arange(size, dtype=matrix.dtype, device=frames.device)
    crop_xy = torch.stack(torch.meshgrid(index, index, indexing="xy")).flatten(1)  # (2, size * size)
    frame_xy = inverse @ (crop_xy - shift)  # (n, 2, size * size), pixel centers at integers
    # grid_sample puts -1 and 1 at the outer edges of the frame; its zeros begin half a pixel further out.
    grid = (2 * frame_xy + 1) / frame_xy.new_tensor([[width], [height]]) - 1
    grid = torch.where(usable, grid, -3).mT.reshape(n, size, size, 2).to(dtype)
    return F.grid_sample(frames.to(dtype) + 1, grid, align_corners=False) - 1  # zero outside is black: hence + 1


# --- Phi: a recognition ONNX as a torch module ------------------------------------------------------------------------


def _is_recognition(graph) -> bool:
    shapes = list(input_shapes(graph).values())
    return len(shapes) == 1 and shapes[0][1:] == [3, CROP, CROP] and len(graph.output) == 1


def recognition_file(pack: str | Path, root: str | Path = "~/.insightface") -> Path:
    """The recognition model of a pack: the first .onnx by name with one 3x112x112 input and one output."""
    for file in (files := pack_files(pack, root)):
        if _is_recognition(read_onnx(file, weights=False).graph):
            return file
    raise UserError(f"no face recognition model (3x112x112 input) in {files[0].parent}; take a pack from {RELEASES}")


class ArcFace(nn.Module):
    """Phi of Eq. 8: crops (n, 3, 112, 112), RGB in [-1, 1] -> embeddings (n, E), raw, as the network returns them.

    Not normalized to length one: the cosines of Eq. 9 and 10 do that. Frozen: the weights follow `.to`, take no
    gradient and stay out of the state_dict (their home is the ONNX file). On a CPU it equals onnxruntime within 1e-4.
    """

    @classmethod
    def from_onnx(cls, path: str | Path) -> "ArcFace":
        """Read a recognition ONNX (w600k_r50, glint360k_r100, any IResNet-like export). UserError if it is not one."""
        model = read_onnx(path)
        if not _is_recognition(model.graph):
            shapes = ", ".join(str(shape) for shape in input_shapes(model.graph).values())
            needs = "expected one input [n, 3, 112, 112] and one output"
            raise UserError(f"{path} is not a face recognition model: its inputs are {shapes}, {needs}")
        # insightface's own rule for graphs that normalize by themselves (mxnet's): they are fed 0..255.
        names = [node.name for node in model.graph.node[:8]]
        raw_pixels = all(any(name.startswith(kind) for name in names) for kind in (("Sub", "_minus"), ("Mul", "_mul")))
        arcface = cls(OnnxGraph(model, path), raw_pixels)
        with blame(f"{path} is damaged", f"; download it again from {RELEASES}"), torch.no_grad():
            arcface(torch.zeros(1, 3, CROP, CROP))  # two weights whose sizes do not fit together, for instance
        return arcface

    def __init__(self, network: OnnxGraph, raw_pixels: bool):  # raw_pixels: the graph takes 0..255
        super().__init__()
        self.network, self.raw_pixels = network, raw_pixels

    def forward(self, crops: Tensor) -> Tensor:
        assert crops.shape[1:] == (3, CROP, CROP), f"crops are {tuple(crops.shape)}, expected (n, 3, {CROP}, {CROP})"
        crops = crops.to(next(self.buffers()).dtype)
        x = (crops + 1) * 127.5 if self.raw_pixels else crops  # not rounded: the gradient passes
        return self.network(x).flatten(1)  # (n, E), also from a head that ends in (n, E, 1, 1)


def embed(frames: Tensor, landmarks: Tensor, arcface: ArcFace) -> Tensor:
    """Eq. 8: e_f = Phi(Align(x_f)), the identity embedding of each frame, differentiable in the frames.

    frames     x_f  (n, 3, H, W)  RGB in about [-1, 1], floating point; not clamped, which would stop the gradient
    landmarks       (n, 5, 2)     (x, y) in pixels of the frame, from FaceDetector.detect; constants
    arcface    Phi                frozen
    returns    e_f  (n, E)        raw; E is 512 in InsightFace's packs

    A row without a face (landmarks zero) gives the embedding of a black crop, finite and without gradient: mask it
    with `valid`, m_f of Eq. 9.
    """
    return arcface(align(frames, landmarks))

"""What is measured of one video: who is in it (FaceSim), whether it follows the prompt (CLIP-Score), what was copied.

    frames ──> detector ──> retry with a gray border ─┬─> ArcFace ──────────> e_f ─┐   cos with the reference's,
               largest face, 5 landmarks              └─> CurricularFace ───> e_f ─┴─> negative = 0, mean over frames
    frames, prompt ──> CLIP ──> mean logits

FaceSim is what the released scripts compute (PKU-YuanGroup/ConsisID eval/get_facesim_fid.py, `consisid`;
PKU-YuanGroup/OpenS2V-Nexus eval/get_facesim.py, `opens2v`), CLIP-Score the former's eval/get_clipscore.py. Deviations:
frames are decoded one after the other by FFmpeg and counted, where the scripts seek with OpenCV and believe the header;
photos are turned as EXIF says; crops are not rounded to bytes between alignment, resizing and network; CLIP sees RGB.

Letters: n frames of a video, H W its size, E size of an embedding.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clips.manifest import FACE_MARGIN
from common.errors import UserError
from common.media import from_bytes, to_bytes
from evaluation.curricular import CurricularFace
from face import ArcFace, FaceDetector, align, embed, recognition_file
from losses import temporal_identity_loss

PROTOCOLS = {"consisid": 16, "opens2v": 32}  # frames looked at for faces
CLIP_FRAMES = 16
BORDER = 0.25  # of height and width, on each side, before a frame without a face is looked at again
GRAY = 128 / 127.5 - 1
CHUNK = 16  # frames on the device at a time


def spaced_frames(total: int, n: int) -> list[int]:
    """n numbers evenly spaced from the first to the last frame, rounded down; a short video has some twice."""
    return np.linspace(0, total - 1, n, dtype=int).tolist()


def clip_frames(total: int, n: int = CLIP_FRAMES) -> list[int]:
    """CLIP-Score's own choice, floor(i total / n), i < n: it never takes the last frame."""
    return [i * total // n for i in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# Faces


@dataclass
class Faces:
    """The largest face of each frame. Rows where `found` is False mean nothing."""

    found: Tensor  # (n,) bool
    retried: Tensor  # (n,) bool: looked at again with a border, whether that helped or not
    landmarks: Tensor  # (n, 5, 2) pixels of the frame
    boxes: Tensor  # (n, 4)
    arc: Tensor  # (n, E) ArcFace, raw
    cur: Tensor | None  # (n, 512) CurricularFace, raw


class FaceReader:
    """Detection and both embeddings. `onnx`: alignment and ArcFace by insightface itself (OpenCV, onnxruntime)."""

    def __init__(
        self,
        pack: str | Path = "buffalo_l",
        curricular: str | Path | None = None,
        device: str | torch.device = "cpu",
        det_size: int | None = 320,
        onnx: bool = False,
    ):
        self.device = torch.device(device)
        self.detector = FaceDetector(pack, device, (det_size, det_size) if det_size else None)
        file = recognition_file(pack)
        if onnx:
            self.arc: Callable[[Tensor, Tensor], Tensor] = insightface_embed(file)
        else:
            self.arc = partial(embed, arcface=ArcFace.from_onnx(file).to(self.device))
        self.curricular = CurricularFace.from_file(curricular, device) if curricular else None

    @torch.no_grad()
    def read(self, frames: np.ndarray) -> Faces:
        """frames (n, H, W, 3) bytes."""
        parts = [self._read(frames[i : i + CHUNK]) for i in range(0, len(frames), CHUNK)]
        columns = [[getattr(part, name) for part in parts] for name in Faces.__dataclass_fields__]
        return Faces(*[None if column[0] is None else torch.cat(column).cpu() for column in columns])

    def _read(self, frames: np.ndarray) -> Faces:
        x = from_bytes(torch.from_numpy(frames).to(self.device)).permute(0, 3, 1, 2)  # (n, 3, H, W)
        landmarks, boxes, found = self.detector.detect(x)
        arc = self.arc(x, landmarks)  # (n, E)
        retried = ~found
        if retried.any():
            top, left = int(x.shape[2] * BORDER), int(x.shape[3] * BORDER)
            padded = F.pad(x[retried], (left, left, top, top), value=GRAY)
            points, corners, found_now = self.detector.detect(padded)
            # The scripts embed ArcFace from the padded frame, so beyond the edge is gray, and align CurricularFace's
            # crop on the frame as it was, so there it is black.
            arc[retried] = self.arc(padded, points)
            shift = points.new_tensor([left, top])
            landmarks[retried], boxes[retried] = points - shift, corners - shift.repeat(2)
            found[retried] = found_now
        cur = None
        if self.curricular:
            crops = align(x, landmarks, 224)  # (n, 3, 224, 224)
            cur = self.curricular(F.avg_pool2d(crops, 2))  # to 112: OpenCV's bilinear at half size is this mean
        return Faces(found, retried, landmarks, boxes, arc, cur)


def insightface_embed(file: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """insightface's own recognizer with the signature of `face.embed`: norm_crop in OpenCV, then onnxruntime."""
    from insightface.app.common import Face
    from insightface.model_zoo import get_model

    model = get_model(str(file), providers=["CPUExecutionProvider"])

    def embed_all(frames: Tensor, landmarks: Tensor) -> Tensor:
        images = to_bytes(frames).flip(1).permute(0, 2, 3, 1).cpu().numpy()  # (n, H, W, 3), BGR
        rows = [np.zeros(model.output_shape[-1], np.float32) for _ in images]
        for i, (image, points) in enumerate(zip(np.ascontiguousarray(images), landmarks.cpu().numpy())):
            if points.any():
                with warnings.catch_warnings():  # insightface calls a method that skimage deprecates
                    warnings.simplefilter("ignore")
                    rows[i] = model.get(image, Face(kps=points))
        return torch.from_numpy(np.stack(rows)).to(frames.device)

    return embed_all


def cosines(e: Tensor, e_ref: Tensor) -> Tensor:
    """max(0, cos(e_f, e_ref)): e (n, E), e_ref (E,) -> (n,)."""
    return F.cosine_similarity(e.float(), e_ref.float()[None], dim=1).clamp(min=0)


def face_sim(e: Tensor, e_ref: Tensor, found: Tensor, skip_zeros: bool = False) -> float:
    """FaceSim = mean over frames with a face of max(0, cos(e_f, e_ref)); 0 where no frame has one.

    skip_zeros: OpenS2V's script leaves cosines of 0 and below out of FaceSim-Cur's mean (in FaceSim-Arc's it means to
    as well, but compares the list with 0 and so keeps them).
    """
    scores = cosines(e[found], e_ref)
    scores = scores[scores > 0] if skip_zeros else scores
    return scores.mean().item() if len(scores) else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# The prompt


class ClipScore:
    """Mean logits_per_image of a CLIP over a video's frames: about 100 times the cosine of image and text.

    name: a hub id or a folder with weights, tokenizer and preprocessor_config.json. transformers reads the weights:
    safetensors, or where a repository has none, its .bin by torch's weights-only reader. Images go through
    transformers' preprocessing on Pillow (shortest side to 224 bicubic, central crop, mean and deviation), texts are
    cut at the model's 77 tokens. bgr: colours the wrong way round, as the published script has them; for comparison
    with numbers made by it.
    """

    def __init__(self, name: str | Path, device: str | torch.device = "cpu", bgr: bool = False):
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.images = CLIPImageProcessorPil.from_pretrained(name)
            self.model = CLIPModel.from_pretrained(name).float().to(device).eval()
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"cannot load CLIP from {name} ({reason}): give --clip a folder or hub id, or none"
            ) from None
        self.device, self.bgr = device, bgr

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, prompt: str) -> float:
        """frames (n, H, W, 3) bytes, RGB."""
        limit = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer([prompt], truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        if self.bgr:
            frames = frames[..., ::-1]
        pixels = self.images(list(frames), return_tensors="pt")["pixel_values"].to(self.device)  # (n, 3, 224, 224)
        return self.model(**text, pixel_values=pixels).logits_per_image.mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Ours, not the paper's: what it argues about and does not measure (Sec. 3.2, copy-paste; Eq. 10, drift)


def identity_drift(e: Tensor, found: Tensor) -> float | None:
    """Eq. 10 as a measurement: mean over frames of 1 - cos(e_f, ē), ē the mean of e_f. Lower is steadier.

    e (n, E), found (n,). None where fewer than two frames have a face. A still image scores 0, so does a wrong face
    that stays: read it beside FaceSim.
    """
    return temporal_identity_loss(e[None].float(), found[None])[0].item() if found.sum() > 1 else None


def head_pose(landmarks: Tensor) -> Tensor:
    """(roll, yaw, pitch) in about radians from landmarks (n, 5, 2): eyes, nose, corners of the mouth -> (n, 3).

    With u the unit vector from eye to eye, v across it, d their distance, a the middle of the eyes, b of the mouth:
    roll = angle of u;  yaw = 2 (nose - a)·u / d;  pitch = 2 ((nose - a)·v / (b - a)·v - 1/2).
    The factors 2: the tip of a nose stands out by about half the distance of the eyes.
    """
    left, right, nose, mouth_left, mouth_right = landmarks.double().unbind(1)
    across, eyes, mouth = right - left, (left + right) / 2, (mouth_left + mouth_right) / 2
    distance = across.norm(dim=1, keepdim=True).clamp(min=1e-6)
    u = across / distance
    v = torch.stack([-u[:, 1], u[:, 0]], 1)  # downwards in an upright face: y points down
    height = ((mouth - eyes) * v).sum(1)
    height = torch.where(height.abs() < 1e-6, 1e-6, height)
    roll = torch.atan2(u[:, 1], u[:, 0])
    yaw = 2 * ((nose - eyes) * u).sum(1) / distance[:, 0]
    pitch = 2 * (((nose - eyes) * v).sum(1) / height - 0.5)
    return torch.stack([roll, yaw, pitch], 1)


def pose_copy(landmarks: Tensor, reference: Tensor, found: Tensor, sigma: float = 0.2) -> float | None:
    """How much the head is held as in the reference: mean over frames of exp(-|p_f - p_ref|^2 / (2 sigma^2)).

    p is `head_pose`; landmarks (n, 5, 2), reference (5, 2). 1: held still, exactly as in the photo; 0.61 at sigma, 0.2
    or about 11 degrees. High is copy-paste, unless the prompt asks for that pose. None without a face.
    """
    if not found.any():
        return None
    square = (head_pose(landmarks[found]) - head_pose(reference[None])).square().sum(1)
    return torch.exp(-square / (2 * sigma**2)).mean().item()


def colors_outside(image: np.ndarray, box: np.ndarray, bins: int = 8) -> np.ndarray | None:
    """Joint RGB histogram, (bins^3,) with sum 1, of what lies outside FACE_MARGIN times the face's box.

    image (H, W, 3) bytes; box left, top, right, bottom. Each pixel is shared out among its nearest bins (trilinear),
    so a slight change of colour is a slight change of the histogram. None where the face leaves less than 5 %.
    """
    center, half = (box[:2] + box[2:]) / 2, FACE_MARGIN * (box[2:] - box[:2]) / 2
    (left, top), (right, bottom) = np.maximum(center - half, 0).astype(int), np.ceil(center + half).astype(int)
    outside = np.ones(image.shape[:2], bool)
    outside[top : max(bottom, 0), left : max(right, 0)] = False
    if outside.mean() < 0.05:
        return None
    place = image[outside].astype(np.float64) / 255 * (bins - 1)  # (pixels, 3)
    low = np.minimum(place.astype(int), bins - 2)
    histogram = np.zeros(bins**3)
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(corner, place - low, 1 - (place - low)).prod(1)
        histogram += np.bincount((low + corner) @ (bins**2, bins, 1), weight, bins**3)
    return histogram / outside.sum()


def background_copy(
    frames: np.ndarray, boxes: Tensor, found: Tensor, reference: np.ndarray, box: Tensor
) -> float | None:
    """How much of what surrounds the face is the reference's: mean over frames of sum_c min(h_f(c), h_ref(c)).

    h is `colors_outside`: backgrounds and clothes, by colour, wherever they are in the picture. 1: the same colours in
    the same shares; 0: none in common. High is copy-paste, unless the prompt describes the photo. None without a face,
    or where the faces fill the pictures. frames (n, H, W, 3), reference (H', W', 3) bytes.
    """
    h_ref = colors_outside(reference, box.numpy())
    if h_ref is None:
        return None
    histograms = [colors_outside(frames[i], boxes[i].numpy()) for i in torch.nonzero(found)[:, 0].tolist()]
    shared = [np.minimum(h, h_ref).sum() for h in histograms if h is not None]
    return float(np.mean(shared)) if shared else None


# ---------------------------------------------------------------------------------------------------------------------
# All of it


def measure(
    frames: np.ndarray,
    for_clip: np.ndarray | None,
    prompt: str,
    photo: Image.Image,
    reader: FaceReader,
    clip: ClipScore | None,
    protocol: str,
) -> dict[str, float | int | None]:
    """All scores of one video. UserError where the reference shows no face: nothing can be said about identity."""
    reference = np.array(photo)
    ref = reader.read(reference[None])
    if not ref.found[0]:
        raise UserError("no face is found in the reference")
    faces = reader.read(frames)
    cur = None
    if faces.cur is not None:
        cur = face_sim(faces.cur, ref.cur[0], faces.found, skip_zeros=protocol == "opens2v")
    return {
        "facesim_arc": face_sim(faces.arc, ref.arc[0], faces.found),
        "facesim_cur": cur,
        "clip_score": clip(for_clip, prompt) if clip else None,
        "face_rate": faces.found.float().mean().item(),
        "retried": int(faces.retried.sum()),
        "background_copy": background_copy(frames, faces.boxes, faces.found, reference, ref.boxes[0]),
        "pose_copy": pose_copy(faces.landmarks, ref.landmarks[0], faces.found),
        "identity_drift": identity_drift(faces.arc, faces.found),
    }

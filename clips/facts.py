"""What a cached clip shows: faces, likeness to its reference, surroundings. Measured once, while the clip is cached.

    frames ──> five pictures ──> strip, small           for `prepare.py show`, which so needs no model and no video
                  └─> first, middle, last ──> detector, ArcFace ──> Facts

A shard holds both as ROW.strip and ROW.facts. Training reads neither. evaluation/ measures videos with the same rules.
"""

import io
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import StringConstraints
from torch import Tensor

from clips.manifest import FACE_MARGIN
from common.media import from_bytes
from common.schema import FiniteFloat, Share, record
from face import ArcFace, FaceDetector, embed

SAME_PERSON = 0.3  # cosine of two ArcFace embeddings; two people rarely reach it
CERTAIN = 0.6  # a face this similar is upright, without a second look
STRIP, STRIP_SIDE = 5, 144  # pictures of a strip, and the longer side of each in pixels
GRID = 8  # side of a signature's pictures
Box = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]  # left, top, right, bottom in fractions of the picture


@record
class Facts:
    """Measurements in the first, middle and last frame; None where these show no face."""

    boxes: tuple[Box | None, Box | None, Box | None]  # the largest face of each
    ref_box: Box
    similarity: FiniteFloat | None  # of e_ref and the most similar of these faces
    turned: Literal[0, 90, 180, 270]  # the turn against the clock that makes the face upright
    pose: tuple[FiniteFloat, FiniteFloat, FiniteFloat] | None  # head_pose in degrees, the mean of these faces
    background: Share | None  # background_copy
    signature: Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{6 * GRID**2}}}\z")]  # gray, GRID x GRID each


@torch.no_grad()
def measure(loaded: dict[str, Any], e_ref: Tensor, detector: FaceDetector, arcface: ArcFace) -> dict[str, Tensor]:
    """`strip` (JPEG) and `facts` (JSON) of a clip as bytes. `loaded`: frames, and image and box of the reference."""
    frames, ref_image = loaded["frames"], Image.open(io.BytesIO(loaded["png"]))
    strip = frames[np.linspace(0, len(frames) - 1, STRIP).astype(int)]  # (5, H, W, 3)
    x = from_bytes(strip[::2]).permute(0, 3, 1, 2)  # (3, 3, H, W)
    similarity, landmarks, boxes, valid = _likeness(x, e_ref, detector, arcface)
    pose = torch.rad2deg(head_pose(landmarks[valid])).mean(0).round().add(0.0).tolist() if valid.any() else None
    turned = round(pose[0] / 90) % 4 if pose else 0
    if similarity < CERTAIN and not turned:  # detectors find faces in a picture on its side, ArcFace not the person
        turns = [_likeness(x[1:2].rot90(k, (2, 3)), e_ref, detector, arcface)[0] for k in (1, 2, 3)]
        turned = 1 + int(np.argmax(turns)) if max(turns) > max(SAME_PERSON, similarity + 0.15) else 0
    small, ref_small = [thumbnail(Image.fromarray(picture)) for picture in strip], thumbnail(ref_image)
    boxes = [_fractions(box, x.shape[3], x.shape[2]) if found else None for box, found in zip(boxes, valid)]
    ref_box = _fractions(torch.as_tensor(loaded["box"]), *ref_image.size)
    shared = background(small[::2], boxes, ref_small, ref_box)
    facts = {
        "boxes": boxes,
        "ref_box": ref_box,
        "similarity": round(similarity, 4) if valid.any() else None,
        "turned": 90 * turned,
        "pose": pose,
        "background": shared and round(shared, 4),
        "signature": b"".join(_gray(picture) for picture in small[::2]).hex(),
    }
    parts = {"strip": jpeg(Image.fromarray(np.hstack(small))), "facts": json.dumps(facts).encode()}
    return {part: torch.frombuffer(bytearray(data), dtype=torch.uint8) for part, data in parts.items()}


def _likeness(
    x: Tensor, e_ref: Tensor, detector: FaceDetector, arcface: ArcFace
) -> tuple[float, Tensor, Tensor, Tensor]:
    """Cosine of e_ref and the most similar face in x (n, 3, H, W), -1 without a face; and what the detector finds."""
    landmarks, boxes, valid = detector.detect(x)
    if not valid.any():
        return -1.0, landmarks, boxes, valid
    e = embed(x[valid].to(e_ref.device), landmarks[valid].to(e_ref.device), arcface)
    return torch.cosine_similarity(e, e_ref[None]).max().item(), landmarks, boxes, valid


def background(
    pictures: list[Image.Image], boxes: Sequence[Box | None], ref_image: Image.Image, ref_box: Box
) -> float | None:
    """`background_copy` of a clip's pictures from a reference, both small, with boxes in fractions."""
    valid = torch.tensor([box is not None for box in boxes])
    pixels = [torch.tensor(box or (0,) * 4) * torch.tensor(pictures[0].size * 2) for box in boxes]
    ref_box = torch.tensor(ref_box) * torch.tensor(ref_image.size * 2)
    return background_copy(np.stack(pictures), torch.stack(pixels), valid, np.asarray(ref_image), ref_box)


def thumbnail(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((STRIP_SIDE, STRIP_SIDE), Image.Resampling.LANCZOS)
    return small


def _gray(image: Image.Image) -> bytes:
    return image.convert("L").resize((GRID, GRID), Image.Resampling.BOX).tobytes()


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80, subsampling=0)  # small pictures need all of their color
    return file.getvalue()


def _fractions(box: Tensor, width: int, height: int) -> Box:
    return tuple(round(number, 4) for number in (box / torch.tensor([width, height] * 2)).tolist())


# --- Copies of the reference: pose and surroundings; evaluation/ measures samples with them ---------------------------


def head_pose(landmarks: Tensor) -> Tensor:
    """(roll, yaw, pitch) in about radians from landmarks (n, 5, 2): eyes, nose, corners of the mouth -> (n, 3).

    With u the unit vector from eye to eye, v across it, d their distance, a the middle of the eyes, b of the mouth:
    roll = angle of u;  yaw = 2 (nose - a)·u / d;  pitch = 2 ((nose - a)·v / (b - a)·v - 1/2).
    The factors 2 make radians of it: the tip of a nose stands out by about half the distance of the eyes.
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


def pose_copy(landmarks: Tensor, reference: Tensor, valid: Tensor, sigma: float = 0.2) -> float | None:
    """How closely the video repeats the photo's head pose: mean over frames of exp(-|p_f - p_ref|^2 / (2 sigma^2)).

    p is `head_pose`. 1: exactly the photo's pose in every frame; 0.61 at a distance of sigma, about 11 degrees. High is
    copy-paste, unless the prompt asks for that pose. None without a face.
    """
    if not valid.any():
        return None
    square = (head_pose(landmarks[valid]) - head_pose(reference[None])).square().sum(1)
    return torch.exp(-square / (2 * sigma**2)).mean().item()


def colors_outside(image: np.ndarray, box: np.ndarray, bins: int = 8) -> np.ndarray | None:
    """Joint RGB histogram, (bins^3,) with sum 1, of an image's (H, W, 3) pixels outside FACE_MARGIN times the box.

    Each pixel is shared out among its nearest bins (trilinear), so a slight change of colour is a slight change of the
    histogram. None where the face leaves less than 5 %.
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
    frames: np.ndarray, boxes: Tensor, valid: Tensor, reference: np.ndarray, box: Tensor
) -> float | None:
    """How much of the photo's surroundings the video repeats: mean over frames of sum_c min(h_f(c), h_ref(c)).

    h is `colors_outside`: backgrounds and clothes, by colour, wherever they are in the picture. 1: the same colours in
    the same shares; 0: none in common. High is copy-paste, unless the prompt describes the photo. None without a face,
    or where the faces fill the pictures.
    """
    h_ref = colors_outside(reference, box.numpy())
    histograms = [colors_outside(frames[i], boxes[i].numpy()) for i in torch.nonzero(valid)[:, 0].tolist()]
    shared = [np.minimum(h, h_ref).sum() for h in histograms if h is not None and h_ref is not None]
    return float(np.mean(shared)) if shared else None

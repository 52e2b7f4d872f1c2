"""Scores of one video: identity (FaceSim), agreement with the prompt (CLIP-Score), copies of the photo (ours).

FaceSim and CLIP-Score follow ConsisID's released scripts (PKU-YuanGroup/ConsisID, eval/get_facesim_fid.py and
eval/get_clipscore.py). Deviations: FFmpeg decodes the frames one after the other and counts them, where the scripts
seek with OpenCV and believe the header; photos are turned as EXIF says; crops are not rounded to bytes between
alignment, resizing and network; CLIP receives RGB.

Letters: n frames of a video, H W its size, E size of an embedding.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clips.facts import background_copy, pose_copy
from common.errors import UserError
from common.media import from_bytes
from evaluation.curricular import CurricularFace, require_finite
from face import ArcFace, FaceDetector, align, embed, recognition_file
from losses import temporal_identity_loss

Device = str | torch.device

FRAMES = 16  # of a video, for faces and for CLIP
BORDER = 0.25  # of height and width, on each side, for the second look at a frame without a face
GRAY = 128 / 127.5 - 1
CHUNK = 16  # frames on the device at a time


def spaced_frames(total: int, n: int = FRAMES) -> list[int]:
    """n numbers evenly spaced from the first to the last frame, rounded down; repeated where a video is shorter."""
    return np.linspace(0, total - 1, n, dtype=int).tolist()


def clip_frames(total: int, n: int = FRAMES) -> list[int]:
    """The frames of CLIP-Score's script: floor(i total / n), i < n, so never the last one."""
    return [i * total // n for i in range(n)]


class Faces(NamedTuple):
    """The largest face of each frame. Rows without a face, where `valid` is False, hold no meaningful numbers."""

    valid: Tensor  # (n,) bool, m_f of Eq. 9
    retried: Tensor  # (n,) bool: the frame was searched again with a border, with or without success
    landmarks: Tensor  # (n, 5, 2) pixels of the frame
    boxes: Tensor  # (n, 4)
    arc: Tensor  # (n, E) ArcFace, raw
    cur: Tensor | None  # (n, 512) CurricularFace, raw


class FaceReader:
    """Detection and both embeddings. `curricular`: the file of CurricularFace's weights, or None."""

    def __init__(
        self, pack: str | Path, curricular: str | Path | None = None, device: Device = "cpu", det_size: int | None = 320
    ):
        self.device, self.pack = torch.device(device), pack
        self.detector = FaceDetector(pack, device, (det_size, det_size) if det_size else None)
        self.arcface = ArcFace.from_onnx(recognition_file(pack)).to(self.device)
        self.curricular = CurricularFace.from_file(curricular, device) if curricular else None

    @torch.no_grad()
    def read(self, frames: np.ndarray) -> Faces:
        """frames (n, H, W, 3) bytes."""
        parts = [self._read(frames[i : i + CHUNK]) for i in range(0, len(frames), CHUNK)]
        return Faces(*[None if column[0] is None else torch.cat(column).cpu() for column in zip(*parts)])

    def _read(self, frames: np.ndarray) -> Faces:
        x = from_bytes(torch.from_numpy(frames).to(self.device)).permute(0, 3, 1, 2)  # (n, 3, H, W)
        landmarks, boxes, valid = self.detector.detect(x)
        arc = embed(x, landmarks, self.arcface)  # (n, E)
        retried = ~valid
        if retried.any():
            top, left = int(x.shape[2] * BORDER), int(x.shape[3] * BORDER)
            padded = F.pad(x[retried], (left, left, top, top), value=GRAY)
            points, corners, valid_now = self.detector.detect(padded)
            # In the scripts, ArcFace's crop comes from the padded frame, gray beyond the edge, and CurricularFace's
            # from the frame without border, black beyond the edge.
            arc[retried] = embed(padded, points, self.arcface)
            shift = points.new_tensor([left, top])
            landmarks[retried], boxes[retried] = points - shift, corners - shift.repeat(2)
            valid[retried] = valid_now
        cur = None
        if self.curricular:
            crops = align(x, landmarks, 224)  # (n, 3, 224, 224)
            cur = self.curricular(F.avg_pool2d(crops, 2))  # to 112: OpenCV's bilinear at half size is this mean
        return Faces(valid, retried, landmarks, boxes, arc, cur)


def face_sim(e: Tensor, e_ref: Tensor, valid: Tensor) -> float:
    """FaceSim = mean over frames with a face of max(0, cos(e_f, e_ref)); 0 without any. e (n, E), e_ref (E,)."""
    cosines = F.cosine_similarity(e[valid].float(), e_ref.float()[None], dim=1).clamp(min=0)
    return cosines.mean().item() if valid.any() else 0.0


class ClipScore:
    """Mean logits_per_image of a CLIP over a video's frames: about 100 times the cosine of image and text.

    name: a hub id, or a folder with tokenizer, preprocessor_config.json and weights as safetensors. Texts are cut at
    the model's 77 tokens. bgr: colours in reverse order, as in the published script; to compare with its numbers.
    """

    def __init__(self, name: str | Path, device: Device = "cpu", bgr: bool = False):
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.images = CLIPImageProcessorPil.from_pretrained(name)
            options = {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
            model, info = CLIPModel.from_pretrained(name, **options)
            if info["missing_keys"]:
                raise ValueError(f"it has no weights {min(info['missing_keys'])}")
            require_finite(model.state_dict(), name)
        except Exception as error:  # transformers raises many kinds for a file that is missing, damaged or of others
            reason = str(error).strip().split("\n")[0]
            advice = "give --clip a folder or hub id with safetensors, or none"
            raise UserError(f"cannot load CLIP from {name} ({reason}): {advice}") from None
        self.model, self.device, self.bgr = model.float().to(device).eval(), device, bgr

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, prompt: str) -> float:
        """frames (n, H, W, 3) bytes, RGB."""
        limit = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer([prompt], truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        frames = list(frames[..., ::-1] if self.bgr else frames)
        pixels = self.images(frames, return_tensors="pt")["pixel_values"].to(self.device)  # (n, 3, 224, 224)
        return self.model(**text, pixel_values=pixels).logits_per_image.mean().item()


# --- Ours, not the paper's: copy-paste (Sec. 3.2) and drift (Eq. 10), which it discusses and does not measure ---------


def identity_drift(e: Tensor, valid: Tensor) -> float | None:
    """Eq. 10 as a measurement: mean over frames of 1 - cos(e_f, ē), ē the mean of e_f. Lower is steadier.

    A still image scores 0, so does a wrong face that stays: read it beside FaceSim. None with fewer than two faces.
    """
    return temporal_identity_loss(e[None].float(), valid[None])[0].item() if valid.sum() > 1 else None


# --- All of it --------------------------------------------------------------------------------------------------------


Photo = tuple[np.ndarray, Faces]  # pixels (1, H, W, 3), and the face in them


def read_reference(photo: Image.Image, reader: FaceReader) -> Photo:
    """Pixels (1, H, W, 3) and face of a photo. UserError without a face: nothing can be said about identity."""
    pixels = np.array(photo)[None]
    faces = reader.read(pixels)
    if not faces.valid[0]:
        raise UserError("no face is found in the reference")
    return pixels, faces


def copies(frames: np.ndarray, faces: Faces, photo: Photo) -> tuple[float | None, float | None]:
    """`background_copy` and `pose_copy` of a video from a photo."""
    pixels, ref = photo
    background = background_copy(frames, faces.boxes, faces.valid, pixels[0], ref.boxes[0])
    return background, pose_copy(faces.landmarks, ref.landmarks[0], faces.valid)


def measure(
    frames: np.ndarray,
    for_clip: np.ndarray | None,
    prompt: str,
    reference: Photo,
    other: Photo | None,
    reader: FaceReader,
    clip: ClipScore | None,
) -> dict[str, float | int | None]:
    """All scores of one video from its frames. `other` is the photo of another case: it is repeated by chance."""
    ref, faces = reference[1], reader.read(frames)
    background, pose = copies(frames, faces, reference)
    background_chance, pose_chance = copies(frames, faces, other) if other else (None, None)
    return {
        "facesim_arc": face_sim(faces.arc, ref.arc[0], faces.valid),
        "facesim_cur": None if faces.cur is None else face_sim(faces.cur, ref.cur[0], faces.valid),
        "clip_score": clip(for_clip, prompt) if clip else None,
        "face_rate": faces.valid.float().mean().item(),
        "retried": int(faces.retried.sum()),
        "background_copy": background,
        "background_chance": background_chance,
        "pose_copy": pose,
        "pose_chance": pose_chance,
        "identity_drift": identity_drift(faces.arc, faces.valid),
    }

"""The parts of making a video that sample.py and the page in demo/ share: the DiT as the options say, a check of the
result, its likeness to the photo."""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoint import Checkpoint
from common.errors import UserError
from config import ASSETS
from engine.fp8 import can_multiply, load_fp8, multiply_in_fp8
from engine.lora_files import LoRA, merge_lora, merged
from engine.offload import offload
from evaluation.metrics import FaceReader, face_sim
from model import LTXVideo


def load_dit(
    options: argparse.Namespace, checkpoint: Checkpoint, loras: list[LoRA], device: torch.device, dtype: torch.dtype
) -> LTXVideo:
    """The DiT with its LoRAs, stored and run as --fp8, --offload and --compile say."""
    # With --offload the model is loaded into host memory, so the GPU never holds all of it.
    first = "cpu" if options.offload else device
    if options.fp8:
        with torch.device("meta"):
            model = LTXVideo(checkpoint.config["transformer"])
        changes = {target: partial(merged, target=target, loras=loras) for lora in loras for target in lora.changes}
        load_fp8(model, checkpoint, first, dtype, changes)
        if can_multiply(device, dtype):
            multiply_in_fp8(model)
        else:
            need = "a card of compute capability 8.9 or more, and --dtype bfloat16"
            print(f"note: --fp8 saves memory, not time: products in 8 bits need {need}")
    else:
        model = merge_lora(LTXVideo.from_checkpoint(checkpoint, first, dtype), loras)
    model = offload(model, device) if options.offload else model.to(device)
    return model.compile_blocks() if options.compile else model


def require_picture(video: torch.Tensor) -> None:
    """UserError for a video that shows nothing: weights with NaN, or a LoRA far too strong, give one."""
    if not video.isfinite().all():
        raise UserError(
            "the video is not finite: lower the LoRA's strength, or leave out --dtype float16; nothing was written"
        )
    if video.max() == video.min():
        raise UserError(
            "the video is one constant color: lower the LoRA's strength, or run --check; nothing was written"
        )


def face_reader(options: argparse.Namespace, device: torch.device) -> FaceReader | None:
    """The face models that measure similarity. --faces names the pack; a name that is not on disk is downloaded.
    Without --faces: the drawn-face pack for the tiny model, else ~/.insightface/models/buffalo_l if it exists, else
    None."""
    local_pack = Path("~/.insightface/models/buffalo_l").expanduser()
    pack = options.faces or (
        ASSETS / "faces" if not options.ckpt else local_pack if any(local_pack.glob("*.onnx")) else None
    )
    return FaceReader(pack, device=device, det_size=128 if knows_drawings(pack) else None) if pack else None


def knows_drawings(pack: str | Path) -> bool:
    """True for the face models in assets/, under any of their names."""
    return Path(pack).resolve() == (ASSETS / "faces").resolve()


def likeness(reader: FaceReader, ref_image: Image.Image, frames: np.ndarray) -> str:
    """FaceSim of metrics.py over all frames, in words."""
    reference, faces = reader.read(np.array(ref_image)[None]), reader.read(frames)
    if not reference.valid.any():
        return "no face was found in the photo"
    name = "a toy recognizer of drawn faces" if knows_drawings(reader.pack) else "ArcFace"
    count, score = int(faces.valid.sum()), face_sim(faces.arc, reference.arc[0], faces.valid)
    return f"similarity to the photo {score:.2f} ({name}), a face in {count} of {len(frames)} frames"

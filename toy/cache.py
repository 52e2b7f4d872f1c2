"""A cache of the drawn world: what data.py prepare makes of a manifest, made of clips drawn as they are needed.

    toy.toy_clip(seed, 0), (seed, 1), ... ──> frames, caption, portrait ──> cache.fill: VAE, Gemma, detector, ArcFace

Training then reads it as it reads any cache. `[data] toy = 20000` in a config makes it where it is missing.
"""

import hashlib
from pathlib import Path

import torch
from PIL import Image

from checkpoint import Checkpoint
from clips.cache import PAPER, fill, made_with
from clips.manifest import Clip, with_face
from common.errors import UserError
from face import FaceDetector
from toy.world import toy_clip, toy_words

SHARD_GB = 0.1  # some hundred clips: small, so that there is one for each of many processes


def prepare_toy(
    out: str | Path,
    count: int,
    ckpt: str | Path,
    gemma: str | Path,
    faces: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    workers: int = 1,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Make, or complete, a cache of `count` clips of the training split, in the checkpoint's own size; as
    cache.prepare does, with this rank's share of the shards. Raises UserError if the size is no square."""
    checkpoint = Checkpoint(ckpt)
    settings = PAPER | {k: v for k, v in checkpoint.ours.get("defaults", {}).items() if k in PAPER}
    if settings["height"] != settings["width"]:
        raise UserError(f"{ckpt} makes {settings['height']}x{settings['width']}, and the drawn world is square")
    first = toy_clip(seed, 0, settings["frames"], settings["height"], settings["fps"])
    drawn = hashlib.sha256(first["frames"].tobytes() + first["reference"].tobytes() + first["caption"].encode())
    settings |= {"seed": seed, "manifest": "toy", "toy": count, "world": drawn.hexdigest()[:16]}
    settings = made_with(settings, checkpoint, gemma, faces, dtype, count, SHARD_GB)
    size = settings["frames"], settings["fps"]
    mine = [k // settings["rows_per_shard"] % world == rank for k in range(count)]  # the other captions cost time
    clips = [Clip(k + 1, Path("toy"), toy_words(seed, k, *size) if own else "") for k, own in enumerate(mine)]
    fill(Path(out), clips, settings, load_toy, ckpt, gemma, faces, device, dtype, workers, rank, world)


def load_toy(clip: Clip, settings: dict, detector: FaceDetector) -> dict:
    """What manifest.load_clip gives, drawn. Raises Rejected where the detector does not find the portrait's face."""
    drawn = toy_clip(settings["seed"], clip.line - 1, settings["frames"], settings["height"], settings["fps"])
    portrait = Image.fromarray(drawn["reference"])
    return {"frames": drawn["frames"], "note": ""} | with_face(portrait, detector, clip.name)

"""A cache of the drawn world, like prepare.py's of a manifest. Its clips are drawn on the way.

    toy_clip(seed, 0), (seed, 1), ... ──> frames, caption, portrait ──> clips.cache.fill: VAE, Gemma, detector, ArcFace

    python -m toy.cache --count 15000 --out cache/tiny           # for train.py with configs/tiny.toml
    python -m toy.cache --count 4000 --reference "same clip" --share 0.5 --out cache/tempting
    torchrun --nproc_per_node 8 -m toy.cache --count 15000 --out cache/tiny

The command can be killed and run again: existing shards are kept. cache.json records every fact that decides the clips,
and a cache made otherwise is refused.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from checkpoint import open_checkpoint
from clips.cache import VIDEO, Models, fill, made_with
from clips.manifest import Clip, with_face
from common.device import own_place, resolve_device
from common.errors import SEED, Parser, UserError, one_line_errors, whole
from common.schema import validate
from config import ASSETS
from face import FaceDetector
from toy.world import APART, Temptation, toy_clip, toy_words

LARGEST = 1_000_000  # clips; they take about 30 GB
SHARD_GB = 0.1  # a few hundred clips: small, so that each of many processes has a shard to make


def prepare_toy(
    out: str | Path,
    count: int,
    ckpt: str | Path,
    gemma: str | Path,
    faces: str | Path,
    device: str | torch.device = "cpu",
    seed: int = 0,
    temptation: Temptation = APART,
) -> None:
    """Make, or complete, a cache of `count` clips of the training split, in the checkpoint's own size: the shards of
    this process. UserError if the size is no square."""
    place, checkpoint = own_place(), open_checkpoint(ckpt)
    settings = VIDEO | {k: v for k, v in checkpoint.ours.get("defaults", {}).items() if k in VIDEO}
    frames, height, width, fps = (settings[key] for key in ("frames", "height", "width", "fps"))
    if height != width:
        raise UserError(f"{ckpt} makes {height}x{width}, and the drawn world is square")
    first = toy_clip(seed, 0, frames, height, fps)
    digest = hashlib.sha256(first["frames"].tobytes() + first["reference"].tobytes() + first["caption"].encode())
    settings |= {"seed": seed, "manifest": "toy", "toy": count, "world": digest.hexdigest()[:16]}
    if temptation != APART:
        settings |= {"reference": temptation.reference, "share": temptation.share}
    models = Models(checkpoint, gemma, faces, device, torch.float32)
    settings = made_with(settings, models, count, SHARD_GB)
    own = [k // settings["rows_per_shard"] % place.world == place.rank for k in range(count)]
    words = [toy_words(seed, k, frames, fps) if own[k] else "" for k in range(count)]
    clips = [Clip(line=k + 1, video=Path("toy"), caption=text, identity=f"{k}") for k, text in enumerate(words)]

    def load(clip: Clip, settings: dict[str, Any], detector: FaceDetector) -> dict[str, Any]:
        """The fields of manifest.load_clip, drawn."""
        drawn = toy_clip(seed, clip.line - 1, frames, height, fps, temptation=temptation)
        portrait = Image.fromarray(drawn["reference"])
        return {"frames": drawn["frames"], "note": ""} | with_face(portrait, detector, clip.name)

    fill(Path(out), clips, settings, load, models, workers=1)


def add_temptation(parser: argparse.ArgumentParser) -> None:
    """--reference and --share, which toy.ablate has too."""
    text = "training references: apart from their clip, a frame of the same clip, or its scene at another moment"
    parser.add_argument("--reference", default="apart", metavar="KIND", help=f"apart, same clip or same scene: {text}")
    parser.add_argument("--share", type=float, help="part of the references with that relation (1, for apart 0)")


def read_temptation(options: argparse.Namespace) -> Temptation:
    share = options.share if options.share is not None else float(options.reference != "apart")
    temptation = validate(Temptation, {"reference": options.reference, "share": share}, "--reference, --share")
    if temptation.reference == "apart" and share:
        raise UserError(f"--share {share} needs a relation: --reference 'same clip' or --reference 'same scene'")
    return temptation if share else APART


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the cache; an unfinished one is completed")
    parser.add_argument("--count", type=whole(1, LARGEST), required=True, help="clips, each of another person")
    parser.add_argument("--ckpt", default=str(ASSETS / "tiny.safetensors"), help="VAE, size, frame rate (%(default)s)")
    parser.add_argument("--gemma", default=str(ASSETS / "gemma"), help="text encoder (%(default)s)")
    parser.add_argument("--faces", default=str(ASSETS / "faces"), help="face model pack (%(default)s)")
    parser.add_argument("--seed", type=SEED, default=0, help="other people and scenes (%(default)s)")
    add_temptation(parser)
    parser.add_argument("--device", help="default: cuda, one GPU for each process, where there is one; else cpu")
    options = parser.parse_args(namespace=argparse.Namespace(dtype="float32"))
    temptation = read_temptation(options)
    options.device = options.device or (f"cuda:{own_place().local_rank}" if torch.cuda.is_available() else "cpu")
    device, _ = resolve_device(options)
    models = options.ckpt, options.gemma, options.faces
    prepare_toy(options.out, options.count, *models, device, options.seed, temptation)


if __name__ == "__main__":
    with one_line_errors():
        main()

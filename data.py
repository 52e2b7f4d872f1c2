"""What the trainer reads: clips from a cache, and the reference, augmented and letterboxed anew each time.

    manifest (manifest.py) ──> cache (cache.py): latents, features, image, e_ref ──> CachedClips[i] ─┬─────────────────>
                                                                                                     │           collate
       image ──> augment_reference, Eq. 5, in training only ──> letterbox, Sec. 3.1 ──> (3, H, W) ───┴─────────────────>

The latents of the video never change, so they are computed once; the reference is augmented anew in each epoch, so its
pixels are cached, and the VAE encodes it in the training loop. What it is compared with, e_ref, comes from the
unaugmented one.

    python data.py prepare --manifest clips.jsonl --ckpt ltx-2.3-22b-dev.safetensors --out cache
    torchrun --nproc-per-node 8 data.py prepare ...            # on 8 GPUs; run it again after any interruption
    python data.py vip200k --annotations vip200k.json --videos videos --out vip200k.jsonl
    python data.py show cache
"""

import argparse
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from safetensors import safe_open
from torch import Tensor

from clips.cache import NULL, PARTS, prepare, read_metadata, read_settings, shard_file
from clips.manifest import vip200k
from common.errors import Parser, UserError, one_line_errors, whole_file
from common.media import cover, to_tensor
from text import GEMMA

ASSETS = Path(__file__).parent / "assets"  # what is embedded: the default where no checkpoint is named

# ---------------------------------------------------------------------------------------------------------------------
# The reference: Sec. 3.1 and Eq. 5

AUGMENT = {  # probability of each operation, drawn independently, and its strength
    "flip": 0.5,
    "rotate": 0.5,
    "degrees": 10.0,  # to either side
    "crop": 0.5,
    "keep": 0.85,  # at least this much of the width and of the height, each drawn by itself
    "jitter": 0.8,
    "brightness": 0.2,  # factors from 1 - 0.2 to 1 + 0.2
    "contrast": 0.2,
    "saturation": 0.2,
    "hue": 0.02,  # of the color circle, to either side
}


def letterbox(image: Image.Image, height: int, width: int) -> Image.Image:
    """The whole image at the largest scale that fits height x width, centred, with black bars (Sec. 3.1).

    The paper scales by the largest factor that keeps the aspect ratio and pads the shorter side symmetrically; the
    padding's color is left open, and black is the decision here.
    """
    scale = min(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    resized = image.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas


FITS = {"letterbox": letterbox, "cover": cover}  # "cover" is not the paper's; some LoRAs were trained with it


def augment_reference(image: Image.Image, rng: np.random.Generator, **strength: float) -> Image.Image:
    """A(I_ref) of Eq. 5: flip, slight rotation, mild crop, color jitter. For training only, never at inference.

    `strength` overrides entries of AUGMENT. It works on the photo, before the letterbox: so the bars stay straight and
    black whatever is drawn. A rotation keeps the photo's size and its centre; the corners it uncovers become black like
    the bars, because to cut them away would cost up to 14% of each side, more than the mild crop may. All numbers are
    drawn whether they are used or not, so another strength of one operation leaves the draws of the others alone.
    """
    if unknown := strength.keys() - AUGMENT.keys():
        raise UserError(f"no augmentation {sorted(unknown)[0]!r}; there are {', '.join(AUGMENT)}")
    a = AUGMENT | strength
    flip, rotate, crop, jitter = rng.random(4) < [a["flip"], a["rotate"], a["crop"], a["jitter"]]
    angle = rng.uniform(-1, 1) * a["degrees"]
    kept, place = rng.uniform(a["keep"], 1, 2), rng.random(2)
    factors = 1 + rng.uniform(-1, 1, 3) * [a["brightness"], a["contrast"], a["saturation"]]
    hue = rng.uniform(-1, 1) * a["hue"]

    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rotate:
        image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(0, 0, 0))
    if crop:
        size = np.ceil(kept * image.size).astype(int)
        left, top = np.floor(place * (image.size - size + 1)).astype(int)
        image = image.crop((left, top, left + size[0], top + size[1]))
    if jitter:
        for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
            image = enhance(image).enhance(factor)
        image = _turn_hue(image, hue)
    return image


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Hue moved by a part of the color circle; Pillow counts it in 256 steps."""
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.uint8(int(turn * 256) % 256))  # toward zero: never more than asked for
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def reference_tensor(
    image: Image.Image,
    height: int,
    width: int,
    rng: np.random.Generator | None = None,
    fit: str = "letterbox",
    **strength: float,
) -> Tensor:
    """I_ref as the VAE takes it: (3, H, W) in [-1, 1]; augmented if there is an `rng`, as it is (evaluation) if not."""
    return to_tensor(FITS[fit](augment_reference(image, rng, **strength) if rng else image, height, width))


# ---------------------------------------------------------------------------------------------------------------------
# Order and chance: functions of seed, epoch and index, so nothing but the step number must be remembered. The first
# number of each spawn key is a stream of its own.


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The augmentation's chance for one sample in one epoch, the same on any number of ranks and workers."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, epoch, index)))


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits n samples."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, epoch))).permutation(n)


# ---------------------------------------------------------------------------------------------------------------------
# Reading a cache


class CachedClips(torch.utils.data.Dataset):
    """The clips of a cache.

    settings: its cache.json, and max_tokens, the slots of the text context. latent_shape: (C, f, h, w) of every clip.
    null_features: (tokens, D), the empty prompt's. names: of all clips. report: what became of the other rows.
    Holds names and places only, and each process opens a shard once, when it needs it: so it can be pickled freely.
    """

    def __init__(self, folder: str | Path):
        """Raises UserError, saying what to run, where the cache is missing, incomplete or damaged."""
        self.folder = Path(folder)
        settings = read_settings(self.folder)
        if settings is None:
            raise UserError(f"no cache in {folder} (it has no cache.json): make it with python data.py prepare")
        self.names: list[str] = []
        self.report: list[dict] = []
        places, missing = [], []  # (shard, row) of each clip; files
        for shard in range(settings["shards"]):
            metadata = read_metadata(self.folder / shard_file(shard), settings)
            if metadata is None:
                missing.append(shard_file(shard))
                continue
            self.names += [clip["name"] for clip in metadata["clips"]]
            self.report += metadata["report"]
            places += [(shard, clip["row"]) for clip in metadata["clips"]]
        null = read_metadata(self.folder / NULL, settings)
        if null is None:
            missing.append(NULL)
        if missing:
            raise UserError(
                f"the cache in {folder} is not complete: {missing[0]} and {len(missing) - 1} more files are missing "
                "or damaged; run the same python data.py prepare command again, it makes what is missing"
            )
        if not places:
            raise UserError(f"the cache in {folder} holds no clip: {self.folder / 'report.jsonl'} says why")
        self.settings: dict[str, Any] = settings | {"max_tokens": null["max_tokens"]}
        self.latent_shape: tuple[int, ...] = tuple(settings["latent_shape"])
        self.places = np.array(places)  # (n, 2); an array, because a list would be copied into every worker bit by bit
        self.opened: dict[int, Any] = {}  # shard -> its file; to open one takes longer than to read a small clip
        with safe_open(self.folder / NULL, framework="pt") as file:
            self.null_features = file.get_tensor("features")

    def __len__(self) -> int:
        return len(self.places)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": {}}

    def __getitem__(self, i: int) -> dict[str, Any]:
        """name, latents (C, f, h, w) bf16, features (tokens, D) bf16, image (PIL, unaugmented), e_ref (E,), caption."""
        if not 0 <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        shard, row = self.places[i]
        if shard not in self.opened:
            self.opened[shard] = safe_open(self.folder / shard_file(shard), framework="pt")
        item = {part: self.opened[shard].get_tensor(f"{row:07d}.{part}") for part in PARTS}
        image = Image.open(io.BytesIO(item["image"].numpy().tobytes())).convert("RGB")
        caption = item["caption"].numpy().tobytes().decode()
        return item | {"name": self.names[i], "image": image, "caption": caption}


class TrainingClips(torch.utils.data.Dataset):
    """The endless sequence of samples that a training run sees: number `count` is the same on any rank and worker.

    An item is that of CachedClips, with "reference" (3, H, W) in [-1, 1], augmented if asked for, and "count".
    """

    def __init__(
        self, clips: CachedClips, seed: int = 0, augment: bool = True, fit: str = "letterbox", **strength: float
    ):
        self.clips, self.seed, self.augment, self.fit, self.strength = clips, seed, augment, fit, strength
        self.epoch, self.order = -1, np.empty(0, int)

    def __getitem__(self, count: int) -> dict[str, Any]:
        epoch, place = divmod(count, len(self.clips))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, epoch_order(len(self.clips), self.seed, epoch)
        index = int(self.order[place])
        item, size = self.clips[index], (self.clips.settings["height"], self.clips.settings["width"])
        rng = sample_rng(self.seed, epoch, index) if self.augment else None
        reference = reference_tensor(item["image"], *size, rng, self.fit, **self.strength)
        return item | {"reference": reference, "count": count}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Items of TrainingClips as one batch: latents (B, C, f, h, w), references (B, 3, H, W), e_ref (B, E); the rest,
    features (tokens, D) of different lengths among it, as lists."""
    return {
        "latents": torch.stack([sample["latents"] for sample in samples]),
        "references": torch.stack([sample["reference"] for sample in samples]),
        "e_ref": torch.stack([sample["e_ref"] for sample in samples]),
        "features": [sample["features"] for sample in samples],
        "names": [sample["name"] for sample in samples],
        "captions": [sample["caption"] for sample in samples],
        "counts": [sample["count"] for sample in samples],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def show(folder: str | Path) -> None:
    """Print what a cache holds, and draw its first references as the trainer would letterbox them."""
    clips = CachedClips(folder)
    size = sum(file.stat().st_size for file in clips.folder.iterdir() if file.is_file())
    for key, value in clips.settings.items():
        print(f"{key:24}{value}")
    left_out = sum("reason" in line for line in clips.report)
    print(f"{len(clips):,} clips, {left_out:,} rows left out, {size / 2**20:,.1f} MiB")
    sheet = Image.new("RGB", (4 * 256, 2 * 256))
    for k in range(min(8, len(clips))):
        sheet.paste(letterbox(clips[k]["image"], 252, 252), (k % 4 * 256, k // 4 * 256))
    with whole_file(clips.folder / "references.png") as temporary:
        sheet.save(temporary)
    print(f"wrote {clips.folder / 'references.png'}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("prepare", help="make a cache, or complete one")
    make.add_argument("--manifest", required=True, help="CSV or JSONL of clips; manifest.py lists the columns")
    make.add_argument("--ckpt", help="an LTX-2.3 checkpoint, for its VAE and text projection (default: the tiny one)")
    make.add_argument("--gemma", help=f"folder or hub name of Gemma 3 (default: {GEMMA}, or the tiny one)")
    make.add_argument("--faces", help="insightface model pack, name or folder (default: buffalo_l, or the tiny one)")
    make.add_argument("--out", required=True, help="folder of the cache")
    make.add_argument("--height", type=int, help="pixels (default 480, or the checkpoint's own)")
    make.add_argument("--width", type=int, help="pixels (default 832, or the checkpoint's own)")
    make.add_argument("--frames", type=int, help="8k+1 (default 121, or the checkpoint's own)")
    make.add_argument("--fps", type=float, help="frames per second (default 24, or the checkpoint's own)")
    make.add_argument(
        "--reference",
        choices=["same", "other"],
        default="same",
        help="for rows without one: a face from the same video, or from another clip of its identity (%(default)s)",
    )
    make.add_argument("--require-face-in-video", action="store_true", help="leave out clips without one midway")
    make.add_argument("--shard-gb", type=float, default=2.0, help="about the size of a shard (%(default)s)")
    make.add_argument("--device", help="default: this rank's GPU, else cpu")
    make.add_argument("--dtype", choices=["bfloat16", "float32"], help="default bfloat16 on a GPU, float32 on a CPU")
    make.add_argument("--seed", type=int, default=0, help="decides which frames references are cut from")
    make.add_argument("--workers", type=int, default=4, help="threads that read videos ahead (%(default)s)")
    vip = commands.add_parser("vip200k", help="a manifest from VIP-200K's annotations")
    vip.add_argument("--annotations", required=True, help="the JSON file")
    vip.add_argument("--videos", required=True, help="folder with <YouTube id>.mp4, .webm, ...")
    vip.add_argument("--out", required=True, help="the manifest, .jsonl")
    vip.add_argument("--seed", type=int, default=0, help="decides which of a person's faces is the reference")
    look = commands.add_parser("show", help="what a cache holds")
    look.add_argument("cache", help="its folder")
    return parser.parse_args()


def main() -> None:
    options = vars(parse_arguments())
    command = options.pop("command")
    if command == "show":
        return show(options["cache"])
    if command == "vip200k":
        for what, count in vip200k(**options).items():
            print(f"{what:24}{count:>10,}")
        return print(f"wrote {options['out']}")
    tiny = options["ckpt"] is None
    options["ckpt"] = options["ckpt"] or ASSETS / "tiny.safetensors"
    options["gemma"] = options["gemma"] or (ASSETS / "gemma" if tiny else GEMMA)
    options["faces"] = options["faces"] or (ASSETS / "faces" if tiny else "buffalo_l")
    # torchrun's variables are all that ranks need to share the work; without torchrun there is one
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = options["device"] or (f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    options["device"] = device
    options["dtype"] = getattr(torch, options["dtype"] or ("bfloat16" if device.startswith("cuda") else "float32"))
    prepare(**options, rank=int(os.environ.get("RANK", 0)), world=int(os.environ.get("WORLD_SIZE", 1)))


if __name__ == "__main__":
    with one_line_errors():
        main()

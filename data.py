"""Training data: clips out of a cache, references augmented anew, and the randomness of each sample.

    cache ──> CachedClips[i] ─┬─> latents, features, e_ref ──────────────────────────────────┬─> batch
                              └─> image ──> augment_reference ──> letterbox ──> ref_image ───┤
                                            Eq. 5                 Sec. 3.1                   │
    seed, number of the sample ──> draw_sample ──> t, eps, two drops, window ────────────────┘

Latents of a video never change, so the cache holds them. The reference is augmented anew in each epoch, so the cache
holds its pixels, and the VAE encodes them in the training loop. e_ref comes from the unaugmented reference.

Everything random in this file follows from the run's seed and the number of the sample. So one process and many draw
the same numbers, and a resumed run continues as if it had not stopped.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.random import Generator, SeedSequence, default_rng
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from checkpoint import Checkpoint
from common.cache import CachedClips, fingerprint_files
from common.errors import UserError
from common.media import cover, to_tensor
from common.outputs import require_same
from config import Augment, Config
from face import recognition_file
from losses import shifted_logit_normal
from text import PROJECTION
from vae import latent_scale

# ---------------------------------------------------------------------------------------------------------------------
# The reference: Sec. 3.1 and Eq. 5

AUGMENT = asdict(Augment())  # probability and strength of each operation; the operations are drawn independently


def letterbox(image: Image.Image, height: int, width: int) -> Image.Image:
    """The whole image at the largest scale that fits height x width, centered, with black bars (Sec. 3.1).

    The paper keeps the aspect ratio and pads the shorter side symmetrically. It does not name the color of the padding.
    """
    scale = min(width / image.width, height / image.height)
    resized = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(resized, ((width - resized.width) // 2, (height - resized.height) // 2))
    return canvas


FITS = {"letterbox": letterbox, "cover": cover}  # "cover" is not the paper's; some LoRAs were trained with it


def augment_reference(image: Image.Image, rng: Generator, **strength: float) -> Image.Image:
    """A(I_ref) of Eq. 5: flip, slight rotation, mild crop, color jitter. For training only, never at inference.

    `strength` overrides entries of AUGMENT. The photo is augmented before the letterbox, so that the bars stay straight
    and black. A rotation keeps size and center; uncovered corners become black like the bars. Cutting them off, at 10
    degrees, would cost a 3:2 photo 20 % of each side; the mild crop takes 15 % at most. Every number is drawn whether
    it is used or not, so another strength of one operation leaves the draws of the others alone.
    """
    if unknown := strength.keys() - AUGMENT.keys():
        raise UserError(f"no augmentation {sorted(unknown)[0]!r}; there are {', '.join(AUGMENT)}")
    a = AUGMENT | strength
    flip, rotate, crop, jitter = rng.random(4) < [a["flip"], a["rotate"], a["crop"], a["jitter"]]
    angle = rng.uniform(-1, 1) * a["degrees"]
    share, place = rng.uniform(a["keep"], 1, 2), rng.random(2)  # of width and height
    factors = 1 + rng.uniform(-1, 1, 3) * [a["brightness"], a["contrast"], a["saturation"]]
    hue = rng.uniform(-1, 1) * a["hue"]

    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rotate:
        image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(0, 0, 0))
    if crop:
        size = np.ceil(share * image.size).astype(int)
        left, top = np.floor(place * (image.size - size + 1)).astype(int)
        image = image.crop((left, top, left + size[0], top + size[1]))
    if jitter:
        for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
            image = enhance(image).enhance(factor)
        if turn := int(hue * 256):  # Pillow's steps. HSV and back rounds, so a turn by 0 would change the photo too
            hue, saturation, value = image.convert("HSV").split()
            hue = Image.fromarray(np.asarray(hue) + np.uint8(turn % 256))
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image


def reference_tensor(
    image: Image.Image, height: int, width: int, rng: Generator | None = None, fit: str = "letterbox", **strength: float
) -> Tensor:
    """ref_image (3, H, W) in [-1, 1], as the VAE takes it: augmented if `rng` is there, then fitted to the size."""
    return to_tensor(FITS[fit](augment_reference(image, rng, **strength) if rng else image, height, width))


# ---------------------------------------------------------------------------------------------------------------------
# Order and randomness, functions of the run's seed. Order and augmentation have streams of their own: the first number
# of the spawn key.


def sample_rng(seed: int, epoch: int, index: int) -> Generator:
    """Random numbers of the augmentation of one clip in one epoch."""
    return default_rng(SeedSequence(seed, spawn_key=(0, epoch, index)))


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits n clips."""
    return default_rng(SeedSequence(seed, spawn_key=(1, epoch))).permutation(n)


def bucket_of_steps(counts: Sequence[int], seed: int, steps: int) -> list[int]:
    """The bucket of each step, where bucket k has counts[k] clips.

    Multiples of the golden ratio, modulo 1, are spread more evenly than chance: after any number of steps the count
    of each bucket is within a few steps of its share.
    """
    start = default_rng(SeedSequence(seed, spawn_key=(3,))).random()  # key 2 is clips/manifest.py's
    points = (start + np.arange(steps) * ((math.sqrt(5) - 1) / 2)) % 1
    return np.searchsorted(np.cumsum(counts) / sum(counts), points, side="right").tolist()


Grid = tuple[int, int, int]  # T, h, w


class Draws(NamedTuple):
    """Noise, drops and window of one sample. `sample_rng` draws its augmentation."""

    t: float  # noise level
    eps: Tensor  # (N, C) noise
    drop_text: bool
    drop_ref: bool
    window_start: int  # first latent frame of the window for the identity losses


def draw_sample(
    seed: int, number: int, grid: Grid, channels: int, p_text: float, p_ref: float, window: int, noise_tokens: int = 0
) -> Draws:
    """Draws of the run's sample `number`; text and reference are dropped independently (Sec. 3.4).

    window: length in latent frames of the window that the identity losses decode. noise_tokens: above 0, t is drawn as
    for a video of this many tokens. Every number is drawn whether it is used or not, so an ablation that switches one
    component off leaves the draws of the others alone.
    """
    tokens = math.prod(grid)
    generator, t, text, ref, place = _draw_numbers(seed, number, noise_tokens or tokens)
    eps = torch.randn(tokens, channels, generator=generator)  # (N, C)
    windows = max(1, grid[0] - window + 1)
    return Draws(t, eps, text < p_text, ref < p_ref, int(place * windows))


def _draw_numbers(seed: int, number: int, tokens: int) -> tuple[torch.Generator, float, float, float, float]:
    """The generator of a sample, its t, and its numbers in [0, 1) for text, reference and window."""
    state = SeedSequence([seed, number]).generate_state(1, np.uint64)
    generator = torch.Generator("cpu").manual_seed(int(state[0]) >> 1)
    t = shifted_logit_normal(1, tokens, generator).item()
    return generator, t, *torch.rand(3, generator=generator, dtype=torch.float64).tolist()


def share_of_rank(numbers: Sequence[int], rank: int, world: int, seed: int, p_ref: float) -> list[int]:
    """This rank's samples of a step, in order. Ranks get equally many, and equally many without reference, plus or
    minus one. With micro-batches of one sample those are shorter sequences, and all ranks take about the same time."""

    def is_dropped(number: int) -> bool:
        _, _, _, ref, _ = _draw_numbers(seed, number, tokens=1)
        return ref < p_ref

    dropped = {number: is_dropped(number) for number in numbers}
    return sorted(sorted(numbers, key=dropped.get)[rank::world])


# ---------------------------------------------------------------------------------------------------------------------
# Does a cache fit the models?


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash of the VAE's config, statistics and first layer, and of the text projection's bias. Fine-tunes share it."""
    sha = hashlib.sha256(json.dumps(checkpoint.config["vae"], sort_keys=True).encode())
    for name in sorted(checkpoint.tensors):
        if name.startswith(("vae.per_channel_statistics.", "vae.encoder.conv_in.")) or name == PROJECTION + "bias":
            sha.update(name.encode() + bytes(checkpoint.read_bytes(name)))
    return sha.hexdigest()[:16]


def fingerprint_gemma(gemma: str | Path) -> str:
    """A hash of the folder's files, or the name itself where Gemma comes from the hub."""
    folder = Path(gemma)
    return fingerprint_files(folder.iterdir()) if folder.is_dir() else str(gemma)


def fingerprint_faces(pack: str | Path) -> str:
    return fingerprint_files(recognition_file(pack).parent.glob("*.onnx"))


def latent_shape(size: dict[str, Any], vae: dict[str, Any]) -> list[int]:
    """C, T, h, w of a clip; `vae` is the section of that name in the checkpoint's config."""
    time, rows, columns = latent_scale(vae)
    grid = [(size["frames"] - 1) // time + 1, size["height"] // rows, size["width"] // columns]
    return [vae["latent_channels"], *grid]


def check_cache_fits(
    settings: dict[str, Any], checkpoint: Checkpoint, gemma: str | Path = "", faces: str | Path = ""
) -> None:
    """Raise UserError if a cache was made with another VAE, text path or face pack than a run has.

    An empty name is not compared, nor is a Gemma that is not a local folder: training itself needs no Gemma.
    """
    vae, buckets = checkpoint.config["vae"], settings.get("buckets")
    now: dict[str, Any] = {"checkpoint": fingerprint(checkpoint), "latent_shape": latent_shape(settings, vae)}
    now["buckets"] = buckets and [size | {"latent_shape": latent_shape(size, vae)} for size in buckets]
    if gemma and Path(gemma).is_dir():
        now["gemma"] = fingerprint_gemma(gemma)
    if faces:
        now["faces"] = fingerprint_faces(faces)
    advice = f"train with the models it was made with, or make another cache with these (compared: {', '.join(now)})"
    require_same({key: settings.get(key) for key in now}, now, "the cache", advice)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class TrainingClips(Dataset):
    """The endless sequence of a run's samples: sample `number` is the same on any rank and in any worker.

    A step trains on clips of one bucket. So its batches have one shape, and all ranks the same work. Each bucket gets
    steps in proportion to its clips, and goes through them in epochs of its own.

    An item is one of CachedClips with ref_image (3, H, W) in [-1, 1], draws, number, and problem: the reason why zeros
    stand in for a clip that cannot be read, or "".
    """

    def __init__(self, clips: CachedClips, config: Config):
        self.clips, self.config = clips, config
        self.members = [np.flatnonzero(clips.bucket_of == number) for number in range(len(clips.buckets))]
        self.step = self.bucket = self.visits = self.epoch = -1  # visits: earlier steps on the bucket of this one
        self.order = np.empty(0, int)

    def place(self, number: int) -> tuple[int, int]:
        """Epoch and index of sample `number`."""
        seed, batch = self.config.run.seed, self.config.optim.batch
        step, slot = divmod(number, batch)
        before = self.bucket, self.epoch
        if step != self.step:
            buckets = bucket_of_steps([len(members) for members in self.members], seed, step + 1)
            self.step, self.bucket, self.visits = step, buckets[-1], buckets[:-1].count(buckets[-1])
        members = self.members[self.bucket]
        self.epoch, place = divmod(self.visits * batch + slot, len(members))
        if before != (self.bucket, self.epoch):
            self.order = members[epoch_order(len(members), seed, self.epoch)]  # once, not for each sample
        return self.epoch, int(self.order[place])

    def __getitem__(self, number: int) -> dict[str, Any]:
        clips, config, seed = self.clips, self.config, self.config.run.seed
        epoch, index = self.place(number)
        try:
            item, problem = clips[index], ""
        except UserError as error:
            item, problem = self._stand_in(index), str(error)
        rng = sample_rng(seed, epoch, index) if config.reference.augment else None
        bucket = clips.buckets[self.bucket]
        size = bucket.height, bucket.width
        item["ref_image"] = reference_tensor(item["image"], *size, rng, config.reference.fit, **asdict(config.augment))
        channels, *grid = bucket.latent_shape
        p_text, p_ref, window = config.dropout.text, config.dropout.reference, config.faces.window
        draws = draw_sample(seed, number, tuple(grid), channels, p_text, p_ref, window, config.optim.noise_tokens)
        return item | {"draws": draws, "number": number, "problem": problem}

    def _stand_in(self, index: int) -> dict[str, Any]:
        """A batch must keep its size on every rank, so zeros and the empty prompt take the place of a damaged clip."""
        clips, shape = self.clips, self.clips.buckets[self.bucket].latent_shape
        latents, e_ref = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(clips.e_ref_shape)
        item = {"name": clips.names[index], "caption": "", "image": Image.new("RGB", (1, 1))}
        return item | {"latents": latents, "features": clips.null_features, "e_ref": e_ref}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Items of TrainingClips as a batch of few tensors.

    A worker hands tensors over as files, one each, and opening a file for each sample's features and noise would cost
    more than the step. So features of different lengths lie in one tensor, and so does the noise; `unpack` cuts them.
    """
    batch = {f"{key}s": [sample[key] for sample in samples] for key in ("name", "number", "problem")}
    batch |= {key: torch.stack([sample[key] for sample in samples]) for key in ("latents", "e_ref")}
    batch["ref_images"] = torch.stack([sample["ref_image"] for sample in samples])
    batch["tokens"] = [len(sample["features"]) for sample in samples]
    batch["features"] = torch.cat([sample["features"] for sample in samples])
    batch["eps"] = torch.stack([sample["draws"].eps for sample in samples])
    batch["draws"] = [sample["draws"]._replace(eps=None) for sample in samples]
    return batch


def unpack(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of `collate` with features and draws.eps as lists of views."""
    batch["features"] = list(batch["features"].split(batch.pop("tokens")))
    batch["draws"] = [draws._replace(eps=eps) for draws, eps in zip(batch["draws"], batch.pop("eps"))]
    return batch


def _leave_group(worker: int) -> None:
    """A signal to the trainer's process group, from a terminal or torchrun, would end the worker before the trainer
    has saved. In a group of its own the worker ends with the trainer."""
    os.setpgid(0, 0)


def training_batches(config: Config, clips: CachedClips, first: int, end: int) -> Iterator[dict[str, Any]]:
    """The micro-batches of this rank in steps `first` to `end` - 1. `share_of_rank` chooses their samples.

    A batch: latents (B, C, T, h, w), ref_images (B, 3, H, W), e_ref (B, E), features (list of (tokens, D)), draws (list
    of Draws), and lists of names, numbers (of the samples) and problems ("", or why zeros stand in).
    """
    batch, size = config.optim.batch, config.parallel.micro_batch
    rank, world = dist.get_rank(), dist.get_world_size()

    def numbers() -> Iterator[list[int]]:
        for step in range(first, end):
            whole = range(step * batch, (step + 1) * batch)
            own = share_of_rank(whole, rank, world, config.run.seed, config.dropout.reference)
            yield from (own[k : k + size] for k in range(0, len(own), size))

    workers = config.data.workers
    spawn = "spawn" if workers else None  # forking after threads have started can hang
    options = {"num_workers": workers, "multiprocessing_context": spawn, "collate_fn": collate}
    options["worker_init_fn"] = _leave_group
    options["pin_memory"] = torch.cuda.is_available()  # the trainer then does not wait for a copy to the GPU
    yield from map(unpack, DataLoader(TrainingClips(clips, config), batch_sampler=numbers(), **options))

"""The cache: what never changes during training, computed once. Video latents, text features, the reference, e_ref.

    manifest row ─┬─ video ──────> frames (F, H, W, 3) ──> VAE encoder ────────────────> latents (C, f, h, w)   bf16
                  ├─ caption ────> Gemma and its projection, one caption at a time ────> features (tokens, D)   bf16
                  └─ reference ──> image, or face crop out of a frame ─┬───────────────> image                  PNG
                                                                       └> Eq. 8: align, ArcFace ──> e_ref (E,)  float32

It is a folder, which `data.CachedClips` reads:

    cache.json                what it was made with: size, fps, fingerprints of the models, seed, rows per shard
    null.safetensors          features of the empty prompt, for dropped text
    shard-00000.safetensors   the manifest's rows 0 to n-1: for each clip ROW.latents, .features, .image, .e_ref and
    shard-00001...            .caption, and in the metadata the names of the clips, and which rows were left out and why
    report.jsonl              all rows that were left out, and remarks on others; there when every shard is
    text-00001.safetensors    while the work lasts: the features of a shard's captions, deleted when the shard is there

A row's shard is decided by its number alone, and a shard appears when it is complete. So whatever is killed when, the
next run makes the shards that are missing and the folder ends up with the same bytes; and any number of processes can
share the work (rank r of R makes what is missing of shards r, r + R, ...; they need not talk to each other). A kill
costs the shard in the making, at most. First all captions, then all videos: Gemma and the VAE never share the memory.
"""

import gc
import hashlib
import json
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from checkpoint import NAMES, Checkpoint, write
from clips.manifest import Clip, Rejected, load_clip, read_manifest
from common.errors import UserError, whole_file
from common.media import from_bytes
from face import ArcFace, FaceDetector, embed, recognition_file
from text import GEMMA, PROJECTION, TextEncoder
from vae import VideoVAE, latent_scale

PAPER = {"height": 480, "width": 832, "frames": 121, "fps": 24.0}
PARTS = ("latents", "features", "image", "e_ref", "caption")  # of each clip in a shard, as ROW.latents, ...
NULL = "null.safetensors"
TYPICAL_TOKENS, TYPICAL_IMAGE = 256, 2**18  # tokens and bytes of a clip, to fix the number of clips in a shard


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def shard_file(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def text_file(number: int) -> str:
    return f"text-{number:05d}.safetensors"


def read_settings(folder: Path) -> dict[str, Any] | None:
    """cache.json, or None if there is none."""
    try:
        return json.loads((folder / "cache.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{folder / 'cache.json'} is damaged ({error}): make the cache anew in another --out") from None


def read_metadata(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a file of the cache says of itself; None if it is missing, not whole, or made with other settings."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("cache", "{}"))
    except (SafetensorError, OSError):
        return None
    return metadata if metadata.get("settings") == _digest(settings) else None


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _save(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any], **metadata: Any) -> None:
    """Write a file of the cache whole, after removing what a killed run left of it."""
    for stale in path.parent.glob(f".{path.stem}.*.part{path.suffix}"):
        stale.unlink(missing_ok=True)
    text = json.dumps(metadata | {"settings": _digest(settings)}, ensure_ascii=False)
    wide_first = sorted(tensors.items(), key=lambda item: -item[1].itemsize)  # so that each is aligned in the file
    entries = [(name, NAMES[t.dtype], list(t.shape), lambda t=t: t) for name, t in wide_first]
    write(path, entries, {"cache": text})


def _save_text(path: Path, text: str) -> None:
    for stale in path.parent.glob(f".{path.stem}.*.part{path.suffix}"):
        stale.unlink(missing_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _agree(folder: Path, settings: dict[str, Any], rank: int) -> None:
    """Refuse to go on with a cache that was begun with other settings; rank 0 writes down those of a new one."""
    begun = read_settings(folder)
    if begun is None:
        if rank == 0:
            _save_text(folder / "cache.json", json.dumps(settings, indent=1) + "\n")
        return
    for key in begun | settings:
        if begun.get(key) != settings.get(key):
            raise UserError(
                f"{folder} was made with {key} = {begun.get(key)} and this run has {settings.get(key)}: "
                "run it with the same options and files, or give another --out"
            )


def fingerprint(checkpoint: Checkpoint) -> str:
    """Of what a cache takes from a checkpoint: VAE encoder and text projection. The same for all its fine-tunes."""
    digest = hashlib.sha256(json.dumps(checkpoint.config["vae"], sort_keys=True).encode())
    for name in sorted(checkpoint.tensors):
        if name.startswith(("vae.per_channel_statistics.", "vae.encoder.conv_in.")) or name == PROJECTION + "bias":
            digest.update(name.encode() + bytes(checkpoint.read_bytes(name)))
    return digest.hexdigest()[:16]


def _fingerprint_files(files: Iterable[Path]) -> str:
    """Names, sizes, and the first and last 64 KiB of each file: cheap, and different for different weights."""
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**16))
            file.seek(max(0, size - 2**16))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def prepare(
    manifest: str | Path,
    ckpt: str | Path,
    out: str | Path,
    gemma: str | Path = GEMMA,
    faces: str | Path = "buffalo_l",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    reference: str = "same",
    require_face_in_video: bool = False,
    shard_gb: float = 2.0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    workers: int = 2,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Make, or complete, the cache `out` of a manifest's clips; with world > 1, this rank's share of its shards.

    Sizes that are None are the checkpoint's own defaults, else the paper's. reference: where it is taken from if the
    manifest names none, "same" video or "other" clip of the same identity. workers: threads that read ahead.
    Raises UserError where nothing can be done at all, or the cache was made with other settings.
    """
    clips, checkpoint, folder = read_manifest(manifest), Checkpoint(ckpt), Path(out)
    settings: dict[str, Any] = PAPER | {k: v for k, v in checkpoint.ours.get("defaults", {}).items() if k in PAPER}
    settings |= {k: v for k, v in zip(PAPER, (height, width, frames, fps)) if v is not None}
    settings["fps"] = float(settings["fps"])  # 24 and 24.0 are the same cache
    settings |= {
        "reference": reference,
        "require_face_in_video": require_face_in_video,
        "seed": seed,
        "manifest": Path(manifest).name,
        "manifest_sha256": hashlib.sha256(Path(manifest).read_bytes()).hexdigest()[:16],
    }
    settings = made_with(settings, checkpoint, gemma, faces, dtype, len(clips), shard_gb)
    identities: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        if clip.identity and not clip.problem:
            identities[clip.identity].append(clip)
    if rank == 0:
        given = sum(bool(clip.reference or clip.reference_video) for clip in clips)
        print(f"{manifest}: {len(clips):,} rows, {given:,} with a reference")
    load = partial(load_clip, identities=identities)
    fill(folder, clips, settings, load, ckpt, gemma, faces, device, dtype, workers, rank, world)


def fill(
    folder: Path,
    clips: list[Clip],
    settings: dict[str, Any],
    load: Callable[..., dict],
    ckpt: str | Path,
    gemma: str | Path,
    faces: str | Path,
    device: str | torch.device,
    dtype: torch.dtype,
    workers: int,
    rank: int,
    world: int,
) -> None:
    """Make what is missing of this rank's shards. `load(clip, settings=, detector=)` gives what load_clip gives."""
    folder.mkdir(parents=True, exist_ok=True)
    _agree(folder, settings, rank)
    rows, numbered = settings["rows_per_shard"], list(enumerate(clips))
    shards = {k: numbered[k * rows : (k + 1) * rows] for k in range(settings["shards"])}
    done = [k for k in shards if read_metadata(folder / shard_file(k), settings) is not None]
    mine = {k: shard for k, shard in shards.items() if k % world == rank and k not in done}
    if rank == 0:
        for k in done:
            (folder / text_file(k)).unlink(missing_ok=True)  # killed between writing a shard and deleting its text
        print(f"{folder}: {len(done)} of {len(shards)} shards exist")
    _write_texts(folder, mine, settings, rank, partial(TextEncoder.from_checkpoint, ckpt, gemma, device, dtype))
    gc.collect()  # Gemma is gone now
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if mine:
        load = partial(load, settings=settings, detector=FaceDetector(faces, device))
        vae = VideoVAE.from_checkpoint(ckpt, device, dtype)
        arcface = ArcFace.from_onnx(recognition_file(faces)).to(device)
        _write_shards(folder, mine, settings, load, vae, arcface, workers, rank)
    _report(folder, settings, len(clips), rank)


def made_with(
    settings: dict[str, Any],
    checkpoint: Checkpoint,
    gemma: str | Path,
    faces: str | Path,
    dtype: torch.dtype,
    clips: int,
    shard_gb: float,
) -> dict[str, Any]:
    """The size and what else was settled, with what the models and the number of clips add: cache.json."""
    shape, folder_of_gemma = _latent_shape(settings, checkpoint), Path(gemma)
    clip_bytes = 2 * np.prod(shape) + 2 * TYPICAL_TOKENS * checkpoint.tensors[PROJECTION + "bias"]["shape"][0]
    rows = max(1, int(shard_gb * 2**30 / (clip_bytes + TYPICAL_IMAGE)))
    return settings | {
        "latent_shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "checkpoint": fingerprint(checkpoint),
        "gemma": _fingerprint_files(folder_of_gemma.iterdir()) if folder_of_gemma.is_dir() else str(gemma),
        "faces": _fingerprint_files(recognition_file(faces).parent.glob("*.onnx")),
        "rows_per_shard": rows,
        "shards": -(-clips // rows),
    }


def _latent_shape(settings: dict[str, Any], checkpoint: Checkpoint) -> list[int]:
    """(C, f, h, w) of every clip; UserError if the VAE cannot take the size."""
    scale = latent_scale(checkpoint.config["vae"])
    for name, step, extra in zip(("frames", "height", "width"), scale, (1, 0, 0)):
        value = settings[name]
        lower = max((value - extra) // step, 1 - extra) * step + extra
        if value != lower:
            rule = f"{step}k+1" if extra else f"a multiple of {step}"
            raise UserError(f"--{name} {value} is not {rule}: the nearest are {lower} and {lower + step}")
    if not settings["fps"] > 0:
        raise UserError(f"--fps {settings['fps']} is not above 0")
    time, rows, columns = scale
    grid = [(settings["frames"] - 1) // time + 1, settings["height"] // rows, settings["width"] // columns]
    return [checkpoint.config["vae"]["latent_channels"], *grid]


class _Progress:
    """A bar on rank 0 and, after a few clips, how much time and disk all of them will take."""

    def __init__(self, title: str, total: int, rank: int):
        self.title, self.total, self.rank, self.sizes = title, total, rank, []
        self.bar = tqdm(total=total, desc=title, unit="clip", disable=rank > 0, leave=False)

    def step(self, size: int) -> None:
        self.bar.update()
        self.sizes.append(size)
        if len(self.sizes) == 1:
            self.since = time.monotonic()  # the first one warms up
        if len(self.sizes) == 6 and self.rank == 0:
            seconds, size = (time.monotonic() - self.since) / 5, sum(self.sizes) / 6
            self.bar.write(
                f"{self.title}: {size / 2**20:.2f} MiB and {seconds:.2f} s a clip; this process's {self.total:,} "
                f"will take about {size * self.total / 2**30:.1f} GiB and {seconds * self.total / 3600:.1f} hours"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Texts, then videos


def _write_texts(
    folder: Path, shards: dict[int, list], settings: dict[str, Any], rank: int, load: Callable[[], TextEncoder]
) -> None:
    """The features of each shard's captions, and of the empty prompt. Gemma is loaded if needed, and gone afterwards.

    One caption at a time: no padding, so a caption's features do not depend on its neighbours, not even by rounding.
    At a hundred or more tokens a GPU is busy with one.
    """
    shards = {k: rows for k, rows in shards.items() if read_metadata(folder / text_file(k), settings) is None}
    null_missing = rank == 0 and read_metadata(folder / NULL, settings) is None
    if not shards and not null_missing:
        return
    encoder = load()

    def features(caption: str) -> Tensor:
        return encoder.features([caption])[0].to("cpu", torch.bfloat16)  # (tokens, D)

    if null_missing:
        _save(folder / NULL, {"features": features("")}, settings, max_tokens=encoder.max_tokens)
    progress = _Progress("captions", sum(map(len, shards.values())), rank)
    for k, rows in shards.items():
        tensors = {}
        for row, clip in rows:
            if clip.caption and not clip.problem:
                tensors[f"{row:07d}.features"] = features(clip.caption)
            progress.step(tensors[f"{row:07d}.features"].nbytes if f"{row:07d}.features" in tensors else 0)
        _save(folder / text_file(k), tensors, settings)
    progress.bar.close()


@torch.no_grad()
def _write_shards(
    folder: Path,
    shards: dict[int, list],
    settings: dict[str, Any],
    load: Callable[[Clip], dict],
    vae: VideoVAE,
    arcface: ArcFace,
    workers: int,
    rank: int,
) -> None:
    weight = vae.encoder.conv_in.conv.weight
    progress = _Progress("videos", sum(map(len, shards.values())), rank)
    for k, rows in shards.items():
        texts = load_file(folder / text_file(k))
        tensors: dict[str, Tensor] = {}
        clips, report = [], []
        for (row, clip), future in _ahead(lambda item: load(item[1]), rows, workers):
            line = {"manifest": settings["manifest"], "line": clip.line, "id": clip.name}
            size = 0
            try:
                loaded = future.result()
            except Rejected as rejection:
                report.append(line | {"reason": rejection.reason, "detail": rejection.detail})
            else:
                if loaded["note"]:
                    report.append(line | {"note": loaded["note"]})
                video = torch.from_numpy(loaded["frames"]).to(weight.device).permute(3, 0, 1, 2)  # (3, F, H, W)
                image, landmarks = (loaded[key].to(weight.device) for key in ("image", "landmarks"))
                parts = {
                    "latents": vae.encode(from_bytes(video).to(weight.dtype)[None])[0].bfloat16(),
                    "features": texts[f"{row:07d}.features"],
                    "image": torch.frombuffer(loaded["png"], dtype=torch.uint8),
                    "e_ref": embed(image, landmarks, arcface)[0].float(),
                    "caption": torch.frombuffer(bytearray(clip.caption.encode()), dtype=torch.uint8),
                }
                for part in PARTS:
                    tensors[f"{row:07d}.{part}"] = parts[part].cpu()
                    size += parts[part].nbytes
                clips.append({"row": row, "name": clip.name})
            progress.step(size)
        _save(folder / shard_file(k), tensors, settings, clips=clips, report=report)
        (folder / text_file(k)).unlink()
    progress.bar.close()


def _ahead(function: Callable, items: Iterable, workers: int) -> Iterator[tuple[Any, Future]]:
    """Each item and the future of function(item), in order; threads work a few items ahead, so a GPU need not wait."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > workers:
                yield waiting.popleft()
        yield from waiting


# ---------------------------------------------------------------------------------------------------------------------
# The end


def _report(folder: Path, settings: dict[str, Any], rows: int, rank: int) -> None:
    """When every shard is there: report.jsonl, and the counts in a few printed lines."""
    metadata = [read_metadata(folder / shard_file(k), settings) for k in range(settings["shards"])]
    if missing := metadata.count(None):
        print(f"rank {rank} is done; {missing} of {settings['shards']} shards are left to other ranks")
        return
    lines = [line for shard in metadata for line in shard["report"]]
    with suppress(FileNotFoundError):  # another rank came to its end at the same moment, with the same report
        _save_text(folder / "report.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    reasons = Counter(line["reason"] for line in lines if "reason" in line)
    clips, size = rows - reasons.total(), sum((folder / shard_file(k)).stat().st_size for k in range(len(metadata)))
    print(f"{folder}: {clips:,} of {rows:,} clips, {size / 2**20:,.1f} MiB in {len(metadata)} shards")
    for reason, count in reasons.most_common():
        print(f"  left out, {reason}: {count:,}")
    if len(lines) > reasons.total():
        print(f"  remarks: {len(lines) - reasons.total():,}")
    if lines:
        print(f"  each with its line in {folder / 'report.jsonl'}")
    if not clips:
        raise UserError(f"none of the {rows:,} clips can be used: {folder / 'report.jsonl'} says why")

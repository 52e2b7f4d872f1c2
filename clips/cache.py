"""The cache: video latents, text features, references and e_ref, which never change in training, computed once.

The cache is a folder, which `data.CachedClips` reads:

    cache.json                its settings: size, fps, fingerprints of the models, seed, rows per shard
    null.safetensors          features of the empty prompt, for dropped text
    shard-00000.safetensors   the manifest's rows 0 to n-1: for each clip ROW.latents, .features, .image, .e_ref and
    shard-00001...            .caption, .strip and .facts (clips/facts.py); in the metadata the names of the clips, and
                              the reasons of rows left out
    report.jsonl              all rows that were left out, and remarks on others; there when every shard is
    text-00001.safetensors    while the work lasts: the features of a shard's captions, deleted when the shard is there

The number of a row alone decides its shard, and a shard appears when it is complete. So a kill costs at most the shard
in the making, the next run makes the missing shards, and the folder ends up with the same bytes. Any number of
processes share the work without communication: rank r of R makes shards r, r + R, ... First all captions, then all
videos: Gemma and the VAE never share the memory.
"""

import hashlib
import json
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import config
from checkpoint import NAMES, Checkpoint, open_checkpoint, write
from clips.buckets import ENLARGE, default_buckets, kept_area
from clips.facts import measure
from clips.manifest import Clip, Rejected, load_clip, read_manifest
from common import cache as stored
from common.cache import NULL, CachedClip, NullMetadata, ShardMetadata, read_metadata, shard_file
from common.device import free, own_place
from common.errors import UserError, write_text
from common.media import from_bytes
from common.outputs import refuse_overwrite, require_same
from common.schema import record, validate
from common.sizes import amount, duration, require_memory, require_video_size
from data import fingerprint, fingerprint_faces, fingerprint_gemma, latent_shape
from face import ArcFace, FaceDetector, embed, recognition_file
from text import GEMMA, PROJECTION, TextEncoder
from vae import CHUNK, VideoVAE, latent_scale

VIDEO = {key: config.VIDEO[key] for key in ("height", "width", "frames", "fps")}
TYPICAL_TOKENS, TYPICAL_IMAGE = 256, 2**18  # tokens and bytes of a clip, to fix the number of clips in a shard


@record
class TextMetadata:
    settings: str
    problems: dict[str, str]  # row -> why its caption has no features


def text_file(number: int) -> str:
    return f"text-{number:05d}.safetensors"


class Models(NamedTuple):
    """The models that compute a cache, their device and their precision."""

    checkpoint: Checkpoint
    gemma: str | Path
    faces: str | Path
    device: str | torch.device
    dtype: torch.dtype


def _save(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any], **metadata: Any) -> None:
    """Write a file of the cache, with the digest of the settings in its metadata."""
    text = json.dumps(metadata | {"settings": stored.digest(settings)}, ensure_ascii=False)
    text = text.encode(errors="backslashreplace").decode()  # a reason may name a file whose name is not UTF-8
    wide_first = sorted(tensors.items(), key=lambda item: -item[1].itemsize)  # so that each is aligned in the file
    write(path, [(name, NAMES[t.dtype], list(t.shape), lambda t=t: t) for name, t in wide_first], {"cache": text})


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
    reference: str = "other",
    require_face_in_video: bool = False,
    shard_gb: float = 2.0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    workers: int = 2,
    buckets: list[dict[str, Any]] | None = None,
    enlarge: float | None = None,
    windows: int = 1,
    min_similarity: float | None = None,
) -> None:
    """Make, or complete, the cache `out` of a manifest's clips; under torchrun, this rank's share of its shards.

    buckets: the sizes of clips (clips/buckets.py). None: `default_buckets`; with a height, width or frames a single
    size, the checkpoint's but for these. windows: most clips out of a row. reference: where the manifest names none,
    from an "other" clip of the same identity if there is one, or from the "same" video. min_similarity: least cosine of
    reference and clip. workers: threads that read ahead.
    """
    clips, checkpoint, folder = read_manifest(manifest), open_checkpoint(ckpt), Path(out)
    files = [folder / name for name in ("cache.json", NULL, "report.jsonl", shard_file(0), text_file(0))]
    refuse_overwrite(files, [manifest, checkpoint.path])
    of_model = checkpoint.ours.get("defaults", {})
    settings: dict[str, Any] = VIDEO | {key: of_model[key] for key in VIDEO if key in of_model}
    settings |= {k: v for k, v in zip(VIDEO, (height, width, frames, fps)) if v is not None}
    settings["fps"] = float(settings["fps"])  # 24 and 24.0 are the same cache
    if (height, width, frames) == (None, None, None):
        buckets = buckets or default_buckets(settings, latent_scale(checkpoint.config["vae"]))
        settings |= buckets[0] | {"buckets": buckets, "enlarge": enlarge or ENLARGE}
    elif buckets or enlarge:
        raise UserError("--height, --width and --frames are for one size: leave out --buckets and --enlarge")
    settings |= {"windows": windows} if windows > 1 else {}
    settings |= {"min_similarity": min_similarity} if min_similarity is not None else {}
    settings |= {
        "reference": reference,
        "require_face_in_video": require_face_in_video,
        "seed": seed,
        "manifest": os.fsencode(Path(manifest).name).decode(errors="replace"),
        "manifest_sha256": hashlib.sha256(Path(manifest).read_bytes()).hexdigest()[:16],
    }
    models = Models(checkpoint, gemma, faces, device, dtype)
    settings = made_with(settings, models, len(clips), shard_gb)
    parts = [replace(clip, window=number) for clip in clips for number in range(windows)] if windows > 1 else clips
    identities: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        if clip.identity and not clip.problem:
            identities[clip.identity].append(clip)
    if own_place().rank == 0:
        with_reference = sum(bool(clip.reference or clip.reference_video) for clip in clips)
        print(f"{manifest}: {len(clips):,} rows, {with_reference:,} with a reference")
    fill(folder, parts, settings, partial(load_clip, identities=identities), models, workers)


def fill(
    folder: Path, clips: list[Clip], settings: dict[str, Any], load: Callable[..., dict], models: Models, workers: int
) -> None:
    """Make the missing ones of this rank's shards. `load(clip, settings=, detector=)` returns the same as load_clip."""
    rank, world, _ = own_place()
    folder.mkdir(parents=True, exist_ok=True)
    begun = stored.read_settings(folder)
    if begun is not None:
        require_same(begun, settings, folder, "run it with the same options and files, or give another --out")
    elif rank == 0:
        write_text(folder / "cache.json", json.dumps(settings, indent=1) + "\n")
    names = ["report.jsonl", NULL, *(name(k) for name in (shard_file, text_file) for k in range(settings["shards"]))]
    for path in (folder / name for name in names):
        if path.is_dir():  # an error at once rather than after hours of work
            raise UserError(f"{path} is a folder, and a file of the cache will have this name: give another --out")
    rows, numbered = settings["rows_per_shard"], list(enumerate(clips))
    shards = {k: numbered[k * rows : (k + 1) * rows] for k in range(settings["shards"])}
    done = [k for k in shards if read_metadata(folder / shard_file(k), settings, ShardMetadata)]
    own = {k: shard for k, shard in shards.items() if k % world == rank and k not in done}
    if rank == 0:
        for k in done:
            (folder / text_file(k)).unlink(missing_ok=True)  # killed between writing a shard and deleting its text
        print(f"{folder}: {len(done)} of {len(shards)} shards exist")
    _write_texts(folder, own, settings, models, rank)
    checkpoint, _, faces, device, dtype = models
    free(torch.device(device))  # Gemma is gone, and the VAE needs its memory
    if own:
        detector = FaceDetector(faces, device)
        load = partial(load, settings=settings, detector=detector)
        arcface = ArcFace.from_onnx(recognition_file(faces)).to(device)
        vae, least = VideoVAE.from_checkpoint(checkpoint, device, dtype), settings.get("min_similarity", -1.0)
        parts_of = partial(clip_tensors, vae=vae, detector=detector, arcface=arcface, min_similarity=least)
        with _Progress("videos", sum(map(len, own.values())), rank) as progress, ThreadPoolExecutor(workers) as pool:
            for k, shard in own.items():
                _write_shard(folder, k, _ahead(pool, load, shard, workers), settings, parts_of, progress)
    _report(folder, settings, len(clips), rank)


def made_with(settings: dict[str, Any], models: Models, clips: int, shard_gb: float) -> dict[str, Any]:
    """cache.json: the `settings`, completed by fingerprints of the models and the division into shards."""
    vae = models.checkpoint.config["vae"]
    for size in settings.get("buckets", [settings]):
        try:
            require_video_size(size, latent_scale(vae))
        except UserError as error:
            where = "x".join(str(size[key]) for key in ("height", "width", "frames"))
            raise UserError(f"--buckets {where}: {error}" if "buckets" in settings else str(error)) from None
        pixels = size["frames"] * size["height"] * size["width"]
        what = f"one video of {size['frames']} frames of {size['height']}x{size['width']}"
        require_memory(15 * pixels, what, "take a smaller size")  # bytes of three channels, as they are and in float32
    shape, windows = latent_shape(settings, vae), settings.get("windows", 1)
    (width,) = models.checkpoint.tensors[PROJECTION + "bias"]["shape"]
    rows = max(1, int(shard_gb * 2**30 / clip_bytes(shape, width) / windows)) * windows  # a shard has whole rows
    settings = settings | {"latent_shape": shape, "dtype": str(models.dtype).removeprefix("torch.")}
    if "buckets" in settings:
        settings["buckets"] = [size | {"latent_shape": latent_shape(size, vae)} for size in settings["buckets"]]
    settings |= {"checkpoint": fingerprint(models.checkpoint), "gemma": fingerprint_gemma(models.gemma)}
    settings |= {"faces": fingerprint_faces(models.faces), "rows_per_shard": rows}
    settings["shards"] = -(-clips * windows // rows)
    validate(stored.CacheSettings, settings, "options")
    return settings


def clip_bytes(shape: list[int], width: int, tokens: int = TYPICAL_TOKENS, image: int = TYPICAL_IMAGE) -> int:
    """Bytes of a clip with latents (C, T, h, w) and text features (tokens, width)."""
    return 2 * int(np.prod(shape)) + 2 * tokens * width + image


class _Progress(tqdm):
    """A bar on rank 0 and, after six clips, how much time and disk all of them will take.

    At the end of its block the bar is wiped, so that an error begins a line of its own.
    """

    def __init__(self, title: str, total: int, rank: int):
        super().__init__(total=total, desc=title, unit="clip", disable=rank > 0, leave=False)
        self.steps: list[tuple[float, int]] = []  # time and bytes of each clip

    def step(self, size: int) -> None:
        self.update()
        self.steps.append((time.monotonic(), size))
        if len(self.steps) == 6 and not self.disable:
            times, sizes = zip(*self.steps)
            seconds, size = (times[-1] - times[0]) / 5, sum(sizes) / 6  # the first clip warms up
            self.write(
                f"{self.desc}: {amount(size)} and {seconds:.2f} s a clip; this process's {self.total:,} "
                f"will take about {amount(size * self.total)} and {duration(seconds * self.total)}"
            )


def _write_texts(folder: Path, shards: dict[int, list], settings: dict[str, Any], models: Models, rank: int) -> None:
    """Features of each shard's captions and of the empty prompt. Gemma is loaded if needed, and gone afterwards.

    One caption at a time: without padding, the features do not depend on neighbors, not even by rounding. One caption
    of a hundred tokens keeps a GPU busy.
    """
    shards = {k: rows for k, rows in shards.items() if not read_metadata(folder / text_file(k), settings, TextMetadata)}
    null_missing = rank == 0 and not read_metadata(folder / NULL, settings, NullMetadata)
    if not shards and not null_missing:
        return
    encoder = TextEncoder.from_checkpoint(models.checkpoint, models.gemma, models.device, models.dtype)

    def features(caption: str) -> Tensor:
        result = encoder.features([caption])[0].to("cpu", torch.bfloat16)  # (tokens, D)
        if not result.abs().max() < stored.LARGEST_NUMBER:  # nor is NaN
            raise UserError(f"Gemma or its projection gives features of {caption!r} that are not finite numbers")
        return result

    empty = features("")  # raises here, before hours of work, where the models themselves are damaged
    if null_missing:
        _save(folder / NULL, {"features": empty}, settings, max_tokens=encoder.max_tokens)
    with _Progress("captions", sum(map(len, shards.values())), rank) as progress:
        for k, rows in shards.items():
            tensors, problems = {}, {}
            for row, clip in rows:
                name = f"{row:07d}.features"
                if clip.caption and not clip.problem and not clip.window:  # windows of a row share its caption
                    try:
                        tensors[name] = features(clip.caption)
                    except Exception as error:  # of whatever kind: it costs this row only
                        problems[str(row)] = f"{type(error).__name__}: {error}"
                progress.step(tensors[name].nbytes if name in tensors else 0)
            _save(folder / text_file(k), tensors, settings, problems=problems)


@torch.no_grad()
def _write_shard(
    folder: Path, number: int, rows: Iterable[tuple], settings: dict[str, Any], parts_of: Callable, progress: _Progress
) -> None:
    """A shard of its rows' videos and of the features in its text file, which is then deleted."""
    text = folder / text_file(number)
    texts, problems = load_file(text), read_metadata(text, settings, TextMetadata).problems
    tensors: dict[str, Tensor] = {}
    clips, report = [], []
    for row, clip, future in rows:
        line, parts = {"manifest": settings["manifest"], "line": clip.line, "id": clip.name}, {}
        try:
            if error := future.exception():  # of whatever kind: it costs this row only
                reason = "cannot be read", f"{type(error).__name__}: {error}"
                raise error if isinstance(error, Rejected) else Rejected(*reason)
            text_row = row - clip.window  # of the row's first window
            if str(text_row) in problems:
                raise Rejected("unreadable caption", problems[str(text_row)])
            if loaded := future.result():
                parts = parts_of(loaded, clip, texts[f"{text_row:07d}.features"])
        except Rejected as rejection:
            if not any(other["line"] == clip.line and "reason" in other for other in report):  # a line for each row
                report.append(line | dict(zip(("reason", "detail"), rejection.args)))
        else:
            if parts:
                if note := loaded["note"]:
                    report.append(line | {"note": note})
                tensors |= {f"{row:07d}.{part}": parts[part] for part in parts}
                of_bucket = {key: loaded[key] for key in ("bucket", "source") if key in loaded}
                clips.append({"row": row, "name": clip.name, "identity": clip.identity or clip.video.stem} | of_bucket)
        progress.step(sum(tensor.nbytes for tensor in parts.values()))
    _save(folder / shard_file(number), tensors, settings, clips=clips, report=report)
    text.unlink(missing_ok=True)  # rank 0 of a restarted run may have been faster


def clip_tensors(
    loaded: dict[str, Any],
    clip: Clip,
    features: Tensor,
    vae: VideoVAE,
    detector: FaceDetector,
    arcface: ArcFace,
    min_similarity: float,
) -> dict[str, Tensor]:
    """The tensors of a clip in a shard: z_0 = E_vae(video), e_ref of Eq. 8 (of the photo before augmentation and
    letterbox), text, photo, facts. Rejected if not finite, or if its faces resemble the reference too little."""
    weight = vae.encoder.conv_in.conv.weight
    video = torch.from_numpy(loaded["frames"]).to(weight.device).permute(3, 0, 1, 2)  # (3, F, H, W)
    image, landmarks = (loaded[key].to(weight.device) for key in ("image", "landmarks"))  # (1, 3, H, W), (1, 5, 2)
    parts = {
        "latents": vae.encode(from_bytes(video).to(weight.dtype)[None], CHUNK)[0].bfloat16(),  # (C, T, h, w)
        "features": features,  # (tokens, D)
        "image": torch.frombuffer(loaded["png"], dtype=torch.uint8),
        "e_ref": embed(image, landmarks, arcface)[0].float(),  # (E,)
        "caption": torch.frombuffer(bytearray(clip.caption.encode()), dtype=torch.uint8),
    }
    for part in ("latents", "e_ref"):
        if not parts[part].abs().max() < stored.LARGEST_NUMBER:
            raise Rejected("numbers that are not finite", f"in the {part} of {clip.video}")
    parts |= measure(loaded, parts["e_ref"], detector, arcface)
    similarity = json.loads(parts["facts"].numpy().tobytes())["similarity"]  # None without a face
    if similarity is not None and similarity < min_similarity:
        raise Rejected("another person", f"{clip.video} and its reference have a similarity of {similarity:.2f}")
    return {part: tensor.cpu() for part, tensor in parts.items()}


def _ahead(pool: ThreadPoolExecutor, load: Callable, rows: list, workers: int) -> Iterator[tuple[int, Clip, Future]]:
    """Each row's number, clip and future pixels, in order; threads load a few clips ahead, so a GPU need not wait."""
    waiting: deque = deque()
    for row, clip in rows:
        waiting.append((row, clip, pool.submit(load, clip)))
        if len(waiting) > workers:
            yield waiting.popleft()
    yield from waiting


def _report(folder: Path, settings: dict[str, Any], parts: int, rank: int) -> None:
    """When every shard is there: report.jsonl, and the counts in a few printed lines."""
    shards, rows = range(settings["shards"]), parts // settings.get("windows", 1)
    metadata = [read_metadata(folder / shard_file(k), settings, ShardMetadata) for k in shards]
    if missing := metadata.count(None):
        print(f"rank {rank} is done; {missing} of {settings['shards']} shards are left to other ranks")
        return
    lines = [line for shard in metadata for line in shard.report]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    # Another rank may come to its end at the same moment, with the same report.
    with suppress(FileNotFoundError):
        write_text(folder / "report.jsonl", text)
    reasons = Counter(line["reason"] for line in lines if "reason" in line)
    clips = [clip for shard in metadata for clip in shard.clips]
    size = sum((folder / shard_file(k)).stat().st_size for k in shards)
    print(f"{folder}: {len(clips):,} clips of {rows:,} rows, {amount(size)} in {len(metadata)} shards")
    _report_buckets(clips, settings)
    for reason, count in reasons.most_common():
        print(f"  left out, {reason}: {count:,}")
    if len(lines) > reasons.total():
        print(f"  remarks: {len(lines) - reasons.total():,}")
    if lines:
        print(f"  each with its line in {folder / 'report.jsonl'}")
    if not clips:  # the report stays; another run tries the rows again
        for name in ("cache.json", NULL, *map(shard_file, range(len(metadata)))):
            (folder / name).unlink(missing_ok=True)
        raise UserError(f"none of the {rows:,} clips can be used: {folder / 'report.jsonl'} says why")


def _report_buckets(clips: list[CachedClip], settings: dict[str, Any]) -> None:
    """The number of clips in each bucket, and what is left of their pictures and of their time."""
    buckets = settings.get("buckets", [settings])
    for number, count in Counter(clip.bucket for clip in clips).most_common():
        size = buckets[number]
        print(f"  {size['height']}x{size['width']}, {size['frames']} frames: {count:,}")
    if known := [clip for clip in clips if clip.source and clip.source.seconds]:
        sources = [(buckets[clip.bucket], clip.source) for clip in known]
        area = sum(kept_area(size, source.width, source.height) for size, source in sources) / len(known)
        seconds = {clip.row // settings.get("windows", 1): clip.source.seconds for clip in known}  # of whole rows
        time = sum(size["frames"] for size, _ in sources) / settings["fps"] / sum(seconds.values())
        print(f"  of these clips {area:.0%} of the picture and {time:.0%} of the time")

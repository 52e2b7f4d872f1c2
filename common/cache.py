"""A cache on disk: names, metadata and contents of its files. clips/cache.py describes the folder and writes it."""

import hashlib
import io
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from common.errors import UserError
from common.images import require_file
from common.schema import (
    Count,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Text,
    foreign_record,
    parse_json,
    record,
    validate,
)

PARTS = ("latents", "features", "image", "e_ref", "caption")  # of each clip in a shard: tensors ROW.latents, ...
NULL = "null.safetensors"
LARGEST_NUMBER = 1e6  # in latents, features and embeddings; real ones stay below a thousand
M = TypeVar("M")


Size = Annotated[int, Field(gt=0, le=2**16)]


@foreign_record
class Bucket:
    """A size of clips, in pixels and in latent cells."""

    height: Size
    width: Size
    frames: Size
    latent_shape: tuple[Positive, Positive, Positive, Positive]  # C, T, h, w


@foreign_record
class CacheSettings:
    """The fields of cache.json that reading needs."""

    height: Size  # the checkpoint's own size: of samples and, without `buckets`, of every clip
    width: Size
    frames: Size
    fps: PositiveFloat
    latent_shape: tuple[Positive, Positive, Positive, Positive]
    buckets: Annotated[list[Bucket], Field(min_length=1)] | None = None
    windows: Positive = 1  # most clips of a row
    shards: Positive
    rows_per_shard: Positive
    checkpoint: Text  # fingerprints of the models
    gemma: Text
    faces: Text


@record
class NullMetadata:
    settings: str  # digest of the cache's settings
    max_tokens: Annotated[int, Field(gt=0, le=2**16)]  # slots of the text context


@record
class Source:
    """A clip before it was cut to its bucket: upright, in pixels; from its start to its end, 0 if nothing says."""

    width: Positive
    height: Positive
    seconds: NonNegativeFloat
    fps: NonNegativeFloat  # on average; 0 if the file does not say


@record
class CachedClip:
    row: Annotated[int, Field(ge=0, lt=10**12)]
    name: str
    identity: str = ""  # of the manifest, or the file's name; empty in caches of older versions
    bucket: Count = 0  # its number in CacheSettings.buckets
    source: Source | None = None  # None where the clip was drawn


@record
class ShardMetadata:
    settings: str
    clips: list[CachedClip]
    report: list[dict[str, str | Count]]  # rows that were left out, with `reason` and `detail`; remarks with `note`


def shard_file(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def read_settings(folder: Path) -> dict[str, Any] | None:
    """cache.json, or None if there is none. UserError where it is damaged."""
    path = folder / "cache.json"
    if not path.exists():
        return None
    require_file(path, "file")
    try:
        text = path.read_bytes()
        parse_json(CacheSettings, text, path)
        return json.loads(text)
    except (UserError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): make the cache anew in another folder") from None


def digest(settings: dict[str, Any]) -> str:
    """Links each file of a cache to its cache.json."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def read_metadata(path: Path, settings: dict[str, Any], kind: type[M]) -> M | None:
    """Metadata of a file of the cache; None if the file is missing, not whole, or of other settings."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text, names = (file.metadata() or {}).get("cache", ""), set(file.keys())
        metadata = parse_json(kind, text, path)
    except (SafetensorError, OSError, UserError):
        return None
    needed = {"features"} if kind is NullMetadata else set()
    needed |= {f"{clip.row:07d}.{part}" for clip in getattr(metadata, "clips", ()) for part in PARTS}
    return metadata if needed <= names and metadata.settings == digest(settings) else None


def fingerprint_files(files: Iterable[Path]) -> str:
    """Names, sizes, and the first and last 64 KiB of each file: cheap, and different for different weights."""
    sha = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        size = path.stat().st_size
        sha.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            sha.update(file.read(2**16))
            file.seek(max(0, size - 2**16))
            sha.update(file.read())
    return sha.hexdigest()[:16]


class CachedClips(Dataset):
    """The clips of a cache.

    settings: its cache.json; max_tokens, the slots of the text context; with buckets the number of clips in each.
    buckets: the sizes of clips. bucket_of: the number of each clip's bucket, (n,). null_features: (tokens, D) of the
    empty prompt. names: of all clips. identities: of their people. report: rows that were left out, and remarks.
    Shards are opened once in each process, when needed, and are left out of pickles.
    """

    def __init__(self, folder: str | Path):
        """UserError with the command that makes the cache where it is missing, incomplete or damaged."""
        self.folder = Path(folder)
        settings = read_settings(self.folder)
        if settings is None:
            if (report := self.folder / "report.jsonl").is_file():
                raise UserError(f"the cache in {folder} holds no clip: {report} says why")
            raise UserError(f"no cache in {folder} (it has no cache.json): make it with python prepare.py")
        shards = [self._metadata(shard_file(k), settings, ShardMetadata) for k in range(settings["shards"])]
        self.names = [clip.name for shard in shards for clip in shard.clips]
        identities = (clip.identity or clip.name.rpartition(":")[0] for shard in shards for clip in shard.clips)
        self.identities = list(identities)  # without one, the file's name: clips of one film may show one person
        self.report = [line for shard in shards for line in shard.report]
        # Shard and row of each clip (n, 2): an array, because a list would be copied into every worker bit by bit.
        self.places = np.array([(k, clip.row) for k, shard in enumerate(shards) for clip in shard.clips])
        self.bucket_of = np.array([clip.bucket for shard in shards for clip in shard.clips])
        max_tokens = self._metadata(NULL, settings, NullMetadata).max_tokens
        if not self.names:
            raise UserError(f"the cache in {folder} holds no clip")
        self.settings: dict[str, Any] = settings | {"max_tokens": max_tokens}
        self.settings.pop("clips", None)
        self.buckets = [validate(Bucket, size, folder) for size in settings.get("buckets") or [settings]]
        self.opened: dict[int, Any] = {}  # shard -> its file; opening one takes longer than reading a small clip
        with safe_open(self.folder / NULL, framework="pt") as file:
            self.null_features = file.get_tensor("features")  # (tokens, D)
        if not self.null_features.abs().max() < LARGEST_NUMBER:
            raise UserError(f"{self.folder / NULL} holds numbers that are not finite: make the cache anew")
        self.e_ref_shape = self._usual_shape("e_ref", 0)  # (E,)
        numbers, firsts, counts = np.unique(self.bucket_of, return_index=True, return_counts=True)
        if settings.get("buckets"):
            self.settings["clips"] = dict(zip(numbers.tolist(), counts.tolist()))
        for number, first in zip(numbers, firsts):
            expected = self.buckets[number].latent_shape if number < len(self.buckets) else None
            if expected != (shape := self._usual_shape("latents", first)):
                raise UserError(f"{folder}: cache.json has latent_shape = {expected}, and the clips have {shape}")

    def _metadata(self, name: str, settings: dict[str, Any], kind: type[M]) -> M:
        if metadata := read_metadata(self.folder / name, settings, kind):
            return metadata
        advice = "run the same python prepare.py command again, it makes what is missing"
        raise UserError(f"the cache in {self.folder} is not complete: {name} is missing or damaged; {advice}")

    def _open(self, shard: int) -> Any:
        if shard not in self.opened:
            self.opened[shard] = safe_open(self.folder / shard_file(shard), framework="pt")
        return self.opened[shard]

    def _usual_shape(self, part: str, i: int) -> tuple[int, ...]:
        """The shape of most clips of the shard and bucket of clip i: one damaged clip does not decide it."""
        shard = self.places[i, 0]
        rows = self.places[(self.places[:, 0] == shard) & (self.bucket_of == self.bucket_of[i]), 1]
        shapes = [tuple(self._open(shard).get_slice(f"{row:07d}.{part}").get_shape()) for row in rows]
        return Counter(shapes).most_common(1)[0][0]

    def __len__(self) -> int:
        return len(self.places)

    def subset(self, numbers: Sequence[int]) -> "CachedClips":
        """The clips of these numbers alone."""
        part = copy(self)
        part.names, part.identities = ([column[k] for k in numbers] for column in (self.names, self.identities))
        part.places, part.bucket_of = (column[list(numbers)] for column in (self.places, self.bucket_of))
        return part

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": {}}

    def __getitem__(self, i: int) -> dict[str, Any]:
        """name, latents (C, T, h, w) bf16, features (tokens, D) bf16, image (PIL, unaugmented), e_ref (E,), caption.

        UserError with clip and part where a part is damaged or holds numbers that are not finite.
        """
        shard, row = self.places[i]
        part = "file"
        try:
            item = {part: self._open(shard).get_tensor(f"{row:07d}.{part}") for part in PARTS}
            tokens = item["features"].shape[0] if item["features"].ndim else 0
            features_shape = min(max(1, tokens), self.settings["max_tokens"]), self.null_features.shape[1]
            latent_shape = self.buckets[self.bucket_of[i]].latent_shape
            shapes = {"latents": latent_shape, "features": features_shape, "e_ref": self.e_ref_shape}
            for part, shape in shapes.items():
                dtype, actual = item[part].dtype, tuple(item[part].shape)
                if not dtype.is_floating_point or actual != shape:
                    raise ValueError(f"{dtype} of shape {actual}, not floating point of shape {shape}")
                if not item[part].abs().max() < LARGEST_NUMBER:  # false for NaN too
                    raise ValueError("not all of its numbers are finite")
            part = "image"
            item[part] = _photo(item[part].numpy().tobytes())
            part = "caption"
            item[part] = item[part].numpy().tobytes().decode()
        except Exception as error:  # a damaged file makes a library throw anything
            raise UserError(f"clip {self.names[i]} in {self.folder}: its {part} is damaged ({error})") from None
        return item | {"name": self.names[i]}

    def part(self, i: int, part: str) -> bytes | None:
        """The bytes of one part of a clip, unchecked; None where it is missing."""
        shard, row = self.places[i]
        try:
            return self._open(shard).get_tensor(f"{row:07d}.{part}").numpy().tobytes()
        except SafetensorError:
            return None

    def picture(self, i: int, part: str) -> Image.Image | None:
        """The clip's `image` or `strip`; None where it is missing or damaged."""
        with suppress(Exception):
            return _photo(self.part(i, part), "PNG" if part == "image" else "JPEG")

    def tokens(self, i: int) -> int:
        """Number of a caption's tokens, at most settings["max_tokens"]."""
        shard, row = self.places[i]
        return self._open(shard).get_slice(f"{row:07d}.features").get_shape()[0]


def _photo(file: bytes, kind: str = "PNG") -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(file), formats=[kind]).convert("RGB")
        except UnidentifiedImageError:
            raise ValueError(f"no {kind}") from None

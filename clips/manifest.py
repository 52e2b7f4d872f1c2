"""The clips of a training set: video, caption and reference of each.

A manifest is a CSV or JSONL file, one clip per row:

    video      caption      reference   identity   start   end   reference_video  reference_time  reference_box
    a.mp4      "A man ..."  a.jpg
    b.mp4      "A girl ..."             anna       3.5     9.0                                                     (1)
    c.mp4      "A girl ..."                                      d.mp4            12.25           [.3, .2, .5, .6]  (2)

Only `video` and `caption` are required. Times are seconds from the video's first frame, and relative paths are relative
to the manifest's folder. A reference is an image file, or (2) a face in a frame of some video, its box (left, top,
right, bottom) in fractions of the frame. In row (1), which names no reference, a face is cut out of a random frame of
the same video, or of another clip with the same `identity`.

An unusable row keeps its place and has the reason in `problem`: one bad line among 200,000 must not stop a night's
work, and the number of a row decides its shard of the cache.
"""

import csv
import io
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor

from clips.buckets import fitting, window
from common.errors import UserError
from common.media import TooShort, probe_video, read_frame, read_image, read_video, to_tensor
from common.schema import Count, Text, foreign_record, parse_json, validate
from common.video import SAME_TIME, probe_rate
from face import FaceDetector

FACE_MARGIN = 1.6  # side of a face crop over the longer side of the face's box: hair and chin, little background
REFERENCE_TRIES = 5  # random frames in which a face is searched
REFERENCE_SIDE = 1024  # larger references are reduced to this, which is more than the letterbox of 480x832 shows
VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".flv", ".ts", ".3gp", ".mpg", ".mpeg", ".wmv"}


class Rejected(Exception):
    """A row that is left out: the reason, one of a few phrases that are counted, and the details."""


def _split(value: Any) -> Any:
    """The numbers in a text, as a CSV has them."""
    return re.split(r"[\s,]+", value.strip(" []()")) if isinstance(value, str) else value


def _touches_the_frame(box: tuple[float, ...]) -> tuple[float, ...]:
    left, top, right, bottom = box
    if not (-1 < left < right < 2 and -1 < top < bottom < 2 and left < 1 and top < 1 and right > 0 and bottom > 0):
        raise ValueError("should be left, top, right, bottom in fractions of the frame")
    return box


def _path(value: Any) -> Any:
    if "\0" in str(value):
        raise ValueError("no path has a NUL character")
    return value


# A CSV has text for numbers, so seconds and fractions read it; elsewhere a number is a number.
Seconds = Annotated[float, Field(strict=False, ge=0)]
Fraction = Annotated[float, Field(strict=False)]
Corners = Annotated[tuple[Fraction, Fraction, Fraction, Fraction], Field(strict=False)]
Box = Annotated[Corners, BeforeValidator(_split), AfterValidator(_touches_the_frame)]
AnyText = Annotated[Text, BeforeValidator(lambda value: str(value).strip())]
FilePath = Annotated[Path, Field(strict=False), BeforeValidator(_path)]


@foreign_record
class Clip:
    """One row, its paths absolute. Blank fields count as missing, other columns are ignored."""

    line: int  # of the manifest, the first is 1
    problem: str | None = None  # why the row cannot be used
    video: FilePath = Path()
    caption: AnyText = ""
    reference: FilePath | None = None
    identity: AnyText | None = None
    start: Seconds = 0.0
    end: Seconds | None = None
    reference_video: FilePath | None = None
    reference_time: Seconds | None = None
    reference_box: Box | None = None
    window: Count = 0  # number of the part of a long clip; no column

    @model_validator(mode="after")
    def _fields_agree(self) -> "Clip":
        if self.problem is None and self.video == Path():
            raise ValueError("video is missing")
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end {self.end:g} is not after start {self.start:g}")
        if (self.reference_video is None) != (self.reference_time is None):
            raise ValueError("reference_video and reference_time go together")
        return self

    @property
    def name(self) -> str:
        """For reports and error messages: the video, the manifest's line, and which window if not the first."""
        return f"{self.video.stem}:{self.line}" + (f".{self.window + 1}" if self.window else "")


def read_manifest(path: str | Path) -> list[Clip]:
    """All rows of a CSV or JSONL manifest, in order. UserError where the whole file cannot be used."""
    path = Path(path)
    kind = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"no manifest at {path}")
    if kind not in (".csv", ".jsonl"):
        raise UserError(f"{path} is no manifest: its name must end in .csv or .jsonl")
    rows = list(_csv_rows(path) if kind == ".csv" else _jsonl_rows(path))
    columns = {key for _, row in rows if isinstance(row, dict) for key in row}
    for name in ("video", "caption"):
        if columns and name not in columns:
            raise UserError(f"{path}, line {rows[0][0]}: no column {name!r}; there are {', '.join(sorted(columns))}")
    if kind == ".csv":
        rows = rows[1:]
    if not rows:
        raise UserError(f"{path} lists no clip")
    folder = Path(os.path.abspath(path.parent))
    return [_clip(line, row, folder) for line, row in rows]


def _csv_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    """(line, row) or (line, reason why it is unusable); the first row is the header."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="")
        try:
            columns = Counter(reader.fieldnames)
            if twice := [name for name, count in columns.items() if name and count > 1]:
                raise UserError(f"{path}, line 1: two columns {twice[0]!r}")
            yield 1, dict(columns)
            for row in reader:
                yield reader.line_num, "more fields than columns" if "" in row else row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    for line, text in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if text.strip():
            try:
                yield line, parse_json(dict[str, Any], text, "row")
            except UserError as error:
                yield line, str(error)


def _clip(line: int, row: dict[str, Any] | str, folder: Path) -> Clip:
    try:
        if isinstance(row, str):
            raise UserError(row)
        fields = {key: value.strip() if isinstance(value, str) else value for key, value in row.items()}
        fields = {key: value for key, value in fields.items() if value not in (None, "")}
        clip = validate(Clip, fields | {"line": line, "problem": None, "window": 0}, "row")
    except UserError as error:
        return Clip(line=line, problem=str(error))
    paths = {key: getattr(clip, key) for key in ("video", "reference", "reference_video")}
    return replace(clip, **{key: folder / path for key, path in paths.items() if path})


def load_clip(
    clip: Clip, settings: dict[str, Any], detector: FaceDetector, identities: dict[str, list[Clip]]
) -> dict | None:
    """A clip of its bucket: frames (F, H, W, 3), source (the fields of cache.Source), and the reference with its
    landmarks. None: the row is too short for this window. Raises Rejected, with the reason."""
    if clip.problem:
        raise Rejected("bad row", clip.problem)
    if not clip.caption:
        raise Rejected("empty caption", "the row has none")
    reason = "unreadable video"
    try:
        if (read := read_window(clip, settings)) is None:
            return None
        bucket, frames, source = read
        middle = len(frames) // 2
        if settings["require_face_in_video"] and not _face(Image.fromarray(frames[middle]), detector):
            raise Rejected("no face in the video", f"frame {middle + 1} of {len(frames)} of {clip.video} shows none")
        reason = "unreadable reference"
        image, note = _find_reference(clip, len(frames) / settings["fps"], settings, detector, identities)
    except UserError as error:
        raise Rejected("too short" if isinstance(error, TooShort) else reason, str(error)) from None
    where = clip.reference or clip.reference_video or clip.video
    return {"frames": frames, "bucket": bucket, "source": source, "note": note} | with_face(image, detector, where)


def read_window(clip: Clip, settings: dict[str, Any]) -> tuple[int, np.ndarray, dict[str, float]] | None:
    """The number of the clip's bucket, frames (F, H, W, 3) of its size, and the fields of cache.Source; None if the
    clip ends before this window. Raises TooShort, UserError, and Rejected for a picture too small for all buckets."""
    buckets, fps, enlarge = settings.get("buckets", [settings]), settings["fps"], settings.get("enlarge", math.inf)
    ends = [end for end in (clip.end, probe_video(clip.video)) if end]
    seconds = max(0.0, min(ends) - clip.start) if ends else 0.0
    # Without a length in the file's header, decoding tells: the longest buckets first.
    frames = math.ceil((seconds - SAME_TIME) * fps) if ends else 10**9
    width, height = read_frame(clip.video, clip.start if frames > 0 else 0.0).size
    source = {"width": width, "height": height, "seconds": seconds, "fps": probe_rate(clip.video)}
    able = fitting(buckets, width, height, 10**9, enlarge)
    if not able:
        raise Rejected("too small", f"{clip.video} is {width}x{height}, and --enlarge {enlarge:g} leaves it no bucket")
    first, fits = window(clip.window, buckets, width, height, frames, enlarge)
    if not fits and not clip.window:  # the header may be wrong; if it is not, read_video says what is missing
        fits = sorted(able, key=lambda number: buckets[number]["frames"])[:1]
    problem, longest = None, 10**9
    for number in fits:
        count, *size = (buckets[number][key] for key in ("frames", "height", "width"))
        if count < longest:
            try:
                return number, read_video(clip.video, count, fps, *size, clip.start + first / fps, clip.end), source
            except TooShort as error:  # the header promises more than there is
                problem, longest = error, count
    if problem and not clip.window:
        raise problem
    return None


def with_face(image: Image.Image | None, detector: FaceDetector, where: str | Path) -> dict:
    """A reference as the cache takes it: pixels, landmarks and box of its face, the PNG. Rejected if it shows none."""
    face = _face(image, detector) if image else None
    if face is None:
        raise Rejected("no face in the reference", f"the detector finds none in {where}")
    png = io.BytesIO()
    image.save(png, "PNG")  # lossless: e_ref and the trainer see the same pixels
    face = dict(zip(("landmarks", "box"), (face[0][None], face[1])))
    return face | {"image": to_tensor(image)[None], "png": bytearray(png.getvalue())}


def _face(image: Image.Image, detector: FaceDetector) -> tuple[Tensor, np.ndarray] | None:
    """Landmarks (5, 2) and box (4,) of the largest face, in pixels."""
    if max(image.size) > 64 * min(image.size):  # a strip holds no face, and fitted into the detector it has no width
        return None
    landmarks, boxes, valid = detector.detect(to_tensor(image)[None])
    return (landmarks[0], boxes[0].numpy()) if valid[0] else None


def _cut_out(frame: Image.Image, detector: FaceDetector) -> Image.Image | None:
    """The largest face of a frame."""
    face = _face(frame, detector)
    return face and crop_face(frame, face[1])


def _find_reference(
    clip: Clip, length: float, settings: dict[str, Any], detector: FaceDetector, identities: dict[str, list[Clip]]
) -> tuple[Image.Image | None, str]:
    """The reference, no larger than REFERENCE_SIDE, or None if no frame shows a face; and a remark, if any."""
    note, image = "", None
    if clip.reference:
        image = read_image(clip.reference)
    elif clip.reference_video:
        frame = read_frame(clip.reference_video, clip.reference_time)
        if clip.reference_box:
            image = crop_face(frame, np.array(clip.reference_box) * [*frame.size, *frame.size])
        else:
            image = _cut_out(frame, detector)
    else:
        key = 2, zlib.crc32(clip.name.encode())  # 0 and 1 are data.sample_rng and data.epoch_order
        rng = np.random.default_rng(np.random.SeedSequence(settings["seed"], spawn_key=key))
        if settings["reference"] == "other":
            others = [c for c in identities.get(clip.identity, ()) if (c.video, c.start) != (clip.video, clip.start)]
            for k in rng.permutation(len(others))[:REFERENCE_TRIES]:
                image = image or _random_face(others[k], length, detector, rng)
            if image is None and clip.identity:
                note = f"reference from the same video: no face in another clip of identity {clip.identity!r}"
        image = image or _random_face(clip, length, detector, rng)
    if image:
        image.thumbnail((REFERENCE_SIDE, REFERENCE_SIDE), Image.Resampling.LANCZOS)
    return image, note


def _random_face(clip: Clip, length: float, detector: FaceDetector, rng: np.random.Generator) -> Image.Image | None:
    """The largest face of a random frame between the clip's start and its end, or the video's, or `length` seconds."""
    with suppress(UserError):  # a video of another row may be anything; that row has its own line in the report
        end = clip.end or max(probe_video(clip.video), clip.start + length)
        for moment in rng.uniform(clip.start, end, REFERENCE_TRIES):
            if image := _cut_out(read_frame(clip.video, moment), detector):
                return image
    return None


def crop_face(image: Image.Image, box: np.ndarray) -> Image.Image:
    """A square of FACE_MARGIN times the longer side of the box (left, top, right, bottom in pixels), centred on it.

    A square beyond the image's edge is moved in; one larger than the image is cut.
    """
    center, side = (box[:2] + box[2:]) / 2, FACE_MARGIN * max(box[2:] - box[:2])
    size = np.clip(np.round([side, side]), 1, image.size).astype(int)
    corner = np.clip(np.round(center - size / 2), 0, image.size - size).astype(int)
    return image.crop((*corner, *(corner + size)))

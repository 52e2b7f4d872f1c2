"""Which clips a training set consists of, what each shows, and whose face goes with it.

A manifest is a CSV or JSONL file, one clip per row:

    video      caption      reference   identity   start   end   reference_video  reference_time  reference_box
    a.mp4      "A man ..."  a.jpg
    b.mp4      "A girl ..."             anna       3.5     9.0                                                     (1)
    c.mp4      "A girl ..."                                      d.mp4            12.25           [.3, .2, .5, .6]  (2)

Only `video` and `caption` are required; times are seconds from the video's first frame, and relative paths are
relative to the manifest's folder. A reference is an image file, or (2) a face in a frame of some video, its box
(left, top, right, bottom) in fractions of the frame; or (1) nothing is said, and a face is cut out of a random frame of
the same video, or of another clip with the same `identity`.

A row that cannot be used keeps its place and says why in `problem`: one bad line among 200,000 must not stop a night's
work, and the row's number decides into which shard of the cache the others go.

VIP-200K (`python data.py vip200k`) is a JSON list of persons over videos that everybody downloads for themselves:

    [{"faces":    [{"id": "<YouTube id>", "clip": {"beg": {"frame_num": 1016, "framerate": 23.976}, "end": {...}},
                    "fidx": 16, "xyxy_norm": [0.49, 0.16, 0.57, 0.31]}, ...],
      "segments": [{"id", "clip", "fidx_beg": 0, "fidx_end": 130, "caption": "..."}, ...]}, ...]

How it is read: `frame_num` counts frames of the video, `fidx*` those of the clip, as the dataset's own description
says (and its numbers agree: a clip of frames 1016 to 1147 has a segment from 0 to 130, so `fidx_end` is still shown
and the clip's `end` is not). Frame numbers become seconds by the annotation's own frame rate, because the copy that
was downloaded may have another one.
"""

import csv
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from common.errors import UserError, whole_file
from common.media import TooShort, probe_video, read_frame, read_image, read_video, to_tensor
from face import FaceDetector

FACE_MARGIN = 1.6  # side of a face crop over the longer side of the face's box: hair and chin, little background
REFERENCE_TRIES = 5  # random frames in which a face is looked for
REFERENCE_SIDE = 1024  # larger references are reduced to this, which is more than the letterbox of 480x832 shows
REQUIRED = ("video", "caption")
VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".flv", ".ts", ".3gp", ".mpg", ".mpeg", ".wmv"}


class Rejected(Exception):
    """A row that is left out: `reason`, one of a few phrases that are counted, and `detail`, what exactly."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Clip:
    """One row. `problem` is None, or why the row cannot be used."""

    line: int  # of the manifest, the first is 1
    video: Path = Path()
    caption: str = ""
    reference: Path | None = None
    identity: str | None = None
    start: float = 0.0
    end: float | None = None
    reference_video: Path | None = None
    reference_time: float | None = None
    reference_box: tuple[float, ...] | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        """What reports and error messages call it: the video and the manifest's line."""
        return f"{self.video.stem}:{self.line}"


def read_manifest(path: str | Path) -> list[Clip]:
    """All rows of a CSV or JSONL manifest, in order.

    Raises UserError, naming file and line, when it is no manifest: missing, another format, empty, a column missing.
    """
    path = Path(path)
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if not path.is_file():
        raise UserError(f"no manifest at {path}")
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} is no manifest: its name must end in .csv or .jsonl")
    try:
        rows = list(readers[path.suffix.lower()](path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    if not rows:
        raise UserError(f"{path} lists no clip")
    columns = {key for _, row in rows if isinstance(row, dict) for key in row}
    if columns and (missing := [name for name in REQUIRED if name not in columns]):
        raise UserError(f"{path}, line {rows[0][0]}: no column {missing[0]!r}; there are {', '.join(sorted(columns))}")
    return [_clip(line, row, path.parent) for line, row in rows]


def _csv_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    """(line, row) or (line, what is wrong with it)."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="")
        try:
            if reader.fieldnames and (missing := [name for name in REQUIRED if name not in reader.fieldnames]):
                there = ", ".join(reader.fieldnames)
                raise UserError(f"{path}, line 1: no column {missing[0]!r}; there are {there}")
            for row in reader:
                yield reader.line_num, "more fields than columns" if "" in row else row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    with open(path, encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                try:
                    row = json.loads(text)
                    yield line, row if isinstance(row, dict) else "not a JSON object"
                except ValueError as error:
                    yield line, f"not JSON: {error}"


def _clip(line: int, row: dict[str, Any] | str, folder: Path) -> Clip:
    if isinstance(row, str):
        return Clip(line, problem=row)
    row = {key: value for key, value in row.items() if value is not None and str(value).strip()}
    fields: dict[str, Any] = {"line": line}
    try:
        json.dumps(row, ensure_ascii=False).encode()  # raises for half an emoji
        if "\\u0000" in json.dumps(row):
            raise ValueError("a NUL character")
        for key in ("video", "reference", "reference_video"):
            if key in row:
                fields[key] = folder / str(row[key]).strip()
        fields["caption"] = str(row.get("caption", "")).strip()
        fields["identity"] = str(row["identity"]).strip() if "identity" in row else None
        for key in ("start", "end", "reference_time"):
            if key in row:
                fields[key] = _seconds(key, row[key])
        if "reference_box" in row:
            fields["reference_box"] = _box(row["reference_box"])
        if "video" not in row:
            raise ValueError("no video")
        if "end" in fields and fields["end"] <= fields.get("start", 0.0):
            raise ValueError(f"end {fields['end']:g} is not after start {fields.get('start', 0.0):g}")
        if ("reference_video" in row) != ("reference_time" in row):
            raise ValueError("reference_video and reference_time go together")
    except ValueError as error:
        return Clip(line, fields.get("video", Path()), problem=str(error))
    return Clip(**fields)


def _seconds(key: str, value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{key} {value!r} is not a number of seconds")
    return seconds


def _box(value: Any) -> tuple[float, ...]:
    """A list of four numbers, or text that holds four."""
    try:
        box = tuple(float(x) for x in (re.split(r"[\s,]+", value.strip(" []()")) if isinstance(value, str) else value))
    except (TypeError, ValueError):
        box = ()
    if len(box) != 4 or not (-1 < box[0] < box[2] < 2 and -1 < box[1] < box[3] < 2):
        raise ValueError(f"reference_box {value!r} is not left, top, right, bottom in fractions of the frame")
    return box


# ---------------------------------------------------------------------------------------------------------------------
# A row's pixels


def load_clip(clip: Clip, settings: dict[str, Any], detector: FaceDetector, identities: dict[str, list[Clip]]) -> dict:
    """Frames (F, H, W, 3), and the reference with its landmarks. Raises Rejected, with the reason."""
    if clip.problem:
        raise Rejected("bad row", clip.problem)
    if not clip.caption:
        raise Rejected("empty caption", "the row has none")
    size = (settings[key] for key in ("frames", "fps", "height", "width"))
    try:
        frames = read_video(clip.video, *size, clip.start, clip.end)
    except TooShort as error:
        raise Rejected("too short", str(error)) from None
    except UserError as error:
        raise Rejected("unreadable video", str(error)) from None
    if settings["require_face_in_video"]:
        middle = len(frames) // 2
        if _face(Image.fromarray(frames[middle]), detector) is None:
            raise Rejected("no face in the video", f"frame {middle + 1} of {len(frames)} of {clip.video} shows none")
    try:
        image, note = _find_reference(clip, settings, detector, identities)
    except UserError as error:
        raise Rejected("unreadable reference", str(error)) from None
    where = clip.reference or clip.reference_video or clip.video
    return {"frames": frames, "note": note} | with_face(image, detector, where)


def with_face(image: Image.Image | None, detector: FaceDetector, where: str | Path) -> dict:
    """A reference as the cache takes it: pixels, landmarks of its face, the PNG. Raises Rejected if it shows none."""
    found = _face(image, detector) if image else None
    if found is None:
        raise Rejected("no face in the reference", f"the detector finds none in {where}")
    png = io.BytesIO()
    image.save(png, "PNG")  # lossless: e_ref and the trainer see the same pixels
    landmarks, _ = found
    return {"image": to_tensor(image)[None], "landmarks": landmarks[None], "png": bytearray(png.getvalue())}


def _face(image: Image.Image, detector: FaceDetector) -> tuple[Tensor, Tensor] | None:
    """Landmarks (5, 2) and box (4,) of the largest face, in pixels."""
    if max(image.size) > 64 * min(image.size):  # a strip holds no face, and fitted into the detector it has no width
        return None
    landmarks, boxes, valid = detector.detect(to_tensor(image)[None])
    return (landmarks[0], boxes[0]) if valid[0] else None


def _find_reference(
    clip: Clip, settings: dict[str, Any], detector: FaceDetector, identities: dict[str, list[Clip]]
) -> tuple[Image.Image | None, str]:
    """The reference, no larger than REFERENCE_SIDE, or None if no face was found to cut out; and a remark, if any."""
    note, image = "", None
    if clip.reference:
        image = read_image(clip.reference)
    elif clip.reference_video:
        frame = read_frame(clip.reference_video, clip.reference_time)
        if clip.reference_box:
            image = crop_face(frame, np.array(clip.reference_box) * [*frame.size, *frame.size])
        elif found := _face(frame, detector):
            image = crop_face(frame, found[1].numpy())
    else:
        key = 2, zlib.crc32(clip.name.encode())  # 0 and 1 are data.sample_rng and data.epoch_order
        rng = np.random.default_rng(np.random.SeedSequence(settings["seed"], spawn_key=key))
        if settings["reference"] == "other":
            others = [c for c in identities.get(clip.identity, ()) if (c.video, c.start) != (clip.video, clip.start)]
            for k in rng.permutation(len(others))[:REFERENCE_TRIES]:
                image = image or _random_face(others[k], settings, detector, rng)
            if image is None:
                note = f"reference from the same video: no face in another clip of identity {clip.identity!r}"
        image = image or _random_face(clip, settings, detector, rng)
    if image:
        image.thumbnail((REFERENCE_SIDE, REFERENCE_SIDE), Image.Resampling.LANCZOS)
    return image, note


def _random_face(
    clip: Clip, settings: dict[str, Any], detector: FaceDetector, rng: np.random.Generator
) -> Image.Image | None:
    """The largest face of a random frame between the clip's start and its end, which is the video's if it has none."""
    shortest = clip.start + settings["frames"] / settings["fps"]
    with suppress(UserError):  # a video of another row may be anything; that row has its own line in the report
        end = clip.end or max(probe_video(clip.video), shortest)
        for moment in rng.uniform(clip.start, end, REFERENCE_TRIES):
            frame = read_frame(clip.video, moment)
            if found := _face(frame, detector):
                return crop_face(frame, found[1].numpy())
    return None


def crop_face(image: Image.Image, box: np.ndarray) -> Image.Image:
    """A square of FACE_MARGIN times the box's longer side (box: left, top, right, bottom in pixels), centred on it.

    Where it would reach out of the image it is moved in; where it is larger than the image it is cut, and no square.
    """
    center, side = (box[:2] + box[2:]) / 2, FACE_MARGIN * max(box[2:] - box[:2])
    size = np.clip(np.round([side, side]), 1, image.size).astype(int)
    corner = np.clip(np.round(center - size / 2), 0, image.size - size).astype(int)
    return image.crop((*corner, *(corner + size)))


# ---------------------------------------------------------------------------------------------------------------------
# VIP-200K


def clip_seconds(clip: dict, fidx: int) -> float:
    """When frame `fidx` of an annotated clip begins, in seconds of the whole video. The one place that decides it."""
    return (clip["beg"]["frame_num"] + fidx) / clip["beg"]["framerate"]


def vip200k(annotations: str | Path, videos: str | Path, out: str | Path, seed: int = 0) -> Counter:
    """Write a manifest of all segments whose video is in the folder `videos` as <id>.<any video suffix>.

    The reference of a segment is one of the same person's faces, drawn by `seed`, that is not in the segment's own clip
    and whose video is there too. Returns the counts: segments, written, and of those left out "video missing",
    "no face in another clip" and "unreadable"; the numbers of videos named and missing.
    """
    out, files = Path(out), {}
    if not Path(videos).is_dir():
        raise UserError(f"no folder {videos}: give --videos the folder of the downloaded videos")
    for file in sorted(Path(videos).iterdir(), reverse=True):
        if file.suffix.lower() in VIDEO_SUFFIXES and file.stat().st_size:
            files[file.stem] = file.resolve()
    if out.suffix.lower() != ".jsonl":
        raise UserError(f"--out {out} does not end in .jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    counts, named = Counter(), set()
    with whole_file(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for index, person in enumerate(_read_annotations(annotations)):
            for number, segment in enumerate(person["segments"]):
                counts["segments"] += 1
                try:
                    named.add(segment["id"])
                    rng = np.random.default_rng([seed, index, number])
                    row = _vip_row(segment, person["faces"], files, rng)
                except (KeyError, TypeError, ZeroDivisionError):
                    row = "unreadable"
                counts["written" if isinstance(row, dict) else row] += 1
                if isinstance(row, dict):
                    file.write(json.dumps({"identity": f"person-{index}"} | row, ensure_ascii=False) + "\n")
        if not counts["written"]:
            raise UserError(f"{annotations}: none of {counts['segments']} segments can be used with {videos}")
    counts["videos"], counts["videos missing"] = len(named), len(named - files.keys())
    return counts


def _read_annotations(path: str | Path) -> list[dict]:
    try:
        persons = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    for index, person in enumerate(persons if isinstance(persons, list) else [persons]):
        lists = [person.get(key) for key in ("faces", "segments")] if isinstance(person, dict) else [None]
        if not isinstance(persons, list) or not all(isinstance(value, list) for value in lists):
            raise UserError(f"{path}, item {index}: not a person of VIP-200K with lists of faces and segments")
    return persons


def _vip_row(segment: dict, faces: list[dict], files: dict[str, Path], rng: np.random.Generator) -> dict | str:
    """A row of the manifest, or why there is none."""
    clip = segment["clip"]
    if segment["id"] not in files:
        return "video missing"
    others = [f for f in faces if (f["id"], f["clip"]) != (segment["id"], clip) and f["id"] in files]
    if not others:
        return "no face in another clip"
    face = others[rng.integers(len(others))]
    return {
        "video": str(files[segment["id"]]),
        "caption": segment["caption"],
        "start": round(clip_seconds(clip, segment["fidx_beg"]), 6),
        "end": round(clip_seconds(clip, segment["fidx_end"] + 1), 6),
        "reference_video": str(files[face["id"]]),
        "reference_time": round(clip_seconds(face["clip"], face["fidx"]), 6),
        "reference_box": face["xyxy_norm"],
    }

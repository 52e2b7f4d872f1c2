"""A manifest from VIP-200K: annotations without videos, which every user downloads alone.

The file is a JSON list of persons, each with a list of `faces` and a list of `segments`, the records below; `id` is
YouTube's. `frame_num` counts frames of the video, `fidx*` frames of the clip, as the dataset's description says. Its
numbers agree: a clip of frames 1016 to 1147 has a segment from 0 to 130, so the frame `fidx_end` is shown and the
clip's `end` is not. Frame numbers become seconds by the annotation's frame rate, because a downloaded copy may have
another one.
"""

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from clips.manifest import VIDEO_SUFFIXES, Box
from common.errors import UserError, write_text
from common.schema import Text, foreign_record, validate

Frame = Annotated[int, Field(ge=0, lt=2**31)]


@foreign_record
class Moment:
    frame_num: Frame
    framerate: Annotated[float, Field(ge=0.1, le=1000)]


@foreign_record
class Span:
    beg: Moment
    end: Moment | None = None

    def seconds(self, fidx: int) -> float:
        """Begin of the clip's frame `fidx`, in seconds of the whole video."""
        return round((self.beg.frame_num + fidx) / self.beg.framerate, 6)


@foreign_record
class Face:
    id: Text
    clip: Span
    fidx: Frame
    xyxy_norm: Box


@foreign_record
class Segment:
    id: Text
    clip: Span
    fidx_beg: Frame
    fidx_end: Frame
    caption: Text


def vip200k(annotations: str | Path, videos: str | Path, out: str | Path, seed: int = 0) -> Counter:
    """Write a manifest of all segments with a video in the folder `videos`, <id>.<any video suffix>.

    The reference of a segment is a face of the same person in another clip, drawn by `seed` from the videos that are
    there. Returns counts: of all segments, of those in the manifest and those left out by reason, of videos.
    """
    if Path(out).suffix.lower() != ".jsonl":
        raise UserError(f"--out {out} does not end in .jsonl")
    if not Path(videos).is_dir():
        raise UserError(f"no folder {videos}: give --videos the folder of the downloaded videos")
    files = sorted((file for file in Path(videos).iterdir() if file.suffix.lower() in VIDEO_SUFFIXES), reverse=True)
    paths = {file.stem: str(file.resolve()) for file in files if file.is_file() and file.stat().st_size}
    if not Path(annotations).is_file():
        raise UserError(f"no annotations at {annotations}")
    try:  # not parse_json: half an emoji must spoil one caption only
        persons = json.loads(Path(annotations).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{annotations} is not JSON: {error}") from None
    counts, named, rows, problem = Counter(), set(), [], ""
    for index, person in enumerate(persons if isinstance(persons, list) else [persons]):
        lists = [person.get(key) for key in ("faces", "segments")] if isinstance(person, dict) else [None]
        if not all(isinstance(value, list) for value in lists):
            counts["unreadable persons"] += 1
            problem = problem or f" (item {index} has no lists of faces and segments)"
            continue
        faces = [face for face in (_read(Face, value) for value in lists[0]) if face and face.id in paths]
        for number, segment in enumerate(_read(Segment, value) for value in lists[1]):
            counts["segments"] += 1
            if segment is None:
                counts["unreadable"] += 1
                continue
            named.add(segment.id)
            others = [face for face in faces if (face.id, face.clip) != (segment.id, segment.clip)]
            if segment.id not in paths or not others:
                counts["no face in another clip" if segment.id in paths else "video missing"] += 1
                continue
            counts["written"] += 1
            face = others[np.random.default_rng([seed, index, number]).integers(len(others))]
            rows.append({
                "identity": f"person-{index}", "video": paths[segment.id], "caption": segment.caption,
                "start": segment.clip.seconds(segment.fidx_beg), "end": segment.clip.seconds(segment.fidx_end + 1),
                "reference_video": paths[face.id], "reference_time": face.clip.seconds(face.fidx),
                "reference_box": face.xyxy_norm,
            })  # fmt: skip
    if not rows:
        raise UserError(f"{annotations}: none of {counts['segments']} segments can be used with {videos}{problem}")
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    counts["videos"], counts["videos missing"] = len(named), len(named - paths.keys())
    return counts


def _read(kind: type, value: Any) -> Any:
    """An object of `kind`, or None where the value does not fit."""
    with suppress(UserError):
        return validate(kind, value, "")

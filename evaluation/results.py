"""Folders of results: the settings they belong to, and results.jsonl, the scores of each video as they come."""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from common.errors import UserError, blame, whole_file, write_text
from common.images import require_file
from common.outputs import require_same
from common.schema import Count, FiniteFloat, Share, Text, parse_json, record

START = b'{"id": '  # of every line


@record
class Result:
    """Scores of one video; `stamp` identifies the files and options that they were computed from."""

    id: Text
    stamp: Text
    facesim_arc: FiniteFloat
    facesim_cur: FiniteFloat | None
    clip_score: FiniteFloat | None
    face_rate: Share
    retried: Count
    background_copy: FiniteFloat | None
    background_chance: FiniteFloat | None = None
    pose_copy: FiniteFloat | None
    pose_chance: FiniteFloat | None = None
    identity_drift: FiniteFloat | None


def begin(path: Path, settings: dict[str, Any], advice: str) -> None:
    """Write the settings that a folder of results belongs to, or compare them with those of an earlier run."""
    if path.is_file():
        try:
            before = parse_json(dict[str, JsonValue], path.read_bytes(), path)
        except UserError as error:
            raise UserError(f"{error}: {advice}") from None
        return require_same(before, settings, path.parent, advice)
    write_text(path, json.dumps(settings, indent=1) + "\n")  # every rank writes the same


def stamp(files: Iterable[Path | None], texts: Iterable[object] = ()) -> str:
    """A hash of texts, and of files by name, size and time of change."""
    parts = [str(text) for text in texts]
    for file in files:
        parts.append(str(file))
        with suppress(TypeError, OSError, ValueError):  # None, no file, or a name that no file can have
            status = os.stat(file)
            parts[-1] = f"{file.name} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]


def read_results(path: Path) -> dict[str, Result]:
    """Results by id, later lines over earlier ones. A last line without its end, from a kill, is cut off."""
    if not path.exists():
        return {}
    require_file(path, "results")
    *lines, rest = path.read_bytes().split(b"\n")
    try:
        rows = [parse_json(Result, line, f"{path}, line {k}") for k, line in enumerate(lines, start=1)]
        if not START.startswith(rest[: len(START)]):
            raise UserError(f"{path}, line {len(lines) + 1}: not a result")
    except UserError as error:
        raise UserError(f"{error}: move the file away, and everything is measured anew") from None
    if rest:
        with whole_file(path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in lines))
    return {row.id: row for row in rows}


def append_line(path: Path, row: dict) -> None:
    """Add a line, on the disk when this returns."""
    with blame(f"{path} cannot be written"), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())

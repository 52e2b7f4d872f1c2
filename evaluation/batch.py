"""Many videos in one folder: the share of each process, the complete cases, the reasons of failed ones.

    out/batch.json        the settings that all videos of the folder share: sizes, steps, guidance, checkpoint
    out/<id>.mp4, .png    a case's video and its contact sheet; with both there, the case is complete
    out/<id>.failed.txt   the reason of a failure, in one line; removed when a later run makes the video

The folder is the only state. After a kill, the same command makes the videos that are missing; failed cases are tried
again. Under torchrun case k belongs to rank k mod world. The ranks exchange nothing, so a slow one delays no other.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
from pydantic import JsonValue

from common.device import own_place
from common.errors import UserError, remove_leftovers, write_text
from common.images import require_file
from common.outputs import refuse_overwrite
from common.schema import parse_json
from evaluation.cases import Case
from evaluation.results import begin


class Batch:
    """The folder of a batch. `failed` counts the cases of this process that failed."""

    def __init__(self, folder: str | Path, settings: dict[str, Any], cases: list[Case], inputs: Iterable[Path] = ()):
        """UserError if an output would replace a reference or one of `inputs`, or the folder has other settings."""
        self.folder, self.cases, self.failed = Path(folder), cases, 0
        self.settings = json.loads(json.dumps(settings))  # tuples as lists, as they come back from the file
        self.rank, self.world, _ = own_place()
        begun = self.folder / "batch.json"
        outputs = [path for case in cases for path in (self.video(case), self.sheet(case), self.note(case))]
        refuse_overwrite([begun, *outputs], [*(case.reference for case in cases if case.reference), *inputs])
        begin(begun, self.settings, "run it with the same options, or give another --out")

    def video(self, case: Case) -> Path:
        return self.folder / f"{case.id}.mp4"

    def sheet(self, case: Case) -> Path:
        return self.folder / f"{case.id}.png"

    def note(self, case: Case) -> Path:
        return self.folder / f"{case.id}.failed.txt"

    def missing(self) -> list[Case]:
        """The incomplete cases of this rank."""
        return [case for case in self.cases[self.rank :: self.world] if not self.is_complete(case)]

    def is_complete(self, case: Case) -> bool:
        """Whether the sheet and the whole video are there, made with these settings from this case."""
        sheet = self.sheet(case)
        return sheet.is_file() and sheet.stat().st_size > 0 and self._is_own(case)

    def _is_own(self, case: Case) -> bool:
        made = read_comment(self.video(case))
        if made is None or case.reference is None or made != made | self.settings | {"seed": case.seed}:
            return False
        same_photo = Path(str(made.get("ref"))).name == case.reference.name
        return same_photo and str(made.get("prompt")).endswith(case.prompt)

    def check(self, case: Case) -> None:
        """Raises UserError for a case with a problem, and where files lie that this batch has not written."""
        if case.problem:
            raise UserError(case.problem)
        there = [path for path in (self.video(case), self.sheet(case)) if os.path.lexists(path)]
        if there and not self._is_own(case):
            raise UserError(f"{there[0]} is there, not of this case or not whole: move it away, or give another --out")

    @contextmanager
    def one_case(self, case: Case) -> Iterator[None]:
        """Work on one case: an exception of any kind is written into its note and stops no other case."""
        try:
            yield
            if self.is_complete(case):
                self.note(case).unlink(missing_ok=True)
                remove_leftovers(self.note(case))
        except Exception as error:
            reason = one_line(error)
            self.failed += 1
            print(f"{case.id} failed: {reason}")
            try:
                write_text(self.note(case), reason + "\n")
            except (UserError, OSError) as error:  # the disk is full, or a folder has the name of the note
                print(f"{case.id}: the reason could not be written: {one_line(error)}")

    def finish(self) -> None:
        """The last line; exit code 2 if a case failed, but 0 under torchrun, which would kill all other ranks."""
        failures = f"{self.failed} case{'' if self.failed == 1 else 's'} failed"
        process = f" in process {self.rank} of {self.world}" if self.world > 1 else ""
        done = f"{sum(map(self.is_complete, self.cases))} of {len(self.cases)} videos are in {self.folder}"
        print(f"{done}; {failures}{process}" if self.failed else done)
        if self.failed and self.world == 1:
            raise UserError(f"{failures}: {self.folder}/*.failed.txt say why; run it again to retry")


def one_line(error: Exception) -> str:
    """The message of an exception in one line, with its type where it is not one for users."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: {text}".rstrip(": ")


def read_comment(video: Path) -> dict[str, Any] | None:
    """The metadata that sample.py writes into an MP4. None for other files, and where frames are missing.

    The packets are counted, not decoded: a few milliseconds a video.
    """
    options = {"format": "mp4", "metadata_errors": "ignore", "options": {"protocol_whitelist": "file"}}
    try:
        require_file(video, "video")
        with av.open(f"file:{video}", **options) as container:
            stream = container.streams.video[0]
            count = sum(packet.size > 0 and not packet.is_corrupt for packet in container.demux(stream))
            if not 0 < stream.frames == count:
                return None
            return parse_json(dict[str, JsonValue], container.metadata["comment"], video)
    except (av.FFmpegError, OSError, UserError, IndexError, KeyError):
        return None

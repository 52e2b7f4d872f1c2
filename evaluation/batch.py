"""Many videos in one folder: whose turn it is, what is there already, and what became of the ones that failed.

    out/batch.json        what all videos of the folder have in common: sizes, steps, guidance, checkpoint
    out/<id>.mp4, .png    a case's video and its contact sheet; with both there, the case is complete
    out/<id>.failed.txt   why there is none, in one line; gone when a later run makes it

So the folder is all the state there is. After a kill, the same command makes what is missing; failed cases are tried
again. Under torchrun case k belongs to rank k mod world. The ranks never talk to each other, so a slow one holds up
nobody, and there is nothing to hang.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, whole_file
from evaluation.cases import Case

# What a killed run leaves of a file of case [1]: errors.whole_file's names.
HALF_WRITTEN = re.compile(r"\.(.+?)(\.failed)?\.\d+\.part\.\w+")


class Batch:
    """The folder of a batch. `failed` counts the cases of this process that could not be made."""

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        """Raises UserError if the folder was begun with other settings: its videos would not be comparable."""
        settings = json.loads(json.dumps(settings))  # as they read when they come back
        self.folder, self.failed = Path(folder), 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        begun = self.folder / "batch.json"
        if begun.is_file():
            before = json.loads(begun.read_text())
            for key in before | settings:
                if before.get(key) != settings.get(key):
                    raise UserError(
                        f"{folder} was begun with {key} = {before.get(key)} and this run has {settings.get(key)}: "
                        "run it with the same options, or give another --out"
                    )
            return
        with whole_file(begun) as temporary:  # every rank writes the same
            temporary.write_text(json.dumps(settings, indent=1) + "\n")

    def video(self, case: Case) -> Path:
        return self.folder / f"{case.id}.mp4"

    def is_complete(self, case: Case) -> bool:
        return self.video(case).is_file() and self.video(case).with_suffix(".png").is_file()

    def missing(self, cases: list[Case]) -> list[Case]:
        """This rank's share of the cases that are not complete, after removing what killed runs left half written."""
        mine = cases[self.rank :: self.world]
        names = {case.id for case in mine}
        for file in self.folder.iterdir():  # another rank may be writing its own just now
            if (match := HALF_WRITTEN.fullmatch(file.name)) and match[1] in names:
                file.unlink(missing_ok=True)
        return [case for case in mine if not self.is_complete(case)]

    def check(self, case: Case) -> None:
        """Raises UserError for a case that nothing can be made of."""
        if case.problem:
            raise UserError(case.problem)
        if case.reference.resolve() == self.video(case).with_suffix(".png").resolve():
            raise UserError(f"its contact sheet would replace its reference {case.reference}: give another --out")

    @contextmanager
    def one_case(self, case: Case) -> Iterator[None]:
        """Work on a case: what its own photo, prompt or size brings about is noted, and costs no other case."""
        note = self.folder / f"{case.id}.failed.txt"
        try:
            yield
            if self.is_complete(case):
                note.unlink(missing_ok=True)
        except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            reason = " ".join(str(error).split())
            self.failed += 1
            with whole_file(note) as temporary:
                temporary.write_text(reason + "\n", encoding="utf-8")
            print(f"{case.id} failed: {reason}")

    def finish(self, cases: list[Case]) -> None:
        """The last line, and exit code 2 if a case failed; under torchrun 0, because it kills all ranks for one's 2."""
        done = sum(map(self.is_complete, cases))
        print(f"{done} of {len(cases)} videos are in {self.folder}, {self.failed} of this process's cases failed")
        if self.failed and self.world == 1:
            raise UserError(f"{self.failed} cases failed: {self.folder}/*.failed.txt say why; run it again to retry")

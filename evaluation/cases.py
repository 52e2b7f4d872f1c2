"""What to make or to score: a list of cases, one JSON object a line.

    {"id": "0001", "reference": "faces/ada.jpg", "prompt": "She turns to the window and smiles.", "seed": 0}

`id` names the files: <id>.mp4 is the video, made by sample.py --batch or by anything else and scored by eval.py.
`reference` is a photo, relative to the list; `seed` is 0 if left out. More keys are ignored: a list may carry notes.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

NAME = re.compile(r"[\w-][\w .+-]*")  # a file's name on every system, not hidden and in no other folder


@dataclass(frozen=True)
class Case:
    """One line. `problem` is None, or why nothing can be made from it."""

    id: str
    reference: Path | None = None  # never None in a list; sample.py without --ref has such a case
    prompt: str = ""
    seed: int = 0
    problem: str | None = None


def read_cases(path: str | Path) -> list[Case]:
    """All cases, in order. A case that is wrong in itself carries its `problem`.

    Raises UserError, naming file and line, where it is unknown which video a line means: no list, no id, one id twice.
    """
    path, cases = Path(path), {}
    if not path.is_file():
        raise UserError(f"no list of cases at {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            case = _case(row, path.parent)
        except (ValueError, TypeError, KeyError):
            raise UserError(f'{path}, line {number}: not a JSON object with an "id" that can name a file') from None
        if case.id in cases:
            raise UserError(f"{path}, line {number}: the id {case.id!r} is there twice")
        cases[case.id] = case
    if not cases:
        raise UserError(f"{path} lists no case")
    return list(cases.values())


def _case(row: dict, folder: Path) -> Case:
    name = row["id"] if isinstance(row["id"], str) else str(int(row["id"]))
    if not NAME.fullmatch(name):
        raise ValueError(name)
    reference, prompt, seed = row.get("reference"), row.get("prompt"), row.get("seed", 0)
    problem = None
    if not isinstance(reference, str) or not reference.strip():
        problem = 'no "reference"'
    elif not isinstance(prompt, str) or not prompt.strip():
        problem = 'the "prompt" is empty'
    elif not isinstance(seed, int) or not 0 <= seed < 2**63:
        problem = f'"seed" {seed!r} is not a whole number'
    if problem:
        return Case(name, problem=problem)
    return Case(name, folder / reference, prompt.strip(), seed)

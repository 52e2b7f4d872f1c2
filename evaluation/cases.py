"""A list of cases to make or to score, one JSON object a line.

    {"id": "0001", "reference": "faces/ada.jpg", "prompt": "She turns to the window and smiles.", "seed": 0}

`id` names the files: <id>.mp4 is the video, made by sample.py --batch or by anything else and scored by eval.py.
`reference` is a photo, its path relative to the list; `seed` is 0 by default. Other keys are ignored.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from common.errors import UserError
from common.schema import Count, Text, foreign_record, validate

NAME = re.compile(r"[\w-][\w .+-]*")  # a file's name on every system, not hidden and in no other folder
LONGEST = 200  # bytes of an id; file systems take names of 255, and suffixes need room


@dataclass(frozen=True)
class Case:
    """One line of a list. `problem`: the reason why it is unusable, or None."""

    id: str
    reference: Path | None = None  # never None in a list; sample.py without --ref has such a case
    prompt: str = ""
    seed: int = 0
    problem: str | None = None


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return text


@foreign_record
class _Content:
    reference: Annotated[Text, AfterValidator(_not_blank)]
    prompt: Annotated[str, AfterValidator(_not_blank), AfterValidator(str.strip)]
    seed: Count = 0


def read_cases(path: str | Path) -> list[Case]:
    """All cases, in order. A case with an unusable reference, prompt, seed or length of id carries its `problem`.

    Raises UserError, with file and line, where the id of a case is missing, unusable or there twice.
    """
    path, cases = Path(path), {}
    if not path.is_file():
        raise UserError(f"no list of cases at {path}")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            case = _read_case(line, f"{path}, line {number}", number, path.parent)
            if case.id in cases:
                raise UserError(f"{path}, line {number}: the id {case.id!r} is there twice")
            cases[case.id] = case
    if not cases:
        raise UserError(f"{path} lists no case")
    return list(cases.values())


def _read_case(line: str, where: str, number: int, folder: Path) -> Case:
    try:
        row = json.loads(line)  # Python's parser: for pydantic's, half an emoji in the prompt spoils the id too
        name = str(row["id"])
        if type(row["id"]) not in (str, int) or not NAME.fullmatch(name):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f'{where}: not a JSON object with an "id" that can name a file') from None
    if len(os.fsencode(name)) > LONGEST:
        return Case(f"line-{number}", problem=f"its id is longer than {LONGEST} bytes")
    try:
        row = {key: row[key] for key in ("reference", "prompt", "seed") if key in row}
        json.dumps(row, ensure_ascii=False).encode()
        content = validate(_Content, row, where)
    except UnicodeEncodeError:
        return Case(name, problem=f"{where}: half a character (a lone surrogate) in the reference or the prompt")
    except (UserError, RecursionError) as error:
        return Case(name, problem=str(error))
    return Case(name, folder / content.reference, content.prompt, content.seed)

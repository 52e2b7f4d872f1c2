"""Data from outside, checked once and by type: options, JSON files, metadata entries.

A frozen dataclass names the fields, their types and their ranges. pydantic compares the data with it (strictly: no
"3" for 3, no true for 1) and its message becomes the user's line, with file and field. pydantic rather than msgspec,
because its dataclasses take ranges, choices and validators that see several fields at once.

        @record                                      options and own files: an unknown field is an error
        class Clip:
            frames: Positive = 121

        @foreign_record                              files of other programs: unknown fields are ignored

        parse_json(Clip, path.read_bytes(), path)    -> Clip, or UserError "cache.json: frames = -1: ..."
        validate(Clip, {"frames": 12}, "cache.json") the same for data in memory
"""

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from common.errors import UserError

T = TypeVar("T")

_STRICT = {"strict": True, "allow_inf_nan": False}
record = partial(dataclass, frozen=True, kw_only=True, config=ConfigDict(extra="forbid", **_STRICT))
foreign_record = partial(dataclass, frozen=True, kw_only=True, config=ConfigDict(extra="ignore", **_STRICT))

LARGEST = 2**63 - 1  # of a whole number, as JSON readers and torch hold one
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e12)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e12)]
FiniteFloat = Annotated[float, Field(ge=-1e12, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*\z")]  # no NUL: no path and no prompt has one


@lru_cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def parse_json(kind: type[T], text: str | bytes, where: str | Path) -> T:
    """JSON text as an object of `kind`, or UserError with `where`, field and reason."""
    try:
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error)}") from None


def validate(kind: type[T], value: Any, where: str | Path) -> T:
    """A dict, list or number as an object of `kind`, by way of JSON: a list serves as a tuple, a dict as a record."""
    try:
        return parse_json(kind, json.dumps(value, default=lambda other: [str(other)]), where)
    except RecursionError:
        raise UserError(f"{where}: nested too deep") from None


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints in one line: field, value, reason."""
    first, *others = error.errors(include_url=False)
    field = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("missing", "missing_argument"):
        line = f"{field} is missing"
    elif first["type"] == "unexpected_keyword_argument":
        line = f"there is no field {field}"
    elif not field:
        line = reason
    else:
        value = repr(first["input"])
        value = value if len(value) <= 80 else value[:77] + "..."
        line = f"{field} = {value}: {reason[0].lower()}{reason[1:]}"
    return line + (f" (and {len(others)} more problems)" if others else "")

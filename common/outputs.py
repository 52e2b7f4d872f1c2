"""Where a command may write: never over a file that it reads, nor into a folder that has other settings."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError

Names = Iterable[str | Path | None]  # None: an option that was not given


def refuse_overwrite(outputs: Names, inputs: Names) -> None:
    """UserError if an output would replace an input, under the same name, through a link, or as a hard link.

    Every command calls it with all its inputs and all its outputs, before the first slow step.
    """
    reads = {key: name for name in inputs if name is not None for key in _keys(name)}
    for output in outputs:
        for key in _keys(output) & reads.keys() if output is not None else ():
            raise UserError(f"{output} would replace {reads[key]}, which is an input: choose another output")


def refuse_folders(*outputs: str | Path | None) -> None:
    """UserError if a folder has the name of an output file; `whole_file` would say so after the work."""
    for output in outputs:
        if output and os.path.isdir(output):
            raise UserError(f"{output} is a folder: name a file")


def _keys(name: str | Path) -> set[str | tuple[int, int]]:
    """The real path of a file and, if it is there, its number on the disk: equal for two names of one file."""
    try:
        path = os.path.realpath(name)
        status = os.stat(name)
    except FileNotFoundError:
        return {path}
    except (OSError, ValueError):  # a name that no file can have
        return {os.path.abspath(name)}
    return {path, (status.st_dev, status.st_ino)}


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], where: str | Path, advice: str) -> None:
    """UserError with the first setting that differs; None stands for a missing one.

    `where` is the folder that the settings belong to, `advice` the way out.
    """
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if old != new:
            raise UserError(f"{where} was begun with {key} = {old} and this run has {new}: {advice}")

"""Where a command may write: never over a file that it reads."""

import os
from collections.abc import Iterable
from pathlib import Path

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

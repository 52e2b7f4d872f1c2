"""Where a command may write: never over a file that it reads."""

import os
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError

Names = Iterable[str | Path | None]  # None: an option that was not given


def refuse_overwrite(outputs: Names, inputs: Names) -> None:
    """Raise UserError if an output would replace an input: the same name, a link to it, or a hard link of it.

    Every command calls it with all its inputs and all its outputs, before the first slow step.
    """
    inputs = [name for name in inputs if name is not None]
    for output in (name for name in outputs if name is not None):
        for name in inputs:
            if _same(output, name):
                raise UserError(f"{output} would replace {name}, which is an input: choose another output")


def _same(a: str | Path, b: str | Path) -> bool:
    if os.path.realpath(a) == os.path.realpath(b):
        return True
    try:
        return os.path.samefile(a, b)
    except OSError:  # one of the two is not there yet
        return False

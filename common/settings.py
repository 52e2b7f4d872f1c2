"""Work that is done in several runs: the later ones must have the settings of the first."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], where: str | Path, advice: str) -> None:
    """UserError with the first setting that differs; None stands for a missing one.

    `where` is the folder that the settings belong to, `advice` the way out.
    """
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if old != new:
            raise UserError(f"{where} was begun with {key} = {old} and this run has {new}: {advice}")

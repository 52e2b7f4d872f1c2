"""Sizes of videos and of memory: checked before they cost anything, printed so that a person can read them."""

import os
from typing import Any

from common.errors import UserError


def require_video_size(settings: dict[str, Any], scale: tuple[int, int, int]) -> None:
    """UserError if a VAE with latent cells of size `scale` cannot take frames, height and width."""
    for name, step, extra in zip(("frames", "height", "width"), scale, (1, 0, 0)):
        value = settings[name]
        if value > 1_000_000:
            raise UserError(f"--{name} {value} is above 1,000,000")
        lower = max((value - extra) // step, 1 - extra) * step + extra
        if value != lower:
            rule = f"{step}k+1" if extra else f"a multiple of {step}"
            raise UserError(f"--{name} {value} is not {rule}: the nearest are {lower} and {lower + step}")


def require_memory(least: int, what: str, advice: str) -> None:
    """UserError if `least` bytes are more than this machine has; called before the memory is taken."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if least > memory:
        raise UserError(f"{what}: at least {amount(least)}, and this machine has {amount(memory)}: {advice}")


def amount(size: float) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"

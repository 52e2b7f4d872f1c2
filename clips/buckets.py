"""Buckets: sizes (height, width, frames) among which a clip takes the one that loses the least of it.

    a clip, upright     1080 x 1920, 7.3 s  ->  175 frames at 24 fps
    scaled and cut      832 x 480           keeps 97 % of the picture
    windows             121 + 49 frames     keep 97 % of the time, where windows = 2; else 121 frames, 69 %

A picture is scaled until it covers the bucket and cut around its centre. Beyond the factor `enlarge` it would be a
blur, so such a bucket is none for the clip.
"""

import math
import re
from functools import partial
from typing import Any

from common.errors import UserError

ASPECTS = (832 / 480, 4 / 3, 1, 3 / 4, 480 / 832)  # width over height: landscape, square, portrait
LENGTHS = (1, 0.8, 0.4)  # in parts of the longest: 121, 97, 49 frames
ENLARGE = 1.5

Size = dict[str, Any]  # height, width, frames


def default_buckets(size: Size, scale: tuple[int, int, int]) -> list[Size]:
    """`size`, the checkpoint's own, and others of about the same number of pixels; `scale` is the VAE's cell."""
    time, rows, columns = scale
    area, cells = size["height"] * size["width"], (size["frames"] - 1) / time
    shapes = [(size["height"], size["width"])]
    for aspect in ASPECTS:
        h, w = int((area / aspect) ** 0.5 / rows), int((area * aspect) ** 0.5 / columns)
        near = [(a * rows, b * columns) for a in (h, h + 1) for b in (w, w + 1) if a and b]
        shapes.append(min(near, key=partial(_misfit, aspect=aspect, area=area)))
    lengths = [round(cells * part) * time + 1 for part in LENGTHS]
    sizes = dict.fromkeys((*shape, frames) for frames in lengths for shape in shapes)
    return [dict(zip(("height", "width", "frames"), size)) for size in sizes]


def _misfit(shape: tuple[int, int], aspect: float, area: float) -> float:
    """How far a (height, width) is from a shape and from an area; the shape counts twice."""
    height, width = shape
    return 2 * abs(math.log(width / height / aspect)) + abs(math.log(height * width / area))


def read_bucket(text: str) -> Size:
    """480x832x121: height, width, frames."""
    if not (match := re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})x([0-9]{1,6})", text)):
        raise UserError(f"--buckets {text!r} is not like 480x832x121: height, width, frames")
    return dict(zip(("height", "width", "frames"), map(int, match.groups())))


def kept_area(bucket: Size, width: int, height: int) -> float:
    """The share of a picture that is left when it is scaled to cover the bucket and cut."""
    ratio = bucket["width"] * height / (bucket["height"] * width)
    return min(ratio, 1 / ratio)


def fitting(buckets: list[Size], width: int, height: int, frames: int, enlarge: float) -> list[int]:
    """The numbers of the buckets that a clip can fill. The first keeps the most of it; of equals, the larger one."""

    def kept(k: int) -> tuple[float, int]:
        return kept_area(buckets[k], width, height) * buckets[k]["frames"], buckets[k]["height"] * buckets[k]["width"]

    def fits(bucket: Size) -> bool:
        factor = max(bucket["width"] / width, bucket["height"] / height)
        return bucket["frames"] <= frames and factor <= enlarge

    return sorted((k for k, bucket in enumerate(buckets) if fits(bucket)), key=kept, reverse=True)


def window(
    number: int, buckets: list[Size], width: int, height: int, frames: int, enlarge: float
) -> tuple[int, list[int]]:
    """First frame of a clip's window `number`, and the buckets that fit the rest of the clip from there on.

    Windows follow each other without a gap. Each takes the best bucket of what its predecessors left.
    """
    first = 0
    for _ in range(number):
        best = fitting(buckets, width, height, frames - first, enlarge)
        first += buckets[best[0]]["frames"] if best else frames
    return first, fitting(buckets, width, height, frames - first, enlarge)

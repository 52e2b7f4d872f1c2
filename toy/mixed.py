"""Drawn clips as a newcomer has them: nine shapes, five lengths, three frame rates, with a manifest.

    python -m toy.mixed --out out/mixed          # 60 videos, their references, manifest.csv
    python prepare.py --manifest out/mixed/manifest.csv --windows 4 --out cache/mixed

The drawn world is square. Its edge is repeated to both sides, so the person stands in the middle of a wall.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import SEED, Parser, one_line_errors, whole, whole_file
from common.media import write_video
from toy.world import toy_clip

SHAPES = ((160, 90), (90, 160), (96, 96), (128, 96), (96, 128), (168, 72), (144, 96), (96, 144), (96, 120))  # w, h
LENGTHS = (0.8, 1.1, 1.5, 3.0, 6.0)  # seconds
RATES = (12, 24, 30)


def mixed_clip(seed: int, index: int) -> dict:
    """A clip as `toy.world.toy_clip`, of the shape, length and rate ("fps") of its index."""
    (width, height), length = SHAPES[index % len(SHAPES)], LENGTHS[index % len(LENGTHS)]
    fps, side = RATES[index % len(RATES)], min(width, height)
    clip = toy_clip(seed, index, round(length * fps), side, fps)
    beside = [((extra := size - side) // 2, extra - extra // 2) for size in (height, width)]
    return clip | {"fps": fps, "frames": np.pad(clip["frames"], ((0, 0), *beside, (0, 0)), mode="edge")}


def write_mixed(out: Path, count: int, seed: int) -> None:
    """The videos and references of `count` clips, and manifest.csv."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        clip = mixed_clip(seed, index)
        video, reference = f"{index:03d}.mp4", f"{index:03d}.png"
        write_video(out / video, clip["frames"], clip["fps"])
        with whole_file(out / reference) as temporary:
            Image.fromarray(clip["reference"]).save(temporary)
        rows.append((video, clip["caption"], reference))
    with whole_file(out / "manifest.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video", "caption", "reference"), *rows])


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the clips")
    parser.add_argument("--count", type=whole(), default=60, help="number of clips (%(default)s)")
    parser.add_argument("--seed", type=SEED, default=0, help="other people and scenes (%(default)s)")
    options = parser.parse_args()
    write_mixed(Path(options.out), options.count, options.seed)
    print(f"wrote {options.count} clips into {options.out}")


if __name__ == "__main__":
    with one_line_errors():
        main()

"""The examples in assets/: a portrait for sample.py, and four clips of the drawn world to prepare and to score.

    python -m toy.examples               # into out/examples
    python -m toy.examples --publish     # into assets/

All people, prompts and pairs of motion and color are of the test split.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import Parser, one_line_errors
from common.media import write_video
from config import ASSETS
from toy.portrait import render
from toy.world import person, reference, toy_clip

SEED, FRAMES, SIZE, FPS = 0, 17, 64, 12.0
WHO = 7  # number of the person in face.png
CLIPS = 13, 29, 28, 17  # numbers of clips with motions that the tiny model knows
PHOTO = 128  # pixels


def make_clips(folder: Path) -> None:
    """The clips with their photos as a manifest for prepare.py and as cases for sample.py --batch and eval.py."""
    manifest, cases = "video,caption,reference\n", ""
    for k, number in enumerate(CLIPS):
        clip = toy_clip(SEED, number, FRAMES, SIZE, FPS, "test")
        write_video(folder / f"{k}.mp4", clip["frames"], FPS)
        photo = render(clip["identity"], clip["reference_scene"], PHOTO)[0]
        Image.fromarray(photo).save(folder / f"{k}.png", optimize=True)
        manifest += f'{k}.mp4,"{clip["caption"]}",{k}.png\n'
        cases += json.dumps({"id": str(k), "reference": f"{k}.png", "prompt": clip["caption"], "seed": k}) + "\n"
    (folder / "manifest.csv").write_text(manifest)
    (folder / "cases.jsonl").write_text(cases)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/examples", help="folder (%(default)s)")
    parser.add_argument("--publish", action="store_true", help="replace the examples in assets/ instead")
    options = parser.parse_args()
    out = ASSETS if options.publish else Path(options.out)
    (out / "clips").mkdir(parents=True, exist_ok=True)
    portrait, _ = reference(person(SEED, WHO, "test"), np.random.default_rng(WHO), 256)  # larger than the models see it
    Image.fromarray(portrait).save(out / "face.png", optimize=True)
    make_clips(out / "clips")
    print(f"wrote {out / 'face.png'} and {out / 'clips'}")


if __name__ == "__main__":
    with one_line_errors():
        main()

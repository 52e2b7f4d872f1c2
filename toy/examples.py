"""Make the example face of the drawn world, and four clips of other drawings to prepare and to score.

    python -m toy.examples

The models in assets/ are made by tiny.py.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.media import write_video
from toy.world import person, reference


def draw_face(size: int, look: dict[str, str], turn: float = 0.0, smile: float = 0.5, x: float = 0.0) -> Image.Image:
    """A drawn portrait, free of anyone's rights: the head turned by `turn` in [-1, 1] and moved by `x` percent."""
    over = 4 if size < 256 else 2  # drawn larger on a 100 x 100 grid, then reduced
    image = Image.new("RGB", (over * size, over * size), look["background"])
    draw = ImageDraw.Draw(image)
    u = over * size / 100

    def box(cx: float, cy: float, rx: float, ry: float) -> list[float]:
        return [(cx + x - rx) * u, (cy - ry) * u, (cx + x + rx) * u, (cy + ry) * u]

    def ellipse(cx: float, cy: float, rx: float, ry: float, color: str) -> None:
        draw.ellipse(box(cx, cy, rx, ry), fill=color)

    shift = 6 * turn  # features slide across the head when it turns
    ellipse(50 - shift / 2, 46, 31, 36, look["hair"])
    ellipse(50 - x, 112, 42, 32, look["shirt"])
    draw.rounded_rectangle(box(50, 81, 8, 11), 6 * u, fill=look["shade"])
    for side in (-1, 1):
        ellipse(50 + 25 * side - shift / 2, 52, 4, 6.5, look["shade"])
    ellipse(50, 50, 24.5, 31, look["skin"])
    draw.chord(box(50, 35, 26, 21), 180, 360, fill=look["hair"])
    ellipse(50 + shift / 2, 40, 22, 8, look["skin"])
    for side in (-1, 1):
        eye = 50 + 9.5 * side + shift
        ellipse(eye, 48, 5.2, 3.2, "white")
        ellipse(eye + shift / 4, 48, 2.6, 2.9, look["eyes"])
        ellipse(eye + shift / 4, 48, 1.2, 1.3, "#101010")
        draw.arc(box(eye, 43, 6, 4), 200, 340, fill=look["hair"], width=round(1.3 * u))
    nose = [(50 + shift, 49), (47.5 + 1.6 * shift, 59), (51 + shift, 60)]
    draw.line([((px + x) * u, py * u) for px, py in nose], fill=look["shade"], width=round(0.9 * u))
    draw.chord(box(50 + shift, 66.5, 9, 3 + 5 * smile), 10, 170, fill="#b3474a")
    ellipse(62.5 + shift, 61, 0.9, 0.9, "#7a4a33")  # a mole
    return image.resize((size, size), Image.Resampling.LANCZOS)


ASSETS = Path(__file__).parent.parent / "assets"
FPS = 12.0
WHO = 7  # of the test split, in face.png
LOOKS = [
    {
        "skin": "#e8b794",
        "shade": "#d79f7d",
        "hair": "#5a3022",
        "eyes": "#3f7d58",
        "shirt": "#31576f",
        "background": "#c9d6df",
    },
    {
        "skin": "#c98d62",
        "shade": "#a8704a",
        "hair": "#1f1a1a",
        "eyes": "#5a3a22",
        "shirt": "#6d7f3a",
        "background": "#5f9ea0",
    },
    {
        "skin": "#f0c9ac",
        "shade": "#d9a98c",
        "hair": "#c8a04a",
        "eyes": "#4a7fb5",
        "shirt": "#7a3b4f",
        "background": "#8fa3c8",
    },
    {
        "skin": "#d9a27e",
        "shade": "#b8805d",
        "hair": "#8f8f93",
        "eyes": "#6b6b52",
        "shirt": "#2f2f3a",
        "background": "#a7c4a0",
    },
]
CLIPS = [  # caption, and (turn, smile, x) at the start and at the end of the clip
    ("A woman with brown hair turns her head to the right.", (-0.8, 0.4, 0), (0.8, 0.4, 0)),
    ("A man with black hair begins to smile in front of a teal wall.", (0.1, 0.0, 0), (0.1, 1.0, 0)),
    ("A blond woman moves to the right before a light blue background.", (0, 0.5, -14), (0, 0.5, 14)),
    ("A grey-haired man turns to the left and stops smiling.", (0.8, 1.0, 0), (-0.8, 0.1, 0)),
]


def make_clips(folder: Path, frames: int = 17, size: int = 64) -> None:
    """Four short clips and a photo of each face, to try training on, and the same as cases to sample and to score."""
    folder.mkdir(exist_ok=True)
    lines, cases = ["video,caption,reference"], []
    for k, (look, (caption, start, end)) in enumerate(zip(LOOKS, CLIPS)):
        way = np.linspace(start, end, frames)
        clip = np.stack([np.asarray(draw_face(size, look, turn, smile, x)) for turn, smile, x in way])
        write_video(folder / f"{k}.mp4", clip, FPS)
        draw_face(128, look | {"background": "#9fb2cc"}).save(folder / f"{k}.png", optimize=True)
        lines.append(f'{k}.mp4,"{caption}",{k}.png')
        cases.append(json.dumps({"id": str(k), "reference": f"{k}.png", "prompt": caption, "seed": k}))
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    (folder / "cases.jsonl").write_text("\n".join(cases) + "\n")


def make_face(path: Path) -> None:
    """The portrait of somebody the models were not trained on, larger than they see it."""
    portrait, _ = reference(person(0, WHO, "test"), np.random.default_rng(WHO), 256)
    Image.fromarray(portrait).save(path, optimize=True)


if __name__ == "__main__":
    make_face(ASSETS / "face.png")
    make_clips(ASSETS / "clips")
    for made in sorted([ASSETS / "face.png", *(ASSETS / "clips").iterdir()]):
        print(f"{made.relative_to(ASSETS.parent)}  {made.stat().st_size:,} bytes")

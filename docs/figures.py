"""README's figures.

python docs/figures.py           # out/tass.png: rotary coordinates of video and reference tokens, by placement
python docs/figures.py --hero    # out/hero.gif: three people, three prompts, by the embedded model
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # isort: skip  # noqa: F401 (before torch: sets the wait policy of its threads)

import argparse
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw

from common.errors import Parser, UserError, one_line_errors, whole_file
from common.media import write_video
from config import ASSETS
from rope import PLACEMENTS

TITLES = {
    "tass": "TASS-RoPE (the paper's): reference at (T, h+i, w+j)\nT, h, w = {}, {}, {} latent cells",
    "overlap": "overlap: (0, i, j)\ncollides with frame 0",
    "temporal": "temporal: (T, i, j)\nsame place in space: copy-paste",
    "fixed": "fixed: (100, h+i, w+j)\ngap depends on the length",
    "remote": "remote: (T+100, h+i, w+j)\ntoo far to pass on detail",
}


def draw(path: str, frames: int = 16, height: int = 15, width: int = 26) -> None:
    """Video and reference tokens in the same axes, for TASS and for the rejected placements."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    def box(ax, origin: tuple[int, int, int], size: tuple[int, int, int], color: str) -> None:
        """A block of latent cells as a shaded box; matplotlib's axes are (time, width, height)."""
        (t, h, w), (dt, dh, dw) = origin, size
        corners = np.indices((2, 2, 2))
        x, y, z = (start + corner * length for start, corner, length in zip((t, w, h), corners, (dt, dw, dh)))
        ax.voxels(x, y, z, np.ones((1, 1, 1), bool), facecolors=color, edgecolors="#00000060", linewidth=0.6)

    figure = Figure((13, 6.2))
    layout = figure.add_gridspec(2, 4, width_ratios=[1.25, 1.25, 1, 1], wspace=0.12, hspace=0.22)
    places = layout[:, :2], layout[0, 2], layout[0, 3], layout[1, 2], layout[1, 3]
    for (name, title), place in zip(TITLES.items(), places):
        ax = figure.add_subplot(place, projection="3d", proj_type="ortho")
        origin, main = PLACEMENTS[name](frames, height, width), name == "tass"
        if main:
            for t in range(frames):
                box(ax, (t, 0, 0), (1, height, width), "#4c78a838")
            ax.set(xlabel="time t (latent frames)", ylabel="width j", zlabel="height i")
        else:
            start = int(name == "overlap")  # the two would hide each other
            box(ax, (start, 0, 0), (frames - start, height, width), "#4c78a870")
        box(ax, origin, (1, height, width), "#f58518d0")
        ax.set(xlim=(0, max(frames, origin[0]) + 2), ylim=(0, 2 * width), zlim=(2 * height, 0))
        ax.view_init(elev=18, azim=-58)
        ax.set_box_aspect((1.5, 1.25, 1.0), zoom=1.0)
        ax.set_title(title.format(frames, height, width), fontsize=12 if main else 9)
        far = [origin[0]] if origin[0] > frames else []
        ax.set_xticks([0, frames, *far], ["0", "T"] if main else None)
        ax.set_yticks([0, width, 2 * width], ["0", "w", "2w"])
        ax.set_zticks([0, height, 2 * height], ["0", "h", "2h"])
        ax.tick_params(labelsize=8)
    handles = [Rectangle((0, 0), 1, 1, color=c) for c in ("#4c78a8", "#f58518")]
    names = ["video tokens", "reference tokens"]
    figure.legend(handles, names, loc="lower left", bbox_to_anchor=(0.2, 0.1), ncols=2, frameon=False, fontsize=11)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


PROMPTS = [  # the first one is README's
    "A person walks by to the left in front of a teal wall.",
    "A person in a red shirt tilts the head to the right. Behind is a yellow background.",
    "A person turns the head to the left in front of a purple wall.",
]


def draw_hero(path: str, people: int = 3, side: int = 64) -> None:
    """A GIF of the first people of seed 0 of toy/judge.py, all videos with the same noise: people down, prompts across,
    and a last row without a photo."""
    from toy.judge import cases, make_videos, recipe_of

    ckpt, photos = ASSETS / "tiny.safetensors", [clip["reference"] for clip in cases(0, people)]
    prompts, recipe, place = len(PROMPTS), recipe_of(ckpt), (torch.device("cpu"), torch.float32)
    rows = []
    for photo in (*photos, None):
        given, how = None if photo is None else [photo] * prompts, ([0] * prompts, recipe, *place)
        texts = [{"caption": prompt} for prompt in PROMPTS]
        rows.append(make_videos(ckpt, ASSETS / "gemma", texts, given, *how))  # (prompts, F, H, W, 3)
    row, column, head, pages = side + 3, 5 * side // 2, 52, []
    for frame in range(recipe.frames):
        page = Image.new("RGB", (side + prompts * column, head + (people + 1) * row), "white")
        draw = ImageDraw.Draw(page)
        for j in range(prompts):
            text = "\n".join(textwrap.wrap(PROMPTS[j], 30))
            draw.text((side + j * column + column // 2, 2), text, "black", anchor="ma", font_size=10, align="center")
        for i, videos in enumerate(rows):
            pictures = [(side + j * column + (column - side) // 2, videos[j, frame]) for j in range(prompts)]
            for x, pixels in [*([(0, photos[i])] if i < people else []), *pictures]:
                page.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS), (x, head + i * row))
        draw.text((side // 2, head + people * row + side // 2), "no photo", "black", anchor="mm", font_size=12)
        pages.append(np.asarray(page))
    write_video(path, np.stack(pages), recipe.fps)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hero", action="store_true", help="draw README's first picture instead (out/hero.gif)")
    parser.add_argument("--out", help="the picture to write (out/tass.png)")
    options = parser.parse_args()
    out = Path(options.out or ("out/hero.gif" if options.hero else "out/tass.png"))
    if out.suffix != (suffix := ".gif" if options.hero else ".png"):
        raise UserError(f"--out {out} does not end in {suffix}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as temporary:
        (draw_hero if options.hero else draw)(str(temporary))
    print(f"wrote {out}")


if __name__ == "__main__":
    with one_line_errors():
        main()

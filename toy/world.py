"""A world of drawn faces: identity, scene and caption of every clip are known exactly.

ST-DRC must learn to keep the identity of a reference and to drop everything else in it. Here identity and scene are
drawn independently, so both can be measured:

    identity (traits.py) ──┬──> reference: a portrait in a scene of its own
                           ├──> frames (F, H, W, 3), landmarks (F, 5, 2), boxes (F, 4)      (portrait.py)
    scene (traits.py) ─────┴──> caption: "Someone nods, then smiles against a teal backdrop."

A `Temptation` ties training references to their clips, as in practice: a frame of the same clip, or another moment of
the same scene. A model that copies such a reference lowers its loss.

    python -m toy.world            # out/toy.png: people by scenes; out/toy.gif: clips and their captions
"""

import argparse
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from common.errors import SEED, Parser, UserError, one_line_errors, whole_file
from common.outputs import refuse_folders
from common.schema import Share, record
from toy.portrait import boxes, landmarks, render
from toy.traits import COLORS, Identity, Scene, draw_identity

# --- Motion -----------------------------------------------------------------------------------------------------------

BACKGROUNDS = {"plain": 0.7, "gradient": 0.14, "circles": 0.08, "stripes": 0.08}
# Pose at rest: (mean, standard deviation, least, most), in degrees, in parts of the frame, or from 0 to 1. A shift by
# two pixels changes the tiny VAE's latents more than half as much as another person does: the smaller the deviations,
# the sooner a small model learns identity and motion.
POSE = {"yaw": (0, 6, -36, 36), "pitch": (0, 3.5, -20, 20), "roll": (0, 1.5, -15, 15)}
POSE |= {"x": (0, 0.008, -0.3, 0.3), "y": (0, 0.006, -0.05, 0.05), "scale": (1, 0.025, 0.7, 1.35)}
POSE |= {"smile": (0.1, 0.3, -1, 1)}  # -1: a frown
POSE |= {"open": (0, 0.08, 0, 1), "closed": (0, 0.04, 0, 1), "brows": (0, 0.2, -1, 1)}  # mouth, eyes, brows


@dataclass(frozen=True)
class Move:
    """A motion: the part of the pose that changes, its course, and its phrases in captions."""

    track: str
    course: str  # "to": from start to start + change; "swing": to both sides of start; "pulse": there and back
    start: tuple[float, float]
    change: tuple[float, float]
    says: tuple[str, ...]
    direction: str = ""


def _both_ways(name: str, track: str, start: tuple, change: tuple, sides: tuple, says: tuple) -> dict[str, Move]:
    """A motion to either side. The numbers are those of the second side; the first side gets them mirrored."""
    moves = {}
    for side, sign in zip(sides, (-1, 1)):
        ends = [tuple(sorted((sign * low, sign * high))) for low, high in (start, change)]
        moves[f"{name} {side}"] = Move(track, "to", *ends, tuple(text.format(side) for text in says), side)
    return moves


SIDES = "left", "right"  # of the picture
MOVES = {
    "smile": Move("smile", "to", (-0.3, 0), (0.9, 1), ("smiles", "breaks into a smile", "starts to smile")),
    "frown": Move("smile", "to", (0.1, 0.4), (-1.2, -1), ("frowns", "starts to frown", "makes a sad face")),
    "blink": Move("closed", "pulse", (0, 0), (1, 1), ("blinks", "closes both eyes for a moment", "blinks slowly")),
    "open mouth": Move("open", "to", (0, 0), (0.75, 1), ("opens the mouth", "opens the mouth wide", "gapes")),
    "raise brows": Move("brows", "to", (-0.3, 0), (0.9, 1), ("raises the eyebrows", "lifts both eyebrows")),
    "nod": Move("pitch", "swing", (-2, 2), (-16, -12), ("nods", "nods the head", "gives a nod")),
    "shake": Move("yaw", "swing", (-3, 3), (18, 26), ("shakes the head", "shakes the head to say no")),
    "come closer": Move("scale", "to", (0.76, 0.84), (0.4, 0.5), ("comes closer", "moves toward the camera")),
    "back away": Move("scale", "to", (1.2, 1.3), (-0.5, -0.4), ("backs away", "moves away from the camera")),
    **_both_ways("turn", "yaw", (-8, 0), (26, 34), SIDES, ("turns {}", "turns the head to the {}", "faces {}")),
    **_both_ways("look", "pitch", (-4, 0), (15, 20), ("down", "up"), ("looks {}", "tips the head {}", "gazes {}")),
    **_both_ways("tilt", "roll", (-3, 0), (11, 15), SIDES, ("tilts the head {}", "leans the head to the {}")),
    **_both_ways("walk", "x", (-0.2, -0.14), (0.28, 0.4), SIDES, ("walks {}", "walks by to the {}", "moves {}")),
}


def held_out(motion: str, color: str) -> bool:
    """True for the fifth of all pairs (motion, background color) that the training split never shows."""
    return (list(MOVES).index(motion) + 2 * list(COLORS).index(color)) % 5 == 0


def draw_scene(
    rng: np.random.Generator, frames: int, fps: float = 24.0, split: str = "train", moving: bool = True
) -> Scene:
    """The scene of a clip with one or two motions, or with `moving` false of a portrait. `split`: see `held_out`."""
    count = (1 + int(rng.random() < 0.4)) * moving
    joined = str(rng.choice(["and", "then"])) if count == 2 else ""
    while True:
        motions = tuple(str(m) for m in rng.choice(list(MOVES), count, replace=False))
        color, second, shirt = (str(c) for c in rng.choice(list(COLORS), 3, replace=False))
        possible = len({MOVES[m].track for m in motions}) == count  # two motions never share a part of the pose
        if possible and all(held_out(m, color) == (split == "test") for m in motions):
            break
    pose, s = {}, np.linspace(0, 1, frames)
    for track, (mean, deviation, _, _) in POSE.items():  # a slow drift about the place of rest
        drift = 0.3 * np.sin(2 * np.pi * (rng.random() + rng.uniform(0.3, 0.7) * s))
        pose[track] = mean + deviation * (np.clip(rng.normal(), -2.5, 2.5) + drift)
    for k, motion in enumerate(motions):
        move, seconds = MOVES[motion], frames / fps / (2 if joined == "then" else 1)
        t = np.clip((2 * s - k if joined == "then" else s) * 1.1 - 0.05, 0, 1)
        t, times = t * t * (3 - 2 * t), max(1, round(seconds / 1.5))
        course = {"to": t, "swing": np.sin(2 * np.pi * times * t), "pulse": np.sin(np.pi * times * t) ** 2}
        pose[move.track] = rng.uniform(*move.start) + rng.uniform(*move.change) * course[move.course]
        if move.track == "x":  # steps
            pose["y"] = pose["y"] + 0.006 * np.cos(4 * np.pi * max(1, round(2 * seconds)) * s)
    pose = {track: np.clip(values, *POSE[track][2:]) for track, values in pose.items()}
    background = str(rng.choice(list(BACKGROUNDS), p=list(BACKGROUNDS.values())))
    layout, angle = (rng.random(), rng.random()), rng.uniform(-np.pi, 0)
    light = float(angle), float(rng.uniform(0.08, 0.32)), float(rng.uniform(-1, 1))
    return Scene(pose, motions, joined, background, color, second, layout, shirt, light)


def scene_vector(scene: Scene) -> np.ndarray:
    """The scene of each frame as numbers of about unit size, (F, 23): pose; direction, strength, warmth of the light;
    colors of background and shirt; one-hot kind of the background (gradient, circles, stripes)."""
    pose = np.stack([(scene.pose[k] - mean) / (most - mean) for k, (mean, _, _, most) in POSE.items()], 1)
    angle, strength, warmth = scene.light
    rest = [np.cos(angle), np.sin(angle), strength * 3, warmth, *COLORS[scene.color] / 255, *COLORS[scene.shirt] / 255]
    rest += [scene.background == kind for kind in list(BACKGROUNDS)[1:]]
    return np.concatenate([pose, np.tile(rest, (len(scene), 1))], 1).astype(np.float32)


# --- Words ------------------------------------------------------------------------------------------------------------

PERSON = ("a person", "someone", "somebody", "one person", "a cartoon person")
DOTS = ("a {0} background with {1} circles", "a {0} wall with {1} dots", "a {0} background dotted with {1} circles")
LINES = ("a {0} background with {1} stripes", "a {0} wall with {1} stripes", "a {0} background striped with {1}")
BEHIND = {
    "plain": ("a {0} background", "a plain {0} background", "a {0} wall", "a {0} backdrop"),
    "gradient": ("a background fading from {0} to {1}", "a {0} to {1} gradient", "a {0} wall that fades to {1}"),
    "circles": DOTS,
    "stripes": LINES,
}
FORMS = {
    "train": "{who} {does} in front of {behind}. | {who} {does} against {behind}. | "
    "{who} {does}; behind is {behind}. | in front of {behind}, {who} {does}. | against {behind}, {who} {does}. | "
    "a portrait video of {who} who {does}, with {behind}. | the video shows how {who} {does} before {behind}. | "
    "{who} in a {shirt} shirt {does} in front of {behind}. | before {behind}, {who} wearing a {shirt} shirt {does}. | "
    "{who} in a {shirt} shirt {does} against {behind}. | behind is {behind}; {who} in a {shirt} shirt {does}. | "
    "there is {who} with a {shirt} shirt who {does}, and {behind} behind. | "
    "{who} {does}, and behind is {behind}. | {behind}; before it {who} {does}. | "
    "there is {who} who {does}, and {behind} behind. | a clip with {behind} and {who} who {does}.",
    "test": "{behind}, and in front of it {who} {does}. | a short clip: {who} {does}, behind is {behind}. | "
    "there is {behind} as {who} in a {shirt} shirt {does}.",
}
TEMPLATES = {split: tuple(text.split(" | ")) for split, text in FORMS.items()}


def caption(scene: Scene, rng: np.random.Generator, split: str = "train") -> str:
    """A sentence that names motions and background, and never the identity."""
    link = ", then " if scene.joined == "then" else " and "
    does = link.join(str(rng.choice(MOVES[m].says)) for m in scene.motions) or "looks on"
    behind = str(rng.choice(BEHIND[scene.background])).format(scene.color, scene.second)
    who, form = str(rng.choice(PERSON)), str(rng.choice(TEMPLATES[split]))
    text = form.format(who=who, does=does, behind=behind, shirt=scene.shirt).replace("a orange", "an orange")
    return text[0].upper() + text[1:]


# --- Clips ------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "test")


def _rng(seed: int, split: str, number: int, part: int) -> np.random.Generator:
    """An independent stream for each part of a clip: person 0, scene 1, reference 2, words 3, temptation 4."""
    # the first 2 separates these streams from those in data.py
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, SPLITS.index(split), number, part)))


def person(seed: int, number: int, split: str = "train") -> Identity:
    """Person `number` of a split, of endlessly many. The splits share no person."""
    return draw_identity(_rng(seed, split, number, 0))


def reference(who: Identity, rng: np.random.Generator, size: int = 64) -> tuple[np.ndarray, Scene]:
    """A portrait (size, size, 3) and its scene, which is independent of every clip's."""
    scene = draw_scene(rng, 1, moving=False)
    return render(who, scene, size)[0], scene


@record
class Temptation:
    """The share of training references that belong to their clip, and how; all others are drawn apart from it."""

    reference: Literal["apart", "same clip", "same scene"] = "apart"
    share: Share = 0.0


APART = Temptation()


def tempting_scene(temptation: Temptation, scene: Scene, portrait: Scene, rng: np.random.Generator) -> Scene:
    """The scene of a clip's reference, drawn from the clip's own `scene` or, independent of it, `portrait`."""
    # chance first, frame second: a larger share tempts the same clips and further ones
    if temptation.reference == "apart" or rng.random() >= temptation.share:
        return portrait
    if temptation.reference == "same clip":
        frame = int(rng.integers(len(scene)))
        return replace(scene, pose={track: values[frame : frame + 1] for track, values in scene.pose.items()})
    return replace(scene, pose=portrait.pose, motions=(), joined="")  # another moment: same background, shirt, light


def toy_words(seed: int, index: int, frames: int = 17, fps: float = 24, split: str = "train") -> str:
    """The caption of clip `index`, without drawing it."""
    scene = draw_scene(_rng(seed, split, index, 1), frames, fps, split)
    return caption(scene, _rng(seed, split, index, 3), split)


def toy_clip(
    seed: int,
    index: int,
    frames: int = 17,
    size: int = 64,
    fps: float = 24,
    split: str = "train",
    number: int = -1,
    temptation: Temptation = APART,
) -> dict[str, Any]:
    """Clip `index` of an endless data set, with its truth. `number`: the person; a new one if negative."""
    if split == "test" and temptation != APART:
        raise ValueError("references of the test split are independent of their clips")
    identity = person(seed, index if number < 0 else number, split)
    scene = draw_scene(_rng(seed, split, index, 1), frames, fps, split)
    portrait_scene = draw_scene(_rng(seed, split, index, 2), 1, moving=False)
    portrait_scene = tempting_scene(temptation, scene, portrait_scene, _rng(seed, split, index, 4))
    return {
        "frames": render(identity, scene, size),  # (F, H, W, 3) bytes
        "reference": render(identity, portrait_scene, size)[0],  # (H, W, 3) bytes
        "caption": toy_words(seed, index, frames, fps, split),
        "identity": identity,
        "scene": scene,
        "reference_scene": portrait_scene,
        "landmarks": landmarks(identity, scene, size),  # (F, 5, 2)
        "boxes": boxes(identity, scene, size),  # (F, 4)
        "reference_landmarks": landmarks(identity, portrait_scene, size)[0],  # (5, 2)
        "reference_box": boxes(identity, portrait_scene, size)[0],  # (4,)
    }


def sheet(seed: int, people: int = 8, scenes: int = 8, size: int = 128) -> Image.Image:
    """A row for each person, a column for each scene."""

    def portrait(row: int, column: int) -> np.ndarray:
        return reference(person(seed, row), np.random.default_rng((seed, column)), size)[0]

    rows = [np.concatenate([portrait(row, column) for column in range(scenes)], 1) for row in range(people)]
    return Image.fromarray(np.concatenate(rows))


def animation(seed: int, clips: int = 8, frames: int = 49, fps: float = 24.0, size: int = 160) -> list[Image.Image]:
    """Clips in two rows, each with its caption below."""
    films = [toy_clip(seed, k, frames, size, fps) for k in range(clips)]
    columns, cell, pages = (clips + 1) // 2, size + 76, []
    for f in range(frames):
        page = Image.new("RGB", (columns * size, 2 * cell), "white")
        for k, clip in enumerate(films):
            x, y = k % columns * size, k // columns * cell
            page.paste(Image.fromarray(clip["frames"][f]), (x, y))
            text = "\n".join(textwrap.wrap(clip["caption"], size // 6))
            ImageDraw.Draw(page).text((x + 3, y + size + 1), text, fill="black", font_size=11)
        pages.append(page)
    return pages


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/toy.png", help="people by scenes (%(default)s)")
    parser.add_argument("--gif", default="out/toy.gif", help="clips with their captions (%(default)s)")
    parser.add_argument("--seed", type=SEED, default=0)
    options = parser.parse_args()
    refuse_folders(options.out, options.gif)
    if Path(options.out).suffix != ".png" or Path(options.gif).suffix != ".gif":
        raise UserError("--out ends in .png and --gif in .gif")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.gif).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(options.out) as temporary:
        sheet(options.seed).save(temporary)
    first, *rest = animation(options.seed)
    with whole_file(options.gif) as temporary:
        first.save(temporary, save_all=True, append_images=rest, duration=1000 / 24, loop=0)
    print(f"wrote {options.out} and {options.gif}")


if __name__ == "__main__":
    with one_line_errors():
        main()

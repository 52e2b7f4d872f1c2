"""Does a video of the drawn world follow its prompt? Motion and shirt are tested in the scene vectors that toy/eye.py
reads from the frames, background in the colors at the border.

Letters: F frames, H W their size. A scene vector is a row of world.scene_vector.
"""

import numpy as np

from toy import world as toy
from toy.eye import SCENE
from toy.traits import COLORS, Scene

PART = 0.5  # threshold of a motion, as a part of the renderer's least change
EDGE = 5  # width of the border that shows the background, pixels
CORNER = 1 / 4  # side of a corner that shows the background, as a part of the frame


def moves(scene: np.ndarray, motion: str) -> bool:
    """Whether a clip with these scene vectors (F, 23) shows the motion.

    With a, b the means of the first two and of the last two frames of the motion's track (in the units of world.POSE)
    and c the renderer's least change:
        "to"            sign(c) (b - a) >= PART |c|
        swing, pulse    (largest - smallest) - |b - a| >= PART |c|, of a swing PART 2 |c|; a motion that does not
                        return fails

    On 160 drawn clips with PART = 0.5 it recognizes every turn, look, tilt, walk, nod, shake, blink and step, 9 of 10
    smiles and open mouths, 3 of 4 frowns, and 4 of 10 raised brows (hair hides them). At most 1.3 % of the clips
    without a motion pass its test. So compare a model's share with that of drawn clips.
    """
    move = toy.MOVES[motion]
    mean, _, _, most = toy.POSE[move.track]
    track = scene[:, SCENE.index(move.track)] * (most - mean) + mean  # (F,)
    least, change = min(move.change, key=abs), track[-2:].mean() - track[:2].mean()
    if move.course == "to":
        return bool(np.sign(least) * change >= PART * abs(least))
    return bool(np.ptp(track) - abs(change) >= PART * abs(least) * (2 if move.course == "swing" else 1))


def shares(frames: np.ndarray, corner: bool) -> dict[str, float]:
    """Color's name -> share of the border's pixels that are nearest to it. frames (F, H, W, 3) bytes.

    The border is the top and the upper half of the sides. corner: only the upper left, where both kinds of gradient
    begin.
    """
    (height, width), edge = frames.shape[1:3], round(EDGE * frames.shape[1] / 64)
    mask = np.zeros((height, width), bool)
    if corner:
        mask[: 2 * edge, : 2 * edge] = True
    else:
        mask[:edge] = mask[: height // 2, :edge] = mask[: height // 2, -edge:] = True
    pixels = frames[:, mask].reshape(-1, 1, 3).astype(np.float32)
    nearest = np.square(pixels - np.stack([*COLORS.values()]).astype(np.float32)).sum(-1).argmin(1)
    return dict(zip(COLORS, np.bincount(nearest, minlength=len(COLORS)) / len(nearest)))


def shows_background(frames: np.ndarray, scene: Scene) -> bool:
    """Whether the most frequent color of the border is the one that the prompt names first."""
    by_color = shares(frames, corner=scene.background == "gradient")
    return max(by_color, key=by_color.get) == scene.color


def shows_shirt(scenes: np.ndarray, scene: Scene) -> bool:
    """Whether the shirt's color in a clip with these scene vectors (F, 23) is nearest to the prompt's. It recognizes
    the shirt of 60 of 60 drawn clips."""
    color = scenes[:, [SCENE.index(f"shirt {part}") for part in ("red", "green", "blue")]].mean(0)
    return min(COLORS, key=lambda name: np.square(COLORS[name] / 255 - color).sum()) == scene.shirt


def grain(frames: np.ndarray) -> float:
    """Mean absolute difference of neighboring pixels in the two upper corners, in steps of 255. A plain background has
    0; noise and the seams of tokens add to it. frames (F, H, W, 3) bytes."""
    height, width = (round(side * CORNER) for side in frames.shape[1:3])
    corners = np.stack([frames[:, :height, :width], frames[:, :height, -width:]]).astype(np.float32)
    return float(np.mean([np.abs(np.diff(corners, axis=axis)).mean() for axis in (2, 3)]))

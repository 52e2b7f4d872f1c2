"""Does a video of the drawn world show what its prompt asked for? The motion, in what eye.py reads from each frame; the
background, in the colors at the border.

F frames, H, W their size; a scene vector is toy.scene_vector's row.
"""

import numpy as np

from toy import world as toy
from toy.eye import SCENE
from toy.traits import COLORS, Scene

PART = 0.5  # of the least change that the renderer makes of a motion: what counts as that motion
EDGE = 5  # pixels of the border in which the background is looked for


def track(scene: np.ndarray, name: str) -> np.ndarray:
    """A pose of the scene vectors (F, 23), in the units of toy.POSE: (F,)."""
    mean, _, _, most = toy.POSE[name]
    return scene[:, SCENE.index(name)] * (most - mean) + mean


def moves(scene: np.ndarray, motion: str) -> bool:
    """Does a clip with these scene vectors (F, 23) show the motion?

    With a, b the means of the pose's first two and last two frames and c the least change that the renderer makes,
        "to"            sign(c) (b - a) >= PART |c|
        swing, pulse    (largest - smallest) - |b - a| >= PART |c|, of a swing 2 |c|: there and back, not there only

    Measured on 160 drawn clips with PART = 0.5: every turn, look, tilt, walk, nod, shake, blink and step is recognized,
    9 of 10 smiles and open mouths, 3 of 4 frowns, but only 4 of 10 raised brows (hair hides them); at most 1.3 % of the
    clips without a motion are said to show it. So a model's share of motions is to be read against the drawn clips'.
    """
    move, values = toy.MOVES[motion], track(scene, toy.MOVES[motion].track)
    least = min(move.change, key=abs)
    change = values[-2:].mean() - values[:2].mean()
    if move.course == "to":
        return bool(np.sign(least) * change >= PART * abs(least))
    least = 2 * least if move.course == "swing" else least
    return bool(np.ptp(values) - abs(change) >= PART * abs(least))


def shares(frames: np.ndarray, corner: bool) -> dict[str, float]:
    """Of the border's pixels (the top and the upper half of the sides), which share is nearest to each color's name.

    corner: only the upper left, where both kinds of gradient begin. frames (F, H, W, 3) bytes.
    """
    height, width = frames.shape[1:3]
    edge = round(EDGE * height / 64)
    mask = np.zeros((height, width), bool)
    if corner:
        mask[: 2 * edge, : 2 * edge] = True
    else:
        mask[:edge] = mask[: height // 2, :edge] = mask[: height // 2, -edge:] = True
    pixels = frames[:, mask].reshape(-1, 1, 3).astype(np.float32)
    nearest = np.square(pixels - np.stack([*COLORS.values()]).astype(np.float32)).sum(-1).argmin(1)
    return dict(zip(COLORS, np.bincount(nearest, minlength=len(COLORS)) / len(nearest)))


def shows_background(frames: np.ndarray, scene: Scene) -> bool:
    """Is the most frequent color of the border the one that the prompt names first?"""
    found = shares(frames, corner=scene.background == "gradient")
    return max(found, key=found.get) == scene.color

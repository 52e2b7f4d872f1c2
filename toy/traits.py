"""Identity and scene of a drawn person: two sets of numbers, drawn independently of each other.

identity   22 independent traits: skin, skull, ears, eyes, brows, nose, mouth, hair, glasses, beard, marks
scene      everything else: pose along the clip, background, shirt, light
"""

from dataclasses import dataclass

import numpy as np


def _palette(text: str) -> dict[str, np.ndarray]:
    """'red ce2e2c, ...' as {"red": (206, 46, 44)}."""
    pairs = (item.split() for item in text.split(", "))
    return {name: np.array([*bytes.fromhex(code)], float) for name, code in pairs}


SKIN = [*_palette("0 ffe2cb, 1 f4c8a4, 2 e2aa7c, 3 bc7e54, 4 885438, 5 563628").values()]  # along the trait, 0 to 1
HAIR = _palette(
    "black 262126, brown 583824, chestnut 8a4c28, red b03c20, ginger e27c30, blond ecc468, gray 8e8e96, white f0eeea, "
    "pink e870a4, blue 3e62be"
)
EYES = _palette("dark 2c1c16, brown 784620, amber c88624, green 3a8e48, blue 3274ce, gray 788696")
RIMS = _palette("black 1e1e24, red c8282c, gold cea03c, blue 284cb0")
CHEEK = [(0.3, 0.27), (0.46, 0.2), (0.47, 0.34), (0.63, 0.27)]
# Spots on the face: x and y as parts of its width and height, radius
MARKS = {"none": (), "left cheek": ((-0.56, 0.37, 0.075),), "right cheek": ((0.56, 0.37, 0.075),)}
MARKS |= {"chin": ((0.26, 0.8, 0.075),), "forehead": ((-0.3, -0.44, 0.075),)}
MARKS |= {"freckles": tuple((side * x, y, 0.042) for side in (-1, 1) for x, y in CHEEK)}
HAIRLINES = {  # x and y as parts of the head's width and height, from the viewer's right to the left, or the right half
    "short": [(0.98, 0), (0.87, -0.14), (0.82, -0.44), (0.5, -0.62), (0, -0.6)],
    "fringe": [(0.98, 0.62), (0.9, 0.3), (0.84, -0.1), (0.72, -0.36), (0.36, -0.34), (0, -0.4)],
    "side part": [(0.98, 0), (0.88, -0.2), (0.76, -0.6), (0.5, -0.8), (0.1, -0.56), (-0.5, -0.36), (-0.98, 0.02)],
    "long": [(0.97, 0.8), (0.9, 0.4), (0.86, -0.1), (0.58, -0.56), (0, -0.86)],
    "curly": [(1, 0.1), (0.9, -0.1), (0.8, -0.42), (0.4, -0.56), (0, -0.54)],
    "bun": [(0.98, -0.1), (0.88, -0.3), (0.72, -0.6), (0.36, -0.76), (0, -0.8)],
    "pigtails": [(0.98, -0.02), (0.88, -0.3), (0.56, -0.56), (0.2, -0.7), (0, -0.86)],
    "mohawk": [(0.26, -0.78), (0.2, -0.66), (0, -0.6)],
}


@dataclass(frozen=True)
class Style:
    """Hair between its hairline and an arc over the skull from one ear to the other, and ovals behind the head."""

    top: float  # distance of the arc from the skull at the crown
    side: float
    end: float  # degrees below the ear
    bumps: tuple[float, int] = (0.0, 0)  # their height and number along the arc
    back: tuple[tuple[float, float, float, float], ...] = ()  # x, y, half width, half height


STYLES = {
    "bald": None,
    "short": Style(0.15, 0.05, 6),
    "fringe": Style(0.2, 0.16, 40, back=((0, 0.1, 1.2, 0.98),)),
    "side part": Style(0.24, 0.07, 6),
    "long": Style(0.16, 0.14, 55, back=((0, 0.2, 1.18, 1.1), (-0.72, 1.1, 0.56, 0.85), (0.72, 1.1, 0.56, 0.85))),
    "curly": Style(0.46, 0.3, 8, bumps=(0.055, 15), back=((0, -0.15, 1.36, 0.95),)),
    "bun": Style(0.09, 0.04, 4, back=((0, -1.3, 0.46, 0.34),)),
    "pigtails": Style(0.14, 0.06, 6, back=((-1.32, 0.3, 0.34, 0.62), (1.32, 0.3, 0.34, 0.62))),
    "mohawk": Style(0.4, 0.3, -66, bumps=(0.06, 26)),
}
# The traits: a range, or choices with their odds
TRAITS: dict[str, tuple[float, float] | dict[str, int]] = {"skin": (0.0, 1.0), "undertone": (-1.0, 1.0)}
TRAITS |= {"head width": (0.88, 1.1), "head height": (1.12, 1.34)}
TRAITS |= {"jaw": (1.65, 2.9)}  # exponent of a superellipse: pointed to square
TRAITS |= {"eye spacing": (0.36, 0.46), "eye size": (0.8, 1.2), "eye slant": (-0.2, 0.2)}
TRAITS |= {"brow thickness": (0.05, 0.13), "brow angle": (-0.22, 0.22)}
TRAITS |= {"nose width": (0.14, 0.27), "nose length": (0.22, 0.36)}
TRAITS |= {"mouth width": (0.28, 0.46), "lips": (0.5, 1.5), "ears": (0.7, 1.35)}
TRAITS |= {"eyes": dict.fromkeys(EYES, 1), "hair": dict.fromkeys(HAIR, 1), "style": dict.fromkeys(STYLES, 1)}
TRAITS |= {"mark": {"none": 3, "left cheek": 1, "right cheek": 1, "chin": 1, "forehead": 1, "freckles": 2}}
TRAITS |= {"glasses": {"none": 4, "round": 2, "square": 2}, "rims": dict.fromkeys(RIMS, 1)}
TRAITS |= {"beard": {"none": 5, "moustache": 1, "goatee": 1, "full": 1, "stubble": 1}}
Identity = dict[str, float | str]  # trait -> its value


def draw_identity(rng: np.random.Generator) -> Identity:
    """A random person."""
    who: Identity = {}
    for trait, odds in TRAITS.items():
        if isinstance(odds, dict):
            who[trait] = str(rng.choice(list(odds), p=np.array([*odds.values()]) / sum(odds.values())))
        else:
            who[trait] = float(rng.uniform(*odds))
    return who


COLORS = _palette(
    "red ce2e2c, orange f08a24, yellow f6d63e, green 389442, teal 148c8e, blue 305cd0, purple 7c3eac, pink f6a0c0, "
    "brown 764c2e, gray 88888a, white f4f4f2, black 1a1a1e"
)


@dataclass(frozen=True)
class Scene:
    """Everything in a clip but the identity."""

    pose: dict[str, np.ndarray]  # POSE -> (F,)
    motions: tuple[str, ...]  # one or two of MOVES; none in a portrait
    joined: str  # two happen at once ("and") or in turn ("then")
    background: str
    color: str
    second: str  # second color of a gradient, or color of the shapes
    layout: tuple[float, float]  # place and number of the shapes
    shirt: str
    light: tuple[float, float, float]  # direction, clockwise from the viewer's right in radians; strength; warmth

    def __len__(self) -> int:
        return len(self.pose["yaw"])

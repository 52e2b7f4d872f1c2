"""Rendering: an identity and a scene become frames, with their true landmarks and boxes.

A head is a flat outline and an ellipsoid behind its features. When it turns by yaw and pitch they slide over the
ellipsoid and foreshorten, while the outline only sways; roll turns it all about the neck. Every shape is a polygon:
NumPy places the points of a whole clip at once, OpenCV fills them at SAMPLES times the size, and averaging makes the
edges smooth.

x points to the viewer's right, y down, z to the viewer. Left and right are always the viewer's; yaw, pitch and roll are
positive to the right, up, and clockwise. Pixel centres are at integers, as in face.py. Head coordinates have their
origin amid the head, which is about 1 to its side; u runs over a feature from -1 to 1.
"""

from collections.abc import Iterator

import cv2
import numpy as np

from toy.traits import COLORS, EYES, HAIR, HAIRLINES, MARKS, RIMS, SKIN, STYLES, Identity, Scene

SAMPLES = 4  # per side of a pixel
DEPTH = 0.87  # of the ellipsoid: below 1, so that the far eye stays on the face
UNIT = 0.235  # part of the frame that 1 in head coordinates is, at scale 1
EYE, MOUTH = 0.06, 0.56  # parts of the head's height
SUBPIXEL = 4  # bits after the point in OpenCV's coordinates
U = np.linspace(-1, 1, 15)


def _mix(a: np.ndarray, b: np.ndarray | tuple, t: float) -> np.ndarray:
    return a + (np.array(b) - a) * t


def _points(x: np.ndarray | float, y: np.ndarray | float) -> np.ndarray:
    return np.stack(np.broadcast_arrays(x, y), -1)


def _oval(x: float, y: float, a: float, b: float, power: float = 2.0, count: int = 20) -> np.ndarray:
    """(count, 2); with a power above 2 it tends to a rectangle."""
    t = np.linspace(0, 2 * np.pi, count, endpoint=False)
    c, s = np.cos(t), np.sin(t)
    return _points(x + a * np.sign(c) * abs(c) ** (2 / power), y + b * np.sign(s) * abs(s) ** (2 / power))


def _band(x: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """The polygon between two curves over x (P,): (..., 2P, 2)."""
    upper, lower = np.broadcast_arrays(_points(x, top), _points(x, bottom))
    return np.concatenate([upper, lower[..., ::-1, :]], -2)


class Head:
    """Places of the parts of a head in the frames of a scene. Results are (F, P, 2), in parts of the frame."""

    def __init__(self, who: Identity, scene: Scene):
        self.who, self.w, self.h = who, who["head width"], who["head height"]
        self.pose = {k: v[:, None] for k, v in scene.pose.items()}  # (F, 1)
        self.pose |= {k: np.deg2rad(self.pose[k]) for k in ("yaw", "pitch", "roll")}
        self.unit = UNIT * self.pose["scale"][..., None]  # (F, 1, 1)
        self.centre = _points(0.5 + self.pose["x"], 0.5 + self.pose["y"])  # (F, 1, 2)
        self.eye = who["eye spacing"] * self.w, EYE * self.h
        self.nose = (EYE + who["nose length"]) * self.h

    def stand(self, points: np.ndarray) -> np.ndarray:
        """Points that do not turn with the head."""
        return self.centre + self.unit * points

    def roll(self, points: np.ndarray) -> np.ndarray:
        """Points that lean with the head, about the neck."""
        c, s, x, y = np.cos(self.pose["roll"]), np.sin(self.pose["roll"]), points[..., 0], points[..., 1] - 0.8 * self.h
        return self.stand(_points(x * c - y * s, x * s + y * c + 0.8 * self.h))

    def turn(self, points: np.ndarray, out: np.ndarray | float = 0.0, z: np.ndarray | None = None) -> np.ndarray:
        """Points on the face, `out` above the ellipsoid, or at depth `z`."""
        x, y, yaw, pitch = points[..., 0], points[..., 1], self.pose["yaw"], self.pose["pitch"]
        depth = DEPTH * np.sqrt(np.maximum(1 - (x / self.w) ** 2 - (y / self.h) ** 2, 0.01)) + out if z is None else z
        x, depth = x * np.cos(yaw) + depth * np.sin(yaw), depth * np.cos(yaw) - x * np.sin(yaw)
        y, depth = y * np.cos(pitch) - depth * np.sin(pitch), depth * np.cos(pitch) + y * np.sin(pitch)
        if z is None:  # points behind the head stay on its edge
            edge = np.where(depth < 0, np.minimum(np.hypot(x / self.w, y / self.h), 1), 1)
            x, y = x / edge, y / edge
        return self.roll(_points(x, y))

    def outline(self, degrees: np.ndarray, grow: np.ndarray | float = 0.0) -> np.ndarray:
        """The head's edge, clockwise from the viewer's right, moved outwards by `grow`."""
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        power = 2 / np.where(s > 0, self.who["jaw"], 2.3)
        x = (self.w + grow) * np.sign(c) * abs(c) ** power
        y = (self.h + grow) * np.sign(s) * abs(s) ** power
        chin, yaw, pitch = np.maximum(y / self.h, 0), self.pose["yaw"], self.pose["pitch"]
        y = y + chin * (0.07 * self.pose["open"] - 0.3 * np.sin(pitch))
        return self.roll(_points(x + 0.16 * chin * np.sin(yaw), y))

    def lips(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x (F, P), y of the line between the lips, and the gap between them."""
        smile, opened = self.pose["smile"], self.pose["open"]
        x = u * self.who["mouth width"] * (1 + 0.22 * smile - 0.15 * opened)
        y = MOUTH * self.h + 0.2 * smile * (0.4 - u**2)
        return x, y, (0.36 * opened + 0.17 * np.maximum(smile - 0.2, 0)) * (1 - u**2)


Shape = tuple[list[np.ndarray], np.ndarray, float, np.ndarray | None]  # contours, color, share of light, frames


def _shapes(who: Identity, scene: Scene) -> Iterator[Shape]:
    """Everything but the background, from back to front."""
    head, style = Head(who, scene), STYLES[who["style"]]
    pose, w, h = head.pose, head.w, head.h
    tone = who["skin"] * (len(SKIN) - 1.001)
    skin = _mix(SKIN[int(tone)], SKIN[int(tone) + 1], tone % 1) + who["undertone"] * np.array([9, -3, -11])
    shade, edge, hair, shirt = skin * 0.86, skin * 0.6, HAIR[who["hair"]], COLORS[scene.shirt]

    def shape(points: np.ndarray, color: np.ndarray | tuple, lit: float = 1.0, when: np.ndarray | None = None) -> Shape:
        return [points], np.asarray(color, float), lit, when

    # Shoulders, hair behind, neck
    right = [(0.5, 1.2), (1.3, 1.42), (1.95, 1.72), (2.25, 2.3), (2.4, 4)]
    body = np.array(right + [(-x, y) for x, y in right[::-1]])
    yield shape(head.stand(body * [1, h / 1.2]), shirt)
    for x, y, a, b in style.back if style else ():
        oval = _oval(x * w, y * h, a * w, b * h, count=32) - _points(0.16 * np.sin(pose["yaw"]), 0)
        yield shape(head.roll(oval), hair * 0.84)
    yield shape(head.stand(_oval(0, 1.15 * h, 0.56, 0.4)), shirt * 0.75)
    yield shape(head.stand(_oval(0, 0.8 * h, 0.46, 0.68, 4)), shade)

    # Ears: the far one is behind the head, the near one before the hair
    t, ears = np.linspace(0, 2 * np.pi, 18, endpoint=False), []
    for side in (-1, 1) if not style or style.end < 30 else ():  # long hair covers them
        near = side * scene.pose["yaw"] <= 0
        for size, color in ((1.16, edge), (1.0, skin), (0.55, shade)):
            e = size * who["ears"]
            x = side * (w + 0.12 * who["ears"] - 0.12 * e * np.cos(t))
            z = -0.2 * who["ears"] + 0.16 * e * np.cos(t)
            points = head.turn(_points(x, 0.1 * h + 0.26 * e * np.sin(t)), z=z)
            ears.append(shape(points, color, when=near))
            yield shape(points, color, when=~near)

    around = np.linspace(0, 360, 48, endpoint=False)
    yield shape(head.outline(around, 0.035), edge)
    yield shape(head.outline(around), skin)
    for side in (-1, 1):
        yield shape(head.turn(_oval(side * 0.56 * w, 0.34 * h, 0.2, 0.13)), _mix(skin, (235, 90, 90), 0.16))
    for x, y, r in MARKS[who["mark"]]:
        spot = _oval(x * w, y * h, r, r, count=12)
        yield shape(head.turn(spot), skin * (0.62 if who["mark"] == "freckles" else 0.32))

    # Beard, mouth
    (x, meet, gap), thick = head.lips(U), 0.085 * who["lips"]
    bow = 1 - U**2 - 0.25 * np.exp(-((U / 0.2) ** 2))  # the upper lip dips in the middle
    if who["beard"] in ("full", "stubble", "goatee"):
        goatee = who["beard"] == "goatee"
        lower = head.outline(np.linspace(62, 118, 12) if goatee else np.linspace(0, 180, 30), 0.05)
        chin = [(-0.3, 0.86), (-0.26, 0.74), (0, 0.72), (0.26, 0.74), (0.3, 0.86)]
        cheek = [(0.98, 0.1), (0.89, 0.3), (0.7, 0.44), (0.44, 0.46), (0.14, 0.44)]
        line = chin if goatee else [(-x, y) for x, y in cheek] + cheek[::-1]
        color = _mix(skin, hair, 0.3 if who["beard"] == "stubble" else 1)
        yield shape(np.concatenate([lower, head.turn(np.array(line) * [w, h])], 1), color)
    if who["beard"] in ("full", "moustache", "goatee"):
        low = meet - 0.4 * thick
        yield shape(head.turn(_band(1.2 * x, low - 0.17 * (1 - 0.75 * U**2), low + 0.05 * U**2), 0.03), hair * 0.92)
    lip = _mix(skin * 0.88, (196, 58, 66), 0.42)
    yield shape(head.turn(_band(x, meet - thick * bow, meet + gap + 1.3 * thick * (1 - U**2))), lip)
    yield shape(head.turn(_band(x, meet - 0.015, meet + np.maximum(gap, 0.035 * (1 - U**2)))), (92, 26, 32))
    yield shape(head.turn(_band(0.86 * x, meet, meet + np.minimum(0.6 * gap, 0.1))), (250, 246, 238), 0.5)

    # Nose
    n, y = who["nose width"], head.nose
    right = [(0.05, 0.5 * y), (0.55 * n, 0.92 * y), (n, y + 0.02)]
    bridge = np.array(right + [(-x, y) for x, y in right[::-1]])
    yield shape(head.turn(bridge, np.array([0.04, 0.2, 0.2, 0.2, 0.2, 0.04])), skin * 0.87)
    yield shape(head.turn(_oval(0, y + 0.02, n, 0.11), 0.16), skin * 0.72)
    yield shape(head.turn(_oval(0, y - 0.02, 0.75 * n, 0.1), 0.22), np.minimum(skin * 1.05, 255))
    for side in (-1, 1):
        yield shape(head.turn(_oval(side * 0.5 * n, y + 0.075, 0.05, 0.03, count=10), 0.18), edge * 0.7)

    # Eyes and brows
    size = who["eye size"]
    gape = np.clip(1.08 + 0.15 * pose["brows"] - 1.15 * pose["closed"], 0, 1.2)

    def lids(u: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
        hump = np.maximum(1 - u**2, 0) ** 0.6
        low = 0.15 * size * (1 - 0.4 * np.maximum(pose["smile"], 0)) * hump - side * who["eye slant"] * 0.25 * u
        return cy + low - 0.36 * size * hump * gape, cy + low

    for side in (-1, 1):
        cx, cy = side * head.eye[0], head.eye[1]
        top, low = lids(U, side)
        yield shape(head.turn(_band(cx + 0.26 * size * U, top, low)), (250, 250, 248), 0.5)
        for radius, color in ((0.17, EYES[who["eyes"]]), (0.085, (16, 12, 14))):
            iris = _oval(cx, cy, radius * size**0.5, radius * size**0.5)
            y = np.clip(iris[:, 1], *lids((iris[:, 0] - cx) / (0.26 * size), side))
            yield shape(head.turn(_points(iris[:, 0], y)), color, 0.5)
        glint = head.turn(_oval(cx - 0.06, cy - 0.08, 0.05, 0.05, count=8))
        yield shape(glint, (255, 255, 255), 0, scene.pose["closed"] < 0.4)
        lash = _mix(skin * 0.3, (24, 16, 20), 0.5)
        yield shape(head.turn(_band(cx + 0.28 * size * U, top - 0.07, top + 0.015)), lash)
        y = (EYE - 0.29) * h - 0.12 * pose["brows"] + side * who["brow angle"] * 0.5 * U - 0.06 * (1 - U**2)
        thick = who["brow thickness"] * (0.65 - 0.35 * side * U)
        yield shape(head.turn(_band(cx + 0.3 * U, y - thick, y + thick)), _mix(hair * 0.75, edge, 0.2))

    # Hair in front, near ear, glasses
    if style:
        nape = 45 * (style.end > 0 and not style.bumps[0])  # the arc ends lower on the side that turns to the viewer
        left, right = (nape * np.maximum(sign * np.sin(pose["yaw"]), 0) for sign in (1, -1))  # (F, 1)
        part = np.linspace(0, 1, 80)
        degrees = (style.end + right) * (1 - part) + (-180 - style.end - left) * part
        up = np.maximum(-np.sin(np.deg2rad(degrees)), 0) ** 1.5
        bumps = style.bumps[0] * np.cos(style.bumps[1] * np.deg2rad(degrees + 90))
        arc = head.outline(degrees, style.side + (style.top - style.side) * up + bumps)
        line = list(HAIRLINES[who["style"]])
        if line[-1][0] == 0:
            line += [(-x, y) for x, y in line[-2::-1]]
        places = np.linspace(0, len(line) - 1, 40)
        line = np.stack([np.interp(places, range(len(line)), axis) for axis in np.array(line).T], 1) * [w, h]
        yield shape(np.concatenate([arc, head.turn(line[::-1])], 1), hair)
    yield from ears
    if not style or style.end > 0:  # a gloss
        arc, inside = np.linspace(-150, -75, len(U)), (style.top * 0.8 if style else 0) - 0.16
        arcs = [head.outline(arc, inside), head.outline(arc[::-1], inside - 0.1 * (1 - U**2))]
        yield shape(np.concatenate(arcs, 1), _mix(hair if style else skin, (255, 255, 255), 0.2))
    if who["glasses"] != "none":
        r, rim, power = min(0.38, head.eye[0] - 0.02), RIMS[who["rims"]], 2 if who["glasses"] == "round" else 5
        tall = r if power == 2 else 0.8 * r
        for side in (-1, 1):
            x, y = side * head.eye[0], head.eye[1]
            ring = [head.turn(_oval(x, y, r + d, tall + d, power, 28), 0.08) for d in (0.04, -0.04)]
            yield ring, rim, 0.7, None
            arm = np.array([(x + side * r, y - 0.1), (side * w, y - 0.06), (side * w, y), (x + side * r, y - 0.03)])
            yield shape(head.turn(arm, 0.05), rim, 0.7)
        bridge = _band((head.eye[0] - r) * U, head.eye[1] - 0.12, head.eye[1] - 0.04)
        yield shape(head.turn(bridge, 0.14), rim, 0.7)


def _fixed(points: np.ndarray, side: int) -> np.ndarray:
    """Parts of the frame -> OpenCV's fixed-point coordinates."""
    return np.rint((points * side - 0.5) * 2**SUBPIXEL).astype(np.int32)


def _background(scene: Scene, side: int) -> np.ndarray:
    """(side, side, 4): color and light, which is 0."""
    first, second, (place, number) = COLORS[scene.color], COLORS[scene.second], scene.layout
    canvas = np.zeros((side, side, 4), np.uint8)
    canvas[..., :3] = first
    if scene.background == "gradient":
        t = np.minimum(np.linspace(0, 1.3, side), 1)[:, None, None]  # complete above the shoulders
        canvas[..., :3] = _mix(first, second, t if place < 0.5 else t.transpose(1, 0, 2))
    count, shapes = 3 + int(number * 3), []
    grid = (np.arange(-1, count + 1) + place) / count
    if scene.background == "circles":
        shapes = [_oval(x + k % 2 * 0.5 / count, y, *[0.24 / count] * 2) for k, y in enumerate(grid) for x in grid]
    elif scene.background == "stripes":
        shapes = [_band(np.array([x, x + 0.4 / count]), np.zeros(2), np.ones(2)) for x in grid]
    for points in shapes:
        cv2.fillPoly(canvas, [_fixed(points, side)], (*second, 0), cv2.LINE_8, SUBPIXEL)
    return canvas


def render(who: Identity, scene: Scene, size: int = 64) -> np.ndarray:
    """(F, size, size, 3), bytes."""
    side, polygons = size * SAMPLES, []
    for contours, color, lit, when in _shapes(who, scene):
        polygons.append(([_fixed(p, side) for p in contours], (*np.clip(color, 0, 255).tolist(), 255 * lit), when))
    behind, head = _background(scene, side), Head(who, scene)
    angle, strength, warmth = scene.light
    tint = 1 + warmth * np.array([0.07, 0.0, -0.09], np.float32)
    yx = np.stack(np.mgrid[:size, :size]).astype(np.float32)
    frames = np.empty((len(scene), size, size, 3), np.uint8)
    for k in range(len(scene)):
        canvas = behind.copy()
        for points, color, when in polygons:
            if when is None or when[k]:
                cv2.fillPoly(canvas, [p[k] for p in points], color, cv2.LINE_8, SUBPIXEL)
        small = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
        # shading as on a ball about the head: brighter towards the light, darker at the edges
        (x, y), r = head.centre[k, 0] * size - 0.5, 1.3 * float(head.unit[k, 0, 0]) * size
        nx, ny = np.clip((yx[1] - x) / r, -1, 1), np.clip((yx[0] - y) / r, -1, 1)
        shade = strength * (np.cos(angle) * nx + np.sin(angle) * ny) - 0.12 * np.minimum(nx * nx + ny * ny, 1) + 1.04
        lit = small[..., 3:] / 255
        frames[k] = np.clip(small[..., :3] * (1 + lit * (shade[..., None] * tint - 1)), 0, 255) + 0.5
    return frames


def landmarks(who: Identity, scene: Scene, size: int = 64) -> np.ndarray:
    """(F, 5, 2) pixels: left eye, right eye, nose, left and right corner of the mouth, as in insightface's template."""
    head = Head(who, scene)
    x, y = head.eye
    eyes, nose = head.turn(np.array([[-x, y], [x, y]])), head.turn(np.array([[0, head.nose]]), 0.22)
    mouth = head.turn(_points(*head.lips(np.array([-1.0, 1.0]))[:2]))
    return (np.concatenate([eyes, nose, mouth], 1) * size - 0.5).astype(np.float32)


def boxes(who: Identity, scene: Scene, size: int = 64) -> np.ndarray:
    """(F, 4) pixels: left, top, right, bottom of the face from forehead to chin, also outside the frame."""
    edge = Head(who, scene).outline(np.linspace(-150, 210, 73)[10:]) * size - 0.5
    return np.concatenate([edge.min(1), edge.max(1)], 1).astype(np.float32)

"""toy.py: the same chance draws the same clip, identity is apart from nuisance, truth and words fit."""

import itertools
import re
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image

from toy import traits
from toy import world as toy

STILL = {track: values[0] for track, values in toy.POSE.items()}


def scene_of(number=0, frames=1, **pose):
    """A portrait looking straight ahead, eyes open, but for what `pose` says: a number, or one for each frame."""
    scene = toy.draw_scene(np.random.default_rng(number), frames, moving=False)
    still = {k: np.broadcast_to(np.asarray(pose.get(k, v), float), frames) for k, v in STILL.items()}
    return replace(scene, pose=still)


def people(count, seed=0):
    return [toy.person(seed, k) for k in range(count)]


def moving(motion, frames=13):
    """A scene with this motion alone."""
    scenes = (toy.draw_scene(np.random.default_rng(k), frames) for k in itertools.count())
    return next(s for s in scenes if s.motions == (motion,))


# ---------------------------------------------------------------------------------------------------------------------
# Clips


def test_a_clip_is_what_it_says_and_the_same_again():
    one, same, other = (toy.toy_clip(3, index, frames=5) for index in (7, 7, 8))
    assert one["frames"].shape == (5, 64, 64, 3) and one["frames"].dtype == np.uint8
    assert one["reference"].shape == (64, 64, 3) and one["reference"].dtype == np.uint8
    assert one["landmarks"].shape == (5, 5, 2) and one["boxes"].shape == (5, 4)
    assert one["reference_landmarks"].shape == (5, 2) and one["reference_box"].shape == (4,)
    assert toy.scene_vector(one["scene"]).shape == (5, 23) and np.isfinite(toy.scene_vector(one["scene"])).all()
    for key in ("frames", "reference", "landmarks", "boxes"):
        assert np.array_equal(one[key], same[key]) and not np.array_equal(one[key], other[key])
    assert one["caption"] == same["caption"] and one["identity"] == same["identity"] != other["identity"]


def test_a_person_can_be_asked_for_again():
    a, b = (toy.toy_clip(0, index, frames=1, number=4) for index in (10, 11))
    assert a["identity"] == b["identity"] == toy.person(0, 4)
    assert not np.array_equal(a["reference"], b["reference"])


@pytest.mark.parametrize("size", [32, 96])
def test_any_size_is_the_same_picture(size):
    clip, large = (toy.toy_clip(0, 1, frames=2, size=s) for s in (64, size))
    assert large["frames"].shape == (2, size, size, 3)
    assert np.allclose((clip["landmarks"] + 0.5) / 64, (large["landmarks"] + 0.5) / size, atol=1e-5)


def test_speed():
    toy.toy_clip(0, 0)
    start = time.process_time()
    frames = sum(len(toy.toy_clip(0, k)["frames"]) + 1 for k in range(12))
    rate = frames / (time.process_time() - start)
    print(f"{rate:.0f} frames/s")
    assert rate > 100


# ---------------------------------------------------------------------------------------------------------------------
# Identity and nuisance


def test_many_people_differ():
    choices = np.prod([float(len(odds)) for odds in traits.TRAITS.values() if isinstance(odds, dict)])
    ranges = sum(not isinstance(odds, dict) for odds in traits.TRAITS.values())
    assert len(traits.TRAITS) >= 12 and choices * 2**ranges > 1e6
    assert len({tuple(who.values()) for who in people(300)}) == 300
    for trait, odds in traits.TRAITS.items():
        values = {who[trait] for who in people(300)}
        assert values <= set(odds) if isinstance(odds, dict) else odds[0] <= min(values) < max(values) <= odds[1]


def test_traits_are_independent_of_each_other_and_of_the_scene():
    """Columns of one choice exclude each other, so each trait is a number here: its range, or the choice's place."""
    rows = []
    for k in range(1500):
        who, scene = toy.person(1, k), toy.draw_scene(np.random.default_rng((9, k)), 1, moving=False)
        codes = [list(odds).index(who[t]) if isinstance(odds, dict) else who[t] for t, odds in traits.TRAITS.items()]
        nuisance = [scene.pose[t][0] for t in toy.POSE] + [list(toy.COLORS).index(scene.color), *scene.light]
        rows.append(codes + nuisance)
    correlation = np.corrcoef(np.array(rows).T) - np.eye(len(rows[0]))
    assert abs(correlation).max() < 0.12  # 4.6 standard deviations


def test_a_person_stays_the_same_in_another_scene():
    who = toy.person(0, 0)
    before = dict(who)
    pictures = [toy.reference(who, np.random.default_rng(k))[0].astype(int) for k in range(2)]
    assert abs(pictures[0] - pictures[1]).mean() > 5
    assert before == who


@pytest.mark.parametrize("trait", [t for t in traits.TRAITS if t not in ("rims",)])
def test_every_trait_shows(trait):
    """Someone with nothing in the way: changing one trait changes the picture."""
    plain = {"style": "short", "glasses": "none", "beard": "none", "mark": "none", "skin": 0.2, "hair": "red"}
    who, scene = toy.person(0, 0) | plain, scene_of(4)
    odds = traits.TRAITS[trait]
    ends = list(odds)  # all choices, or both ends
    pictures = [toy.render(who | {trait: end}, scene)[0].astype(int) for end in ends]
    for a, b in itertools.combinations(pictures, 2):
        assert (abs(a - b).max(-1) > 12).sum() >= 3


def test_the_splits_share_no_person_no_pair_and_no_template():
    train, test = ({tuple(toy.person(0, k, split).values()) for k in range(300)} for split in toy.SPLITS)
    assert not train & test
    seen = {split: set() for split in toy.SPLITS}
    for split, k in itertools.product(toy.SPLITS, range(1200)):
        scene = toy.draw_scene(np.random.default_rng(k), 1, split=split)
        seen[split] |= {(motion, scene.color) for motion in scene.motions}
    assert not seen["train"] & seen["test"]
    assert len(seen["train"] | seen["test"]) == len(toy.MOVES) * len(toy.COLORS)
    for words in zip(*seen["train"]):  # yet training has seen every word
        assert set(words) in (set(toy.MOVES), set(toy.COLORS))
    assert not set(toy.TEMPLATES["train"]) & set(toy.TEMPLATES["test"])


# ---------------------------------------------------------------------------------------------------------------------
# Ground truth

POSES = [
    {},
    {"yaw": -34},
    {"yaw": 34},
    {"pitch": 18},
    {"pitch": -18},
    {"roll": 15},
    {"yaw": 25, "pitch": 10, "roll": -12},
]


@pytest.mark.parametrize("pose", POSES, ids=str)
def test_landmarks_are_where_the_eyes_are(pose, monkeypatch):
    """With irises in a color that nothing else has, their centroid is the landmark."""
    monkeypatch.setitem(traits.EYES, "green", np.array([0.0, 255.0, 0.0]))
    off = []
    for k, who in enumerate(people(12)):
        who |= {"eyes": "green", "glasses": "none", "style": "bald", "eye slant": 0.0}
        scene = replace(scene_of(k, brows=1, **pose), color="black", background="plain", shirt="black")
        picture = toy.render(who, scene)[0].astype(float)
        landmarks = toy.landmarks(who, scene)[0]
        weight = np.clip(picture[..., 1] - np.maximum(picture[..., 0], picture[..., 2]) - 30, 0, None)
        for x, y in landmarks[:2]:
            near = weight * (np.hypot(*(np.mgrid[:64, :64] - np.array([y, x])[:, None, None])) < 4)
            assert near.sum() > 50
            centroid = (near * np.mgrid[:64, :64]).sum((1, 2)) / near.sum()  # the glint and the lid take a little away
            off.append(centroid - (y, x))
    assert np.hypot(*np.transpose(off)).max() < 0.75
    assert (abs(np.mean(off, 0)) < (0.25, 0.4)).all()  # y, x; half a pixel of error would show in y


def test_landmarks_are_in_order_and_in_the_box():
    for k in range(60):
        clip = toy.toy_clip(5, k, frames=9)
        left, right, _, corner, other = clip["landmarks"].transpose(1, 0, 2)
        assert (left[:, 0] + 3 < right[:, 0]).all() and (corner[:, 0] + 2 < other[:, 0]).all()
        assert (left[:, 1] < corner[:, 1]).all() and (right[:, 1] < other[:, 1]).all()
        inside = (clip["landmarks"] > clip["boxes"][:, None, :2]) & (clip["landmarks"] < clip["boxes"][:, None, 2:])
        assert inside.mean() > 0.99  # a nose may stand out
        assert (abs(clip["landmarks"] - 31.5) <= 32).all()  # in the frame


def test_the_box_is_around_the_skin():
    who = toy.person(0, 0) | {"style": "bald", "beard": "none", "glasses": "none", "ears": 0.0}
    scene = replace(scene_of(1), color="blue", background="plain", shirt="blue", light=(0.0, 0.0, 0.0))
    rows, columns = np.nonzero(toy.render(who, scene, 128)[0, :100].astype(int)[..., 0] > 90)
    left, top, right, _ = toy.boxes(who, scene, 128)[0]
    assert abs(left - columns.min()) < 3 and abs(right - columns.max()) < 3 and abs(top - rows.min()) < 8


@pytest.mark.parametrize("motion", [m for m, move in toy.MOVES.items() if move.direction])
def test_directions_are_the_viewers(motion):
    scene = moving(motion)
    for who in people(5):
        eyes, nose, mouth = np.split(toy.landmarks(who, scene), [2, 3], 1)
        eyes, nose, mouth = eyes.mean(1), nose[:, 0], mouth.mean(1)
        slope = np.diff(toy.landmarks(who, scene)[:, :2], axis=1)[:, 0]
        measured = {  # positive to the right, down in the picture, clockwise
            "turn": (nose - eyes)[:, 0] * np.sign((mouth - eyes)[:, 1]),
            "look": (nose - eyes)[:, 1] - 0.6 * (mouth - eyes)[:, 1],
            "tilt": np.arctan2(slope[:, 1], slope[:, 0]),
            "walk": nose[:, 0] / 20,
        }[motion.split()[0]]
        change = measured[-1] - measured[0]
        assert (change > 0) == (toy.MOVES[motion].direction in ("right", "down")) and abs(change) > 0.1, motion


@pytest.mark.parametrize("motion", toy.MOVES)
def test_motion_is_smooth_and_visible(motion):
    scene = moving(motion, 25)
    track = scene.pose[toy.MOVES[motion].track]
    span = np.ptp(track)
    assert (
        span > 0.4 * np.ptp(toy.POSE[toy.MOVES[motion].track][2:])
        or motion in ("come closer", "back away")
        or span > 15
    )
    assert abs(np.diff(track)).max() < 0.35 * span  # no jump
    assert abs(np.diff(toy.landmarks(toy.person(0, 0), scene), axis=0)).max() < 4
    frames = toy.render(toy.person(0, 0), scene).astype(int)
    assert (abs(frames - frames[0]).max(-1) > 30).sum((1, 2)).max() > 10


# ---------------------------------------------------------------------------------------------------------------------
# Picture


def test_edges_are_smooth():
    """The small picture is the large one, averaged; and a slanted edge has many values in between."""
    for who, k in zip(people(6), range(6)):
        scene = scene_of(k, yaw=12, roll=8)
        small, large = (toy.render(who, scene, size)[0].astype(float) for size in (64, 128))
        assert abs(small - cv2.resize(large, (64, 64), interpolation=cv2.INTER_AREA)).mean() < 1.5
    scene = replace(scene, color="white", background="plain", shirt="black", light=(0.0, 0.0, 0.0))
    shoulder = toy.render(who, scene)[0, 52:, :14, 0]
    assert len(np.unique(shoulder)) > 10


@pytest.mark.parametrize("name", toy.COLORS)
def test_a_plain_background_has_the_color_of_its_name(name):
    scene = replace(scene_of(2), color=name, background="plain")
    assert np.abs(toy.render(toy.person(0, 1), scene)[0, :2].astype(int) - toy.COLORS[name]).max() <= 1


@pytest.mark.parametrize("kind", list(toy.BACKGROUNDS)[1:])
def test_other_backgrounds_show_both_colors(kind):
    for k in range(5):
        scene = replace(scene_of(k), color="blue", second="yellow", background=kind)
        top = toy.render(toy.person(0, 1), scene)[0].astype(int)
        blue, yellow = ((abs(top - toy.COLORS[c]).max(-1) < 30).mean() for c in ("blue", "yellow"))
        assert blue > 0.03 and yellow > 0.03


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def behind(text):
    """The colors that the caption says are behind, in order; not the shirt's."""
    return re.findall(rf"\b({'|'.join(toy.COLORS)})\b", re.sub(r"\w+ shirt", "", text.lower()))


@pytest.mark.parametrize("split", toy.SPLITS)
def test_a_caption_says_what_is_shown(split):
    for k in range(250):
        clip = toy.toy_clip(2, k, frames=1, size=8, split=split)
        scene, text = clip["scene"], clip["caption"].lower()
        said = [m for m, move in toy.MOVES.items() if any(re.search(rf"\b{s}\b", text) for s in move.says)]
        assert set(scene.motions) <= set(said), text
        assert behind(text) == [scene.color, scene.second][: 1 if scene.background == "plain" else 2], text
        assert (", then " in text) == (scene.joined == "then")
        assert ("left" in text) == any("left" in m for m in scene.motions)
        assert ("right" in text) == any("right" in m for m in scene.motions)
        assert re.match(r"[A-Z].*[a-z]\.$", clip["caption"]) and " a orange" not in text
        assert not re.search(r"\b(hair|glasses|beard|bald|man|woman|eyed)\b", text)  # identity is the reference's task


def test_captions_vary():
    scene = replace(moving("turn left"), background="plain")
    assert len({toy.caption(scene, np.random.default_rng(k)) for k in range(300)}) >= 30


def test_the_command_writes_both_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "animation", lambda seed: [Image.new("RGB", (8, 8), c) for c in ("red", "blue")])
    monkeypatch.setattr(
        "sys.argv", ["toy.py", "--out", str(tmp_path / "a/toy.png"), "--gif", str(tmp_path / "b/toy.gif")]
    )
    toy.main()
    assert Image.open(tmp_path / "a/toy.png").size == (1024, 1024)
    assert Image.open(tmp_path / "b/toy.gif").n_frames == 2
    assert "toy.gif" in capsys.readouterr().out


def test_an_animation_shows_clips_and_captions():
    pages = toy.animation(0, clips=2, frames=3, size=64)
    assert len(pages) == 3 and np.asarray(pages[0])[64:].min() < 128  # words below

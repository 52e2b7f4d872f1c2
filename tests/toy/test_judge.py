"""toy/judge.py, adherence.py and eye.py: formulas against hand-made inputs, the committed network against the truth."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import eval as evaluation
import sample
from common.media import read_image
from evaluation.cases import read_cases
from evaluation.metrics import FaceReader
from toy import eye, judge
from toy import world as toy
from toy.adherence import grain, moves, shares, shows_background, shows_shirt
from toy.judge import SCENE, copied

COUNT = 24


@pytest.fixture(scope="module")
def told():
    return judge.cases(5, COUNT)


@pytest.fixture(scope="module")
def look(root):
    return eye.Eye.from_file(root / "assets" / "judge.safetensors")


class KnownFaces:
    """A FaceReader that knows where the face is and embeds it by the mean color of each eighth of the frame."""

    device = torch.device("cpu")

    def __init__(self, found=True):
        self.found = found

    @staticmethod
    def arcface(x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)

    def read(self, frames):
        from evaluation.metrics import Faces

        n, x = len(frames), torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = torch.full((n,), self.found)
        return Faces(found, ~found, torch.ones(n, 5, 2), torch.ones(n, 4), self.arcface(x), None)


@pytest.fixture(autouse=True)
def whole_frames(monkeypatch):
    """References of KnownFaces are embedded as whole pictures, like its frames."""
    embed = judge.embed
    known = lambda x, points, phi: phi(x) if phi is KnownFaces.arcface else embed(x, points, phi)  # noqa: E731
    monkeypatch.setattr(judge, "embed", known)


def still(image, frames=17):
    return np.repeat(image[None], frames, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Cases


def test_cases_are_held_out_and_half_of_them_have_a_direction(told):
    assert len(told) == COUNT
    for case in told:
        scene = case["scene"]
        assert all(toy.held_out(motion, scene.color) for motion in scene.motions)
        assert case["frames"].shape == (17, 64, 64, 3)
    directed = sum(any(m.split()[0] in ("turn", "look", "tilt", "walk") for m in c["scene"].motions) for c in told)
    assert directed >= COUNT / 2
    again = judge.cases(5, COUNT)
    assert all(a["caption"] == b["caption"] and (a["frames"] == b["frames"]).all() for a, b in zip(told, again))
    assert judge.cases(6, 1)[0]["caption"] != told[0]["caption"]


# ---------------------------------------------------------------------------------------------------------------------
# Motions


def scene_with(**tracks):
    """Scene vectors (17, 23), all zero but for these poses, given in the renderer's units."""
    vector = np.zeros((17, 23), np.float32)
    for name, values in tracks.items():
        mean, _, _, most = toy.POSE[name]
        vector[:, SCENE.index(name)] = (np.broadcast_to(values, 17) - mean) / (most - mean)
    return vector


def test_a_turn_needs_the_side_and_half_of_the_least_change():
    rise = np.linspace(0, 1, 17)
    ends = rise[-2:].mean() - rise[:2].mean()
    for angle, right in ((14, True), (12, False), (-14, False)):  # the renderer turns by 26 degrees at least
        vector = scene_with(yaw=angle / ends * rise)
        assert moves(vector, "turn right") == right
        assert moves(-vector, "turn left") == right  # a mirror
    assert moves(scene_with(roll=rise * 8), "tilt right") and not moves(scene_with(roll=rise * 4), "tilt right")
    assert moves(scene_with(smile=0.2 - rise), "frown") and not moves(scene_with(smile=0.2 - rise), "smile")


def test_to_and_fro_is_not_there_only():
    s = np.linspace(0, 1, 17)
    wave, rise, hump = np.sin(2 * np.pi * s), s, np.sin(np.pi * s) ** 2
    assert moves(scene_with(pitch=8 * wave), "nod")  # 16 degrees from end to end, 24 is the least that is drawn
    assert not moves(scene_with(pitch=4 * wave), "nod")
    assert not moves(scene_with(pitch=16 * rise), "nod") and moves(scene_with(pitch=16 * rise), "look up")
    assert not moves(scene_with(pitch=8 * wave), "look up") and not moves(scene_with(pitch=8 * wave), "look down")
    assert moves(scene_with(closed=0.7 * hump), "blink") and not moves(scene_with(closed=0.4 * hump), "blink")
    assert not moves(scene_with(closed=rise), "blink")


@pytest.mark.parametrize("motion", toy.MOVES)
def test_the_renderers_own_poses_show_the_motion_and_a_portraits_do_not(motion):
    """The rules on exact poses, before any network errs."""
    rng, yes, no = np.random.default_rng(3), [], []
    while len(yes) < 12:
        scene = toy.draw_scene(rng, 17, 12.0, "test")
        if motion in scene.motions:
            yes.append(moves(toy.scene_vector(scene), motion))
        no.append(moves(toy.scene_vector(toy.draw_scene(rng, 17, 12.0, moving=False)), motion))
    assert np.mean(yes) >= 0.9
    assert np.mean(no) <= 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Backgrounds


def test_shares_count_the_border_only():
    frames = np.full((2, 64, 64, 3), toy.COLORS["blue"], np.uint8)
    frames[:, 8:, 8:56] = toy.COLORS["red"]  # the person
    frames[:, :5, :16] = toy.COLORS["green"] + 4  # a quarter of the top
    found = shares(frames, corner=False)
    mask = np.zeros((64, 64), bool)
    mask[:5] = mask[:32, :5] = mask[:32, 59:] = True
    assert found["red"] == 0
    assert found["green"] == pytest.approx(80 / mask.sum())
    assert found["blue"] == pytest.approx(1 - 80 / mask.sum())
    assert shares(frames, corner=True)["green"] == pytest.approx(0.5)  # the upper half of 10 by 10 pixels


def test_a_drawn_background_is_recognized_and_another_is_not(told):
    right = [shows_background(case["frames"], case["scene"]) for case in told]
    assert np.mean(right) >= 0.9
    for color in ("teal", "orange"):
        others = [c for c in told if color not in (c["scene"].color, c["scene"].second)]
        wrong = [shows_background(c["frames"], replace(c["scene"], color=color)) for c in others]
        assert np.mean(wrong) <= 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Copy-paste


def row(shown, photo, read):
    return {"shown": list(shown), "photo": list(photo), "photo_read": list(read)}


def test_the_slope_is_that_of_a_line_through_the_readings():
    rng = np.random.default_rng(0)
    photos = rng.normal(size=(200, 23))
    read = 0.6 * photos + rng.normal(size=(200, 23)) * 0.2  # a network that shrinks and errs
    videos = 0.3 * read + rng.normal(size=(200, 23)) * 0.1 + 5
    rows = [row(*each) for each in zip(videos, photos, read)]
    k = SCENE.index("background red")
    x, y, z = photos[:, k : k + 3], videos[:, k : k + 3], read[:, k : k + 3]
    expected = sum(np.cov(x[:, c], y[:, c])[0, 1] for c in range(3)) / sum(
        np.cov(x[:, c], z[:, c])[0, 1] for c in range(3)
    )
    assert copied(rows, "background") == pytest.approx(expected)
    assert copied(rows, "background") == pytest.approx(0.3, abs=0.05)
    slope, low, high = judge.copy_paste(rows, "background", 200)
    assert low < 0.3 < high and slope == copied(rows, "background")


def test_what_the_prompt_moves_is_left_out():
    rng = np.random.default_rng(1)
    photos = rng.normal(size=(100, 23))
    videos = photos.astype(object)
    k = SCENE.index("yaw")
    videos[:50, k] = None
    assert copied([row(v, p, p) for v, p in zip(videos, photos)], "pose") == pytest.approx(1, abs=0.15)
    videos[:50, k] = 100 * rng.normal(size=50)
    assert abs(copied([row(v, p, p) for v, p in zip(videos, photos)], "pose") - 1) > 0.15


def test_a_video_that_repeats_its_photo_has_slope_one_and_a_drawn_one_about_zero(look):
    told = judge.cases(9, 40)
    repeated = judge.measure(np.stack([still(c["reference"], 3) for c in told]), told, KnownFaces(), look)
    drawn = judge.measure(np.stack([c["frames"] for c in told]), told, KnownFaces(), look)
    for group in judge.GROUPS:
        slope, low, high = judge.copy_paste(drawn, group, 300)
        assert abs(slope) < 0.4, group
        if group != "light":  # which is read off the skin too, and that the two have in common
            assert low - 0.1 <= 0 <= high + 0.1, group
        if group != "expression":
            assert copied(repeated, group) == pytest.approx(1, abs=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_a_row_says_what_was_asked(told, look):
    videos = np.stack([still(case["reference"], 3) for case in told])
    rows = judge.measure(videos, told, KnownFaces(), look)
    assert all(row["retrieved"] and not row["retrieved_permuted"] for row in rows)
    assert all(row["similarity"] == pytest.approx(1, abs=1e-5) and row["face_rate"] == 1 for row in rows)
    assert all(row["drift"] == pytest.approx(0, abs=1e-5) for row in rows)
    following = [*range(1, COUNT), 0]
    moved = judge.measure(videos[following], told, KnownFaces(), look, following)
    assert all(row["retrieved_permuted"] and not row["retrieved"] for row in moved)
    assert moved[0]["photo"] == rows[1]["photo"]
    nobody = judge.measure(videos[:2], told[:2], KnownFaces(found=False), look)
    assert all(not row["retrieved"] and row["similarity"] == 0 and row["drift"] is None for row in nobody)


def test_summary_and_table():
    result = {"retrieved": (0.5, 0.25, 0.75), **{key: None for key in judge.COLUMNS if key != "retrieved"}}
    result |= {f"copied {group}": (0.1, 0.0, 0.2) for group in judge.GROUPS}
    lines = judge.table({"drawn": result}).splitlines()
    assert lines[0] == "| | drawn |"
    assert "| own reference nearest ↑ | 0.50 (0.25 to 0.75) |" in lines
    assert "| drift ↓ |  |" in lines
    assert "| light copied ↓ | 0.10 (0.00 to 0.20) |" in lines


# ---------------------------------------------------------------------------------------------------------------------
# Comparison of two runs


def video_row(rng, photo, **values):
    """A row as measure makes it."""
    scene = [float(x) for x in rng.normal(size=23)]
    row = dict.fromkeys(("retrieved", "retrieved_permuted", "motion", "background", "skin", *eye.CLASSES), True)
    row |= {"similarity": 0.5, "face_rate": 1.0, "drift": None, "direction": None, "motions": {"nod": True}}
    row |= {"shirt": None, "grain": None}
    return row | {"shown": scene, "photo": photo, "photo_read": photo} | values


def test_grain_counts_noise_and_seams_and_no_flat_background():
    frames = np.full((3, 64, 64, 3), 90, np.uint8)
    assert grain(frames) == 0
    frames[:, 20:, 16:48] = 200  # a person below the corners
    assert grain(frames) == 0
    frames[:, :, 8:] += 10  # one seam across: 1 of 15 differences in the left corner, 0 of 15 in the right one
    assert grain(frames) == pytest.approx(10 / 15 / 2 / 2)
    noise = np.random.default_rng(0).normal(0, 5, frames.shape)
    noisy = (np.full(frames.shape, 90) + noise).round().astype(np.uint8)
    assert grain(noisy) == pytest.approx(2 * 5 / np.pi**0.5, rel=0.05)  # mean of |a - b|, each with sigma 5


def test_the_shirt_of_drawn_clips_is_recognized(told, look):
    for clip in told[:12]:
        read = look.read(clip["frames"])["scene"]
        assert shows_shirt(read, clip["scene"])
        assert not shows_shirt(read, replace(clip["scene"], shirt="teal" if clip["scene"].shirt != "teal" else "red"))


def test_paired_differences_by_hand(tmp_path, in_process):
    rng = np.random.default_rng(0)
    photos = rng.normal(size=(6, 23)).tolist()
    ours = [video_row(rng, p, similarity=0.5 + 0.1 * k, drift=0.2, direction=k > 1) for k, p in enumerate(photos)]
    theirs = [
        video_row(rng, p, similarity=0.6, drift=0.1 if k else None, direction=k > 4) for k, p in enumerate(photos)
    ]
    theirs[2]["direction"] = None
    for name, rows in (("ours", {"with reference": ours, "drawn": []}), ("theirs", theirs)):  # the latter as ablate's
        (tmp_path / name).write_text(json.dumps(rows))
    options = "--rows", tmp_path / "ours", "--against", tmp_path / "theirs"
    code, text, error = in_process(judge.main, "judge.py", *options)
    assert code == 0, error
    differences = np.arange(6) * 0.1 - 0.1
    error = differences.std(ddof=1) / 6**0.5
    lines = text.splitlines()
    assert f"| similarity ↑ | 0.750 | 0.600 | 0.150 | {error:.3f} | 4 | 1 |" in lines
    assert "| drift ↓ | 0.200 | 0.100 | 0.100 | 0.000 | 0 | 5 |" in lines  # smaller is better; a pair lacks a side
    direction = np.array([0, 0, 1, 1, 0])
    error = direction.std(ddof=1) / 5**0.5
    assert f"| direction right ↑ | 0.600 | 0.200 | 0.400 | {error:.3f} | 2 | 0 |" in lines
    (light,) = [line.split("|") for line in lines if line.startswith("| light copied ↓")]
    assert float(light[2]) == pytest.approx(copied(ours, "light"), abs=5e-4)
    assert float(light[3]) == pytest.approx(copied(theirs, "light"), abs=5e-4)
    assert float(light[4]) == pytest.approx(copied(ours, "light") - copied(theirs, "light"), abs=1e-3)
    assert "0 is chance" in text and "1 is a copy" in text


def test_the_standard_error_of_slopes_is_that_of_repeated_draws(tmp_path):
    """Two models copy 0.5 and 0.2 with noise of their own: the spread of the difference over draws, and as reported."""

    def draw(seed):
        rng = np.random.default_rng(seed)
        photos, pair = rng.normal(size=(60, 23)), []
        for strength in (0.5, 0.2):
            shown = strength * photos + rng.normal(size=photos.shape)
            pair.append([video_row(rng, p.tolist(), shown=v.tolist()) for p, v in zip(photos, shown)])
        return pair

    differences = [copied(a, "shirt") - copied(b, "shirt") for a, b in map(draw, range(60))]
    reported = []
    for seed in range(5):
        (line,) = [x for x in judge.compare(*draw(seed)).splitlines() if x.startswith("| shirt copied")]
        reported.append(float(line.split("|")[5]))
    assert np.mean(differences) == pytest.approx(0.3, abs=0.05)
    assert np.mean(reported) == pytest.approx(np.std(differences), rel=0.25)


def test_rows_that_are_no_pairs_or_no_rows_are_refused(tmp_path, in_process):
    rng, path = np.random.default_rng(0), tmp_path / "rows.json"
    rows = [video_row(rng, rng.normal(size=23).tolist()) for _ in range(3)]
    (tmp_path / "good").write_text(json.dumps(rows))
    for bad, says in (
        (rows[:2], "other people or prompts"),
        ([row | {"motions": {"blink": True}} for row in rows], "other people or prompts"),
        ({"drawn": rows}, "no videos of the kind 'with reference'"),
        ([rows[0] | {"similarity": "0.5"}], "similarity"),
        ([rows[0] | {"shown": [0.0] * 22}], "shown"),
        ([rows[0] | {"more": 1}], "more"),
        ({"with reference": 3}, "with reference"),
        ("[" * 5000, "rows.json"),
    ):
        path.write_text(bad if isinstance(bad, str) else json.dumps(bad))
        code, _, error = in_process(judge.main, "judge.py", "--rows", tmp_path / "good", "--against", path)
        assert code == 2 and says in error and len(error.splitlines()) == 1, error
    code, _, error = in_process(judge.main, "judge.py", "--rows", path)
    assert code == 2 and "--rows needs --against" in error


# ---------------------------------------------------------------------------------------------------------------------
# The network


def test_mirrored_frames_have_mirrored_targets():
    """What training takes for granted: a mirror changes the signs that MIRRORED names, and no other number."""
    from toy.portrait import landmarks, render

    rng = np.random.default_rng(0)
    who = toy.person(0, 1) | {"style": "bald", "mark": "none"}
    scene = replace(toy.draw_scene(rng, 3, moving=False), background="plain")
    flipped = {t: -v if t in ("yaw", "roll", "x") else v for t, v in scene.pose.items()}
    angle, *rest = scene.light
    other = replace(scene, pose=flipped, light=(np.pi - angle, *rest))
    close = np.abs(render(who, other).astype(int) - render(who, scene)[:, :, ::-1]).mean()
    assert close < 2  # glints are not mirrored
    a, b = eye.targets(who, scene)[0], eye.targets(who, other)[0]
    sign = np.ones(eye.NUMBERS)
    sign[eye.MIRRORED] = -1
    np.testing.assert_allclose(a * sign, b, atol=1e-6)
    points, mirrored = landmarks(who, scene), landmarks(who, other)[:, [1, 0, 2, 4, 3]]
    np.testing.assert_allclose(63 - points[..., 0], mirrored[..., 0], atol=1e-3)


def test_the_network_sees_the_motions_that_are_there_and_hardly_any_other(look):
    """The instruments' own errors, on drawn clips: motions recognized, and motions claimed of a person who rests."""
    recognized, claimed = {motion: [] for motion in toy.MOVES}, []
    for k, case in enumerate(judge.cases(11, 80)):
        seen = look.read(case["frames"])["scene"]
        for motion in case["scene"].motions:
            recognized[motion].append(moves(seen, motion))
        at_rest = toy.draw_scene(np.random.default_rng((7, k)), 17, 12.0, moving=False)
        seen = look.read(toy.render(case["identity"], at_rest, 64))["scene"]
        claimed.append([moves(seen, motion) for motion in toy.MOVES])
    directed = [right for motion in toy.MOVES if toy.MOVES[motion].direction for right in recognized[motion]]
    assert np.mean(directed) >= 0.95 and np.mean(recognized["nod"] + recognized["shake"]) >= 0.9
    assert np.mean(np.concatenate([*recognized.values()])) >= 0.85
    assert np.mean(claimed, 0).max() <= 0.04 and np.mean(claimed) <= 0.01


def test_training_writes_a_network_that_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr(eye, "POOL", 8)
    made = eye.train(tmp_path / "eye.safetensors", 2.0, 0, torch.device("cpu"), batch=32)
    read = eye.Eye.from_file(tmp_path / "eye.safetensors")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(made(x), read(x)):
            torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.1)  # bfloat16
    assert (tmp_path / "eye.safetensors").stat().st_size <= 500_000


def test_a_file_that_is_no_network_is_said_in_one_line(root, tmp_path):
    from common.errors import UserError

    for path in (root / "assets" / "tiny.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match="is no judge"):
            eye.Eye.from_file(path)
    damaged = eye.Eye()
    damaged.head.weight.data[3, 5] = float("nan")
    damaged.save(tmp_path / "eye.safetensors")
    with pytest.raises(UserError, match=r"head\.weight holds values that are not finite"):
        eye.Eye.from_file(tmp_path / "eye.safetensors")


def test_the_command_goes_from_a_checkpoint_to_a_table(root, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(judge, "FaceReader", lambda *a, **k: KnownFaces())
    options = ["--count", 2, "--steps", 2, "--out", tmp_path / "out", "--no-reference", "--shuffle"]
    code, text, errors = in_process(judge.main, "judge.py", *options)
    assert code == 0, errors
    assert "| | with reference | another's reference | no reference | drawn |" in text
    assert (tmp_path / "out" / "sheet.png").is_file() and judge.LEGEND in text and "is 1 in 2" in text
    rows = tmp_path / "out" / "rows.json"
    assert len(judge.read_rows(rows)) == 2
    code, text, errors = in_process(judge.main, "judge.py", *options, "--against", rows)
    assert code == 0, errors
    assert "| similarity ↑ | " in text and "| 0.000 | 0.000 | 0 | 0 |" in text  # one seed is one video


def test_videos_are_those_of_sample_py(root, tmp_path, in_process):
    """Batched as they are: the same noise, prompt, photo and defaults give the same pixels."""
    from PIL import Image

    import sample
    from common.media import read_frames

    path, told = root / "assets" / "tiny.safetensors", judge.cases(3, 2)
    recipe = judge.recipe_of(path, steps=3)
    photos = [case["reference"] for case in told]
    cpu = torch.device("cpu"), torch.float32
    videos = judge.make_videos(path, root / "assets" / "gemma", told, photos, [4, 9], recipe, *cpu)
    Image.fromarray(photos[1]).save(tmp_path / "ref.png")
    options = ["--ref", tmp_path / "ref.png", "--prompt", told[1]["caption"], "--seed", 9, "--steps", 3]
    shown = []
    keep = sample.to_uint8
    sample.to_uint8, restore = lambda video: shown.append(keep(video)) or shown[-1], keep
    try:
        code, _, errors = in_process(sample.main, "sample.py", *options, "--device", "cpu", "--out", tmp_path / "v.mp4")
    finally:
        sample.to_uint8 = restore
    assert code == 0, errors
    assert np.abs(shown[0].astype(int) - videos[1]).max() <= 1
    assert read_frames(tmp_path / "v.mp4", [0]).shape == (1, 64, 64, 3)
    assert np.abs(videos[0].astype(int) - videos[1]).mean() > 1


@pytest.fixture(scope="module")
def judged(root):
    """Of the model in assets/ and 16 people, in 12 steps: the own photo's shares, those of the next one's, of none."""
    path, count = root / "assets" / "tiny.safetensors", 16
    told, look = judge.cases(0, count), eye.Eye.from_file(root / "assets" / "judge.safetensors")
    reader, cpu = FaceReader(root / "assets" / "faces", det_size=128), (torch.device("cpu"), torch.float32)
    recipe, following = judge.recipe_of(path, steps=12), [*range(1, count), 0]

    def shares_of(photos, given=None):
        shown = [told[k]["reference"] for k in photos] if photos else None
        made = judge.make_videos(path, root / "assets" / "gemma", told, shown, [*range(count)], recipe, *cpu)
        rows = judge.measure(made, told, reader, look, given)
        return {
            key: np.mean([row[key] for row in rows if row[key] is not None]) for key in rows[0] if key in judge.COLUMNS
        }

    return shares_of([*range(count)]), shares_of(following, following), shares_of(None)


@pytest.mark.slow
def test_the_committed_model_shows_who_is_in_the_photo(judged):
    """A smaller draw of what README reports, with its controls. Chance is 1 in 16.

    The goal for 64 people is 0.8 each, of which chance may take 0.1 from 16. Only ten of them have a direction: two
    and a half standard deviations less than the share of 128, 0.88."""
    own, others, none = judged
    assert own["retrieved"] >= 0.7 and own["background"] >= 0.75 and own["direction"] >= 0.88 - 0.26, own
    assert others["retrieved"] <= 0.25 and none["retrieved"] <= 0.25
    assert others["retrieved_permuted"] >= 0.5  # it is whoever is in the photo


def test_the_cases_are_written_as_they_are_judged(tmp_path, in_process):
    code, _, errors = in_process(judge.main, "judge.py", "--write", tmp_path, "--count", 3, "--seed", 5)
    assert code == 0, errors
    told = judge.cases(5, 3)
    for k, case in enumerate(read_cases(tmp_path / "cases.jsonl")):
        assert np.array_equal(np.asarray(read_image(case.reference)), told[k]["reference"])
        assert (case.prompt, case.seed) == (told[k]["caption"], 15 + k)
    assert k == 2


@pytest.mark.slow
def test_own_photos_score_higher_than_foreign_ones_through_the_commands(root, tmp_path, in_process):
    """sample.py --batch, then eval.py against each case's own photo, and against the next case's."""
    count = 8
    cases, videos = tmp_path / "cases.jsonl", tmp_path / "videos"
    assert in_process(judge.main, "judge.py", "--write", tmp_path, "--count", count)[0] == 0
    code, printed, errors = in_process(sample.main, "sample.py", "--batch", cases, "--out", videos)
    assert code == 0 and printed.count("similarity to the photo") == count, errors
    rows = [json.loads(line) for line in cases.read_text().splitlines()]
    others = tmp_path / "others.jsonl"
    moved = [row | {"reference": rows[(k + 1) % count]["reference"]} for k, row in enumerate(rows)]
    others.write_text("".join(json.dumps(row) + "\n" for row in moved))
    scores = []
    for listed in (cases, others):
        options = ["--faces", root / "assets" / "faces", "--det-size", 128, "--clip", "none"]
        options += ["--videos", videos, "--cases", listed, "--out", tmp_path / listed.stem]
        assert in_process(evaluation.main, "eval.py", *options)[0] == 0
        with open(tmp_path / listed.stem / "scores.csv") as file:
            scores.append([float(row["facesim_arc"]) for row in csv.DictReader(file)])
    own, foreign = np.array(scores)
    assert own.mean() > foreign.mean() + 0.25 and (own > foreign).mean() >= 0.75, (own, foreign)

"""toy/cache.py and tempting references: what changes and what does not, and the identity of the cache."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.cache import CachedClips
from toy import cache
from toy import world as toy
from toy.portrait import render
from toy.world import APART, Temptation, toy_clip

CLIP, SCENE = (Temptation(reference=kind, share=1.0) for kind in ("same clip", "same scene"))


def clips(temptation, count=12):
    return [toy_clip(4, k, 9, 32, 12.0, temptation=temptation) for k in range(count)]


def same(a, b):
    return np.array_equal(a["reference"], b["reference"])


# ---------------------------------------------------------------------------------------------------------------------
# References


def test_only_the_reference_changes():
    for apart, clip, scene in zip(clips(APART), clips(CLIP), clips(SCENE)):
        for other in (clip, scene):
            assert np.array_equal(apart["frames"], other["frames"]) and apart["caption"] == other["caption"]
            assert apart["identity"] == other["identity"] and not same(apart, other)
        assert np.array_equal(toy.scene_vector(apart["scene"]), toy.scene_vector(clip["scene"]))


def test_a_reference_of_the_same_clip_is_one_of_its_frames():
    chosen = []
    for clip in clips(CLIP):
        (frame,) = [k for k, image in enumerate(clip["frames"]) if np.array_equal(image, clip["reference"])] or [None]
        assert frame is not None
        chosen.append(frame)
        assert np.array_equal(clip["reference_landmarks"], clip["landmarks"][frame])
        assert np.array_equal(clip["reference_box"], clip["boxes"][frame])
        vectors = toy.scene_vector(clip["scene"])
        assert np.array_equal(toy.scene_vector(clip["reference_scene"])[0], vectors[frame])
    assert len(set(chosen)) > 3  # any frame, not always the first


def test_a_reference_of_the_same_scene_shares_all_but_the_pose():
    pose = len(toy.POSE)
    for apart, clip in zip(clips(APART), clips(SCENE)):
        reference, scene = (toy.scene_vector(clip[key]) for key in ("reference_scene", "scene"))
        np.testing.assert_array_equal(reference[0, pose:], scene[0, pose:])
        np.testing.assert_array_equal(reference[0, :pose], toy.scene_vector(apart["reference_scene"])[0, :pose])
        assert np.abs(reference[0, :pose] - scene[:, :pose]).max(1).min() > 0.01  # no frame of the clip
        assert np.array_equal(render(clip["identity"], clip["reference_scene"], 32)[0], clip["reference"])


def test_the_share_is_a_chance_and_a_larger_one_tempts_the_same_clips_and_more():
    scenes = [toy.draw_scene(np.random.default_rng(k), 3) for k in range(400)]
    portrait = toy.draw_scene(np.random.default_rng(-1 % 2**32), 1, moving=False)

    def tempted(share):
        temptation = Temptation(reference="same scene", share=share)
        rngs = [np.random.default_rng((1, k)) for k in range(len(scenes))]
        return np.array(
            [toy.tempting_scene(temptation, s, portrait, rng) is not portrait for s, rng in zip(scenes, rngs)]
        )

    none, quarter, half, every = (tempted(share) for share in (0.0, 0.25, 0.5, 1.0))
    assert not none.any() and every.all() and (half | ~quarter).all()
    for share, found in ((0.25, quarter), (0.5, half)):
        assert abs(found.mean() - share) < 4 * (share * (1 - share) / len(scenes)) ** 0.5


def test_references_of_an_evaluation_are_never_tempting():
    with pytest.raises(ValueError, match="test split"):
        toy_clip(0, 0, 5, split="test", temptation=CLIP)
    for clip in (toy_clip(0, k, 5, 32, split="test") for k in range(8)):
        assert clip["reference_scene"].motions == ()
        background = replace(clip["scene"], pose=clip["reference_scene"].pose)
        assert not np.array_equal(render(clip["identity"], background, 32)[0], clip["reference"])


# ---------------------------------------------------------------------------------------------------------------------
# The command


def make(in_process, folder, *options):
    return in_process(cache.main, "toy.cache", "--out", folder, "--count", 5, "--device", "cpu", *options)


def test_the_command_makes_the_clips_and_is_recognized(in_process, tmp_path):
    code, _, error = make(in_process, tmp_path / "apart")
    assert code == 0, error
    settings = json.loads((tmp_path / "apart" / "cache.json").read_text())
    assert "share" not in settings and "reference" not in settings  # caches of before are recognized
    cached = CachedClips(tmp_path / "apart")
    drawn = {clip["caption"]: clip for clip in (toy_clip(0, k, 17, 64, 12.0) for k in range(5))}
    for item in cached:
        assert np.array_equal(np.asarray(item["image"]), drawn[item["caption"]]["reference"])
    assert make(in_process, tmp_path / "apart")[0] == 0  # again: nothing to do
    code, _, error = make(in_process, tmp_path / "apart", "--reference", "same clip")
    assert code == 2 and "reference = None" in error and len(error.splitlines()) == 1

    code, _, error = make(in_process, tmp_path / "clip", "--reference", "same clip", "--share", 1)
    assert code == 0, error
    settings = json.loads((tmp_path / "clip" / "cache.json").read_text())
    assert (settings["reference"], settings["share"]) == ("same clip", 1.0)
    for item in CachedClips(tmp_path / "clip"):
        assert (drawn[item["caption"]]["frames"] == np.asarray(item["image"])).all((1, 2, 3)).any()
    pairs = list(zip(cached, CachedClips(tmp_path / "clip"), strict=True))
    assert all(torch.equal(a["latents"], b["latents"]) and a["caption"] == b["caption"] for a, b in pairs)


@pytest.mark.parametrize(
    "options, says",
    [
        (["--reference", "same"], "'apart', 'same clip' or 'same scene'"),
        (["--reference", "same clip", "--share", "1.5"], "share = 1.5"),
        (["--reference", "same clip", "--share", "nan"], "share"),
        (["--share", "0.5"], "needs a relation"),
        (["--count", "0"], "--count"),
        (["--count", "2000000000"], "--count"),
        (["--seed", "-1"], "--seed"),
        (["--device", "banana"], "banana"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(in_process, tmp_path, options, says):
    code, _, error = make(in_process, tmp_path / "cache", *options)
    assert code == 2 and says in error and len(error.splitlines()) == 1
    assert not (tmp_path / "cache").exists()

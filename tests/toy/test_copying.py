"""toy/copying.py: its means, differences and standard errors against numpy by hand."""

import json

import numpy as np
import pytest

from toy import copying, judge
from toy.copying import Key
from toy.eye import CLASSES

rng = np.random.default_rng(0)
SEEDS = 3
MARKS = 50, 100
# Similarity and copying of the base, then of each row after MARKS: (training seeds, 3).
BASE = np.array([0.04, 0.06, 0.05]), np.array([0.00, 0.02, -0.01])
FAST = np.array([[0.20, 0.50], [0.22, 0.55], [0.25, 0.48]]), np.array([[0.3, 0.8], [0.2, 0.7], [0.4, 0.9]])
SLOW = np.array([[0.10, 0.30], [0.12, 0.28], [0.08, 0.35]]), np.array([[0.1, 0.3], [0.1, 0.2], [0.0, 0.4]])


def mean(similarity, copied):
    keys = [*copying.COLUMNS, "retrieved_permuted", "copied control"]
    return dict.fromkeys(keys, 0.25) | {"similarity": float(similarity), "copied": float(copied), "videos": 16}


def measured(kind="same-clip-1"):
    """The base, a row that learns fast ("reference") and a slow one ("tass"), by training seed."""
    results = {Key("apart", "base", 1200): {seed: mean(BASE[0][seed], BASE[1][seed]) for seed in range(SEEDS)}}
    for row, (similarity, copied) in (("reference", FAST), ("tass", SLOW)):
        for k, steps in enumerate(MARKS):
            pairs = zip(similarity[:, k], copied[:, k])
            results[Key(kind, row, steps)] = {seed: mean(*pair) for seed, pair in enumerate(pairs)}
    return results


def video_row(photo):
    row = dict.fromkeys(("retrieved", "retrieved_permuted", "motion", "skin", *CLASSES), True)
    row |= {"similarity": rng.normal(), "face_rate": 1.0, "drift": rng.uniform(), "direction": None}
    row |= {"background": bool(rng.integers(2)), "motions": {"nod": True}, "shirt": None, "grain": None}
    shown = [None if rng.random() < 0.2 else float(x) for x in rng.normal(size=23) + photo]
    return row | {"shown": shown, "photo": photo.tolist(), "photo_read": (photo + rng.normal(size=23) / 5).tolist()}


def slope(videos, photos, at):
    """How far the videos' scenes follow the scenes of these photos, number by number as the docstring of `copied`."""
    above = below = 0.0
    for k in at:
        there = [i for i in range(len(videos)) if videos[i]["shown"][k] is not None]
        v, r, j = (
            np.array([of[i][key][k] for i in there])
            for of, key in ((videos, "shown"), (photos, "photo"), (photos, "photo_read"))
        )
        above += ((v - v.mean()) * (r - r.mean())).sum()
        below += ((j - j.mean()) * (r - r.mean())).sum()
    return above / below


def test_results_are_read_by_row_steps_scales_and_training_seed(tmp_path):
    rows = {}
    names = "apart/base-0-0-7", "same-clip-1/tass-0-0-3", "same-clip-1/tass-0-1-3", "same-clip-1/tass-1-2-3-2-5"
    for name in (*names, "apart/far-right-0-0-3"):  # a placement of the user's may have a hyphen
        rows[name] = [video_row(rng.normal(size=23)) for _ in range(6)]
        judge.write_text(tmp_path / "results" / f"{name}.json", json.dumps(rows[name]))
    results = copying.read_results(tmp_path)
    tass, swept = Key("same-clip-1", "tass", 3), Key("same-clip-1", "tass", 3, (2, 5))
    assert set(results) == {Key("apart", "base", 7), tass, swept, Key("apart", "far-right", 3)}
    assert list(results[tass]) == [0] and list(results[swept]) == [1]
    videos = rows["same-clip-1/tass-0-0-3"] + rows["same-clip-1/tass-0-1-3"]  # the people of one training seed
    means = results[tass][0]
    for key in ("similarity", "drift", "background"):
        assert means[key] == pytest.approx(np.mean([row[key] for row in videos]))
    assert np.isnan(means["direction"])  # no prompt has one
    groups = np.split(np.arange(17 + 3), [6, 10, 14, 17])  # pose, expression, light, background, shirt
    for name, at in zip(("pose", "expression", "light", "background", "shirt"), groups):
        assert means[f"copied {name}"] == pytest.approx(slope(videos, videos, at))
    assert means["copied"] == pytest.approx(np.mean([slope(videos, videos, at) for at in groups]))
    following = videos[1:] + videos[:1]
    assert means["copied control"] == pytest.approx(np.mean([slope(videos, following, at) for at in groups]))


def test_differences_at_equal_steps_and_at_equal_similarity():
    """Half of the copying after equal steps, and the same or more of it at the same similarity: within each seed."""
    results, rows = measured(), ("same-clip-1", "reference", "tass", "copied")
    after = copying.differences(results, *rows, copying.equal_steps)
    np.testing.assert_allclose(after, SLOW[1][:, -1] - FAST[1][:, -1])
    expected = []
    for seed in range(SEEDS):
        reached = SLOW[0][seed, -1]  # the slow row reaches least
        curve = [[BASE[n][seed], *FAST[n][seed]] for n in range(2)]
        expected.append(SLOW[1][seed, -1] - np.interp(reached, *curve))
    equal = copying.differences(results, *rows, copying.equal_identity)
    np.testing.assert_allclose(equal, expected)
    np.testing.assert_allclose(
        copying.differences(results, "same-clip-1", "tass", "reference", "copied", copying.equal_identity),
        -np.array(expected),
    )
    # On the fast row's straight line from 0.20 to 0.50, similarity 0.30 is a third of the way from 0.3 to 0.8.
    assert expected[0] == pytest.approx(0.3 - (0.3 + 0.5 / 3))


def test_rows_of_an_interrupted_study_are_compared_after_the_steps_that_both_have():
    results = measured()
    del results[Key("same-clip-1", "tass", 100)]
    found = copying.differences(results, "same-clip-1", "reference", "tass", "copied", copying.equal_steps)
    np.testing.assert_allclose(found, SLOW[1][:, 0] - FAST[1][:, 0])
    del results[Key("same-clip-1", "reference", 100)][1], results[Key("apart", "base", 1200)][2]  # seeds 1 and 2 lack
    found = copying.differences(results, "same-clip-1", "reference", "tass", "similarity", copying.equal_steps)
    np.testing.assert_allclose(found, SLOW[0][:1, 0] - FAST[0][:1, 0])
    assert not copying.differences(results, "apart", "reference", "tass", "copied", copying.equal_steps)


def test_tables_have_means_and_standard_errors_over_training_seeds():
    def cell(values, sign=""):
        return f"{values.mean():{sign}.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"

    lines = copying.numbers(measured()).splitlines()
    assert lines[0] == "## Training references: same clip, share 1"
    (row,) = [line for line in lines if line.startswith("| + TASS-RoPE |")]
    assert row.startswith(f"| + TASS-RoPE | 3 | 48 | {cell(SLOW[0][:, -1])} |") and f"| {cell(SLOW[1][:, -1])} |" in row
    assert f"| base: text to video | 3 | 48 | {cell(BASE[0])} |" in "\n".join(lines)
    steps, identity = [line for line in lines if line.startswith("| tass less reference |")]
    difference = SLOW[0][:, -1] - FAST[0][:, -1]
    assert abs(difference.mean()) > 2 * difference.std(ddof=1) / 3**0.5
    assert steps.startswith(f"| tass less reference | **{cell(difference, '+')}** |")
    assert identity.count("|") == steps.count("|") - 1  # without the similarity, which is equal


def test_only_a_difference_above_two_standard_errors_is_bold():
    assert copying.cell([0.10, 0.32], "+") == "+0.21 ± 0.11"
    assert copying.cell([0.12, 0.32], "+") == "**+0.22 ± 0.10**"
    assert copying.cell([-0.2, -0.3], "+") == "**-0.25 ± 0.05**"
    assert copying.cell([0.2, 0.3]) == "0.25 ± 0.05" and copying.cell([0.2]) == "0.20"
    assert copying.cell([0.5], "+") == "+0.50" and copying.cell([float("nan")]) == ""


def test_figures_show_what_was_measured_and_nothing_else(tmp_path):
    results = measured()
    assert copying.draw(tmp_path / "a", {}) == [] and not (tmp_path / "a").exists()
    assert copying.draw(tmp_path / "b", results) == [tmp_path / "b" / "copying.png"]
    figure = copying.draw_copying(results)
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].get_lines()}
    for row, (similarity, copied) in (("reference", FAST), ("tass", SLOW)):
        x, y = ([base.mean(), *each.mean(0)] for base, each in zip(BASE, (similarity, copied)))
        np.testing.assert_allclose(lines[copying.TITLES[row]], np.stack([x, y], 1))
    for s_r in (5, 2):
        results[Key("same-clip-1", "tass", 100, (2, s_r))] = {0: mean(0.1 * s_r, 0), 1: mean(0.3 * s_r, 0)}
    assert [path.name for path in copying.draw(tmp_path / "c", results)] == ["copying.png", "guidance.png"]
    figure = copying.draw_sweep(results)
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_xydata(), [[2, 0.4], [5, 1.0]])

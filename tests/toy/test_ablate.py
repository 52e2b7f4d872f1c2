"""toy/ablate.py: the changes of each row, the table by hand, a small run through train.py and judge.py, continued."""

import json
import re

import numpy as np
import pytest

from config import as_dict
from toy import ablate
from toy.ablate import Ablation, Budget
from toy.world import Temptation

BUDGET = Budget(base=7, row=3, clips=5, people=2, change={"optim.batch": 8, "optim.lr": 0.5})


def test_each_row_is_the_one_before_plus_one_component(tmp_path):
    """Table 1's order, as train.py's own reader of configs understands it."""
    ablation = Ablation(BUDGET, tmp_path, ["optim.batch=6"])

    def config(name):
        return as_dict(ablate.read(ablation.options(name, 0)))

    base, reference, tass, augmentation, identity = map(config, list(ablate.ROWS)[:5])
    assert not augmentation["faces"]["pack"] and identity["faces"]["pack"].endswith("assets/faces")
    assert base["optim"]["batch"] == identity["optim"]["batch"] == 6
    assert base["optim"]["lr"] == identity["optim"]["lr"] == 0.5  # the budget's, where the user says nothing
    assert base["data"]["cache"].endswith("-5")
    assert (base["reference"]["use"], base["model"]["scratch"], base["optim"]["steps"]) == (False, True, 7)
    assert (reference["reference"]["use"], reference["reference"]["placement"]) == (True, "overlap")
    for before, after, (section, key), value in (
        (reference, tass, ("reference", "placement"), "tass"),
        (tass, augmentation, ("reference", "augment"), True),
        (augmentation, identity, ("faces", "pack"), identity["faces"]["pack"]),
    ):
        assert after[section][key] == value
        before[section][key], before["run"]["out"] = value, after["run"]["out"]
        assert before == after
        assert after["model"]["ckpt"].endswith("base-0.safetensors") and after["optim"]["steps"] == 3
    for placement in ("temporal", "fixed", "remote"):
        other, tass = config(placement), config("tass")
        assert other["reference"]["placement"] == placement
        other["reference"]["placement"], other["run"]["out"] = "tass", tass["run"]["out"]
        assert other == tass


def test_needed_rows_are_trained_in_order():
    assert ablate.needed(["guidance"]) == ["base", "identity", "guidance"]
    assert ablate.needed(["remote", "tass"]) == ["base", "tass", "remote"]


def test_an_option_that_the_ablation_overrules_is_an_error(in_process, tmp_path):
    for change, setter in (
        ("optim.steps=5", "--budget"),
        ("run.seed=3", "--training-seeds"),
        ("reference.placement=phase", "row reference"),
        ("guidance.s_ref=4", "row base"),
    ):
        code, _, error = in_process(ablate.main, "ablate.py", "--out", tmp_path / "out", "--set", change)
        assert code == 2 and f"--set {change} would have no effect" in error and setter in error
    assert not (tmp_path / "out").exists()
    Ablation(BUDGET, tmp_path, ["optim.lr=0.1", "data.cache=c", "reference.augment=true"]).refuse_overruled(["base"])


def test_temptation_is_part_of_the_folders_and_of_the_settings(in_process, tmp_path, monkeypatch):
    tempting = Ablation(BUDGET, tmp_path, [], Temptation(reference="same clip", share=0.5))
    assert tempting.cache().name == "toy-5-same-clip-0.5" and Ablation(BUDGET, tmp_path).cache().name == "toy-5"
    for words, name in (
        ([], "ablation-small"),
        (["--reference", "same scene", "--share", "0.25"], "ablation-small-same-scene-0.25"),
        (["--reference", "same clip"], "ablation-small-same-clip-1"),
        (["--reference", "same clip", "--share", "0"], "ablation-small"),
    ):
        monkeypatch.setattr("sys.argv", ["ablate.py", *words])
        assert ablate.parse_arguments().out.name == name
    ablate.same_settings(tempting)
    ablate.same_settings(tempting)
    monkeypatch.setitem(ablate.BUDGETS, "small", BUDGET)
    code, _, error = in_process(ablate.main, "ablate.py", "--out", tmp_path)
    assert code == 2 and "was begun with toy.reference = same clip and this run has apart" in error


def test_the_table_by_hand():
    empty = dict.fromkeys(ablate.FIGURES)
    results = {
        "base": [empty | {"similarity": 0.25, "retrieved": 0.0}, empty | {"similarity": 0.75, "retrieved": 0.5}],
        "tass": [empty | {"similarity": 0.5}],
    }
    head, line, base, tass = ablate.table(results).splitlines()
    assert head.startswith("| row | similarity ↑ | own reference nearest ↑ |") and "| light copied ↓ |" in head
    assert head.count("|") == line.count("|") == base.count("|") == tass.count("|")
    deviation = np.std([0.25, 0.75], ddof=1)
    assert base.startswith(f"| base: text to video | 0.500 ± {deviation:.3f} | 0.25 ± 0.35 |  |")
    assert tass.startswith("| + TASS-RoPE | 0.500 |  |")


@pytest.mark.slow
def test_a_small_run_and_its_continuation(root, tmp_path, in_process, monkeypatch):
    """Base and TASS rows for two steps each, of two people; the second run trains and measures nothing again."""
    here = tmp_path / "here"
    (here / "configs").mkdir(parents=True)
    (here / "assets").mkdir()
    for name in ("train.py", "assets/faces", "assets/gemma"):
        (here / name).symlink_to(root / name)
    config = (root / "configs" / "toy-ablation.toml").read_text()
    config = re.sub(r'cache = "cache/toy"', f'cache = "{tmp_path / "cache"}"', config)
    config = config.replace("batch = 32", "batch = 8").replace("steps = 30", "steps = 2")
    (here / "configs" / "toy-ablation.toml").write_text(config)
    monkeypatch.setattr(ablate, "HERE", here)
    monkeypatch.setitem(ablate.BUDGETS, "small", Budget(base=2, row=2, clips=8, people=2))
    page, figure = tmp_path / "out" / "ablation.md", tmp_path / "out" / "ablation.png"
    options = ["--rows", "tass,base", "--seeds", 2, "--out", tmp_path / "out", "--reference", "same clip"]
    code, _, error = in_process(ablate.main, "ablate.py", *options)
    assert code == 0, error
    made = sorted(path.name for path in (tmp_path / "out" / "results").iterdir())
    names = [f"{name}-0-{seed}.json" for name in ("base", "drawn", "tass") for seed in (0, 1)]
    assert made == names
    assert all(len(json.loads((tmp_path / "out" / "results" / name).read_text())) == 2 for name in made)
    text = page.read_text()
    assert "| base: text to video |" in text and "| + TASS-RoPE |" in text and "(ablation.png)" in text
    assert "a share of 1 is of the same clip" in text
    drawn = ablate.read_results(tmp_path / "out")["drawn"]
    assert all(means["similarity"] > 0.6 and means["background"] == 1 for means in drawn)
    settings = json.loads((tmp_path / "cache-8-same-clip-1" / "cache.json").read_text())
    assert (settings["reference"], settings["share"], settings["toy"]) == ("same clip", 1.0, 8)
    assert figure.stat().st_size > 1000

    page.write_text(text + "What people wrote.\n")
    monkeypatch.setattr(ablate, "run_command", lambda *command: pytest.fail(f"again: {command}"))
    monkeypatch.setattr(ablate.judge, "make_videos", lambda *a, **k: pytest.fail("measured again"))
    code, _, error = in_process(ablate.main, "ablate.py", *options)
    assert code == 0, error
    assert page.read_text() == text + "What people wrote.\n"
    assert not (here / "docs").exists()
    code, _, error = in_process(ablate.main, "ablate.py", *options, "--publish")
    assert code == 0, error
    assert "../assets/ablation.png" in (here / "docs" / "ablation.md").read_text()

    (here / "configs" / "toy-ablation.toml").write_text(config.replace("lr = 1e-3", "lr = 2e-3"))
    code, _, error = in_process(ablate.main, "ablate.py", *options)
    assert code == 2 and "was begun with optim.lr = 0.001 and this run has 0.002" in error

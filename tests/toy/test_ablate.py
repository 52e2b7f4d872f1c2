"""ablate.py: what each row changes, the table by hand, a small run through train.py and judge.py, its continuation."""

import json
import re

import numpy as np
import pytest

from config import read_config
from toy import ablate


def test_each_row_is_the_one_before_plus_one_component(tmp_path):
    """Table 1's order, as train.py's own reader of configs understands it."""

    def config(name):
        budget = {"base": 7, "row": 3, "clips": 5, "change": {"optim.batch": 8, "optim.lr": 0.5}}
        return read_config(*ablate.split(ablate.train_options(name, 0, budget, tmp_path, ["optim.batch=6"])))

    base, reference, tass, augmentation, identity = map(config, list(ablate.ROWS)[:5])
    assert not augmentation["faces"]["pack"] and identity["faces"]["pack"].endswith("assets/faces")
    assert base["optim"]["batch"] == identity["optim"]["batch"] == 6
    assert base["optim"]["lr"] == identity["optim"]["lr"] == 0.5  # the budget's, where the user says nothing
    assert base["data"]["toy"] == 5 and base["data"]["cache"].endswith("-5")
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


def test_the_table_by_hand():
    empty = dict.fromkeys(ablate.FIGURES)
    results = {
        "base": [empty | {"similarity": 0.25, "retrieved": 0.0}, empty | {"similarity": 0.75, "retrieved": 0.5}],
        "tass": [empty | {"similarity": 0.5}],
    }
    head, line, base, tass = ablate.table(results).splitlines()
    assert head.startswith("| row | similarity ↑ | own reference nearest ↑ |")
    assert head.count("|") == line.count("|") == base.count("|") == tass.count("|")
    deviation = np.std([0.25, 0.75], ddof=1)
    assert base.startswith(f"| base: text to video | 0.500 ± {deviation:.3f} | 0.25 ± 0.35 |  |")
    assert tass.startswith("| + TASS-RoPE | 0.500 |  |")


@pytest.mark.slow
def test_a_small_run_and_its_continuation(root, tmp_path, in_process, monkeypatch):
    """Base and TASS rows for two steps each, of two people; the second run trains and measures nothing again."""
    here = tmp_path / "here"
    (here / "configs").mkdir(parents=True)
    for name in ("train.py", "assets"):
        (here / name).symlink_to(root / name)
    config = (root / "configs" / "toy-ablation.toml").read_text()
    config = re.sub(r'cache = "cache/toy"', f'cache = "{tmp_path / "cache"}"', config)
    config = config.replace("batch = 32", "batch = 8").replace("steps = 30", "steps = 2")
    (here / "configs" / "toy-ablation.toml").write_text(config)
    monkeypatch.setattr(ablate, "HERE", here)
    monkeypatch.setitem(ablate.BUDGETS, "small", {"base": 2, "row": 2, "clips": 8, "people": 2, "change": {}})
    page, figure = tmp_path / "docs" / "ablation.md", tmp_path / "pictures" / "ablation.png"
    options = ["--rows", "tass,base", "--seeds", 2, "--out", tmp_path / "out", "--page", page, "--figure", figure]
    code, _, error = in_process(ablate.main, "ablate.py", *options)
    assert code == 0, error
    made = sorted(path.name for path in (tmp_path / "out" / "results").iterdir())
    assert made == ["base-0-0.json", "base-0-1.json", "tass-0-0.json", "tass-0-1.json"]
    assert all(len(json.loads((tmp_path / "out" / "results" / name).read_text())) == 2 for name in made)
    text = page.read_text()
    assert "| base: text to video |" in text and "| + TASS-RoPE |" in text and "../pictures/ablation.png" in text
    assert figure.stat().st_size > 1000

    page.write_text(text + "What people wrote.\n")
    monkeypatch.setattr(ablate, "run_command", lambda *command: pytest.fail(f"again: {command}"))
    monkeypatch.setattr(ablate, "make_videos", lambda *a, **k: pytest.fail("measured again"))
    code, _, error = in_process(ablate.main, "ablate.py", *options)
    assert code == 0, error
    assert page.read_text() == text + "What people wrote.\n"

    (here / "configs" / "toy-ablation.toml").write_text(config.replace("lr = 1e-3", "lr = 2e-3"))
    code, _, error = in_process(ablate.main, "ablate.py", *options)
    assert code == 2 and "other settings" in error

"""toy/ablate.py: changes of each row, runs of the study, processes and deadline, a small run and its continuation."""

import json
import math
import os
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest

from common.errors import UserError
from config import as_dict
from toy import ablate, copying, judge
from toy.ablate import Ablation, Budget, Run
from toy.world import APART, Temptation

BUDGET = Budget(base=7, row=3, clips=5, people=2, change={"optim.batch": 8, "optim.lr": 0.5})


def test_each_row_is_the_one_before_plus_one_component(tmp_path):
    """Table 1's order, as train.py's own reader of configs understands it."""
    ablation = Ablation(BUDGET, tmp_path, ["optim.batch=6"])

    def config(name):
        return as_dict(ablate.read(ablation.options(Run(name, 0))))

    base, reference, tass, augmentation, identity = map(config, list(ablate.ROWS)[:5])
    assert not augmentation["faces"]["pack"] and identity["faces"]["pack"].endswith("assets/faces")
    assert base["optim"]["batch"] == identity["optim"]["batch"] == 6
    assert base["optim"]["lr"] == identity["optim"]["lr"] == 0.5  # the budget's, where the user says nothing
    assert base["data"]["cache"] == f"{tmp_path}/apart/cache" and base["model"]["gemma"] == f"{tmp_path}/gemma"
    assert base["model"]["ckpt"] == f"{tmp_path}/start.safetensors"
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
        assert after["model"]["ckpt"].endswith("base-0-7.safetensors") and after["optim"]["steps"] == 3
    for placement in ("temporal", "fixed", "remote"):
        other, tass = config(placement), config("tass")
        assert other["reference"]["placement"] == placement
        other["reference"]["placement"], other["run"]["out"] = "tass", tass["run"]["out"]
        assert other == tass


@pytest.mark.parametrize("budget", ablate.BUDGETS)
def test_on_a_gpu_the_rows_are_compiled_and_in_bf16_unless_the_user_says_otherwise(budget, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    ablation = Ablation(ablate.BUDGETS[budget], tmp_path, ["parallel.compile=false"], jobs=4)
    for row in ablate.ROWS:
        config = ablate.read(ablation.options(Run(row, 0)))
        assert config.parallel.precision == "bf16" and not config.parallel.compile
        assert config.data.workers == (8 if row == "base" else 0)


def test_the_runs_of_the_study(monkeypatch):
    def runs(*words):
        monkeypatch.setattr("sys.argv", ["ablate.py", *words])
        return ablate.plan(ablate.parse_arguments())

    assert list(runs("--rows", "guidance")) == [Run("base", 0), Run("identity", 0), Run("guidance", 0)]
    study = runs("--study", "--training-seeds", "3")
    rows = {}
    for run in study:
        rows.setdefault(ablate.label(run.temptation), []).append((run.row, run.seed))
    core = {"identity", "reference", "tass", "phase", "augmentation"}
    for kind, expected in {
        "apart": core | {"base"},
        "same-clip-0.5": core,
        "same-clip-1": core | {"guidance", "temporal", "fixed", "remote"},
    }.items():
        assert sorted(rows[kind]) == sorted((row, seed) for row in expected for seed in range(3))
    order = list(study)
    first_placement = order.index(Run("temporal", 0, ablate.CLIP))
    assert all(order.index(Run(row, seed, ablate.HALF)) < first_placement for row in core for seed in range(3))
    swept = {(run.row, ablate.label(run.temptation)) for run, sweep in study.items() if sweep}
    assert swept == {(row, "same-clip-0.5") for row in ("reference", "tass", "augmentation")}
    few = runs("--study", "--rows", "remote")
    assert list(few) == [Run("base", 0), Run("remote", 0, ablate.CLIP)]
    with pytest.raises(UserError, match="leave out --reference"):
        runs("--study", "--reference", "same clip")


def test_a_row_is_measured_after_the_steps_at_which_its_weights_exist(tmp_path):
    """A row that shares weights finds those of the last step only."""
    ablation = Ablation(Budget(base=7, row=5, clips=5, people=2, marks=(1, 3)), tmp_path)
    assert [ablation.marks(row) for row in ("base", "identity", "guidance")] == [[7], [1, 3, 5], [5]]


def mark(folder, name, wait=0.0):
    time.sleep(wait)
    (folder / name).write_text("done")


def fail():
    raise UserError("this task fails")


@pytest.mark.slow
def test_processes_share_the_tasks_and_a_failure_stops_no_other(tmp_path, capfd):
    tasks = [fail, *[partial(mark, tmp_path, str(k)) for k in range(4)]]
    assert ablate.do_all(tasks, 2, math.inf) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]
    assert "error: this task fails" in capfd.readouterr().err


@pytest.mark.slow
def test_at_the_deadline_unfinished_work_is_given_up(tmp_path):
    for jobs in (1, 2):
        ablate.do_all([partial(mark, tmp_path, f"late {jobs}")], jobs, time.monotonic())
    ablate.do_all([partial(mark, tmp_path, f"slow {k}", 600) for k in range(3)], 2, time.monotonic() + 0.5)
    assert not list(tmp_path.iterdir())


RUN = """
import math, os, time
from functools import partial
from pathlib import Path
from toy import ablate

def note_and_wait(path):
    path.with_suffix(".part").write_text(str(os.getpid()))
    path.with_suffix(".part").rename(path)
    time.sleep(3600)

if __name__ == "__main__":
    ablate.do_all([partial(note_and_wait, Path(__file__).with_name(name)) for name in ("1.pid", "2.pid")], 2, math.inf)
"""


@pytest.mark.slow
def test_the_workers_of_a_killed_run_end(root, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    environment = os.environ | {"PYTHONPATH": str(root)}
    parent = subprocess.Popen([sys.executable, tmp_path / "run.py"], env=environment)
    while len(notes := list(tmp_path.glob("*.pid"))) < 2:
        assert parent.poll() is None
        time.sleep(0.1)
    workers = [psutil.Process(int(note.read_text())) for note in notes]
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=600)
    for worker in alive:
        worker.kill()
    assert not alive


def test_an_option_that_the_ablation_overrules_is_an_error(in_process, tmp_path):
    for change, setter in (
        ("optim.steps=5", "--budget"),
        ("run.seed=3", "--training-seeds"),
        ("data.cache=c", "--out"),
        ("reference.placement=phase", "row reference"),
        ("guidance.s_ref=4", "row base"),
    ):
        code, _, error = in_process(ablate.main, "ablate.py", "--out", tmp_path / "out", "--set", change)
        assert code == 2 and f"--set {change} would have no effect" in error and setter in error
    assert not (tmp_path / "out").exists()
    Ablation(BUDGET, tmp_path, ["optim.lr=0.1", "reference.augment=true"]).refuse_overruled(["base"])


def test_kinds_of_references_have_folders_and_other_settings_are_refused(in_process, tmp_path, monkeypatch):
    ablation = Ablation(BUDGET, tmp_path)
    run = Run("tass", 1, Temptation(reference="same clip", share=0.5))
    assert ablation.cache(run.temptation) == tmp_path / "same-clip-0.5" / "cache"
    assert ablation.weights(run) == tmp_path / "same-clip-0.5" / "tass-1-3.safetensors"
    assert ablation.weights(run, 2) == tmp_path / "same-clip-0.5" / "tass-1-2.safetensors"
    assert ablation.weights(Run("base", 1)) == tmp_path / "apart" / "base-1-7.safetensors"
    ablate.same_settings(ablation)
    ablate.same_settings(Ablation(BUDGET, tmp_path, device="cuda", jobs=9))
    monkeypatch.setitem(ablate.BUDGETS, "small", BUDGET)
    code, _, error = in_process(ablate.main, "ablate.py", "--out", tmp_path, "--set", "optim.betas=[0.5,0.5]")
    assert code == 2 and "was begun with optim.betas" in error


SMALLEST = Budget(2, 2, 8, 2, 2, {"optim.batch": 8, "optim.decay": "constant", "guidance.steps": 2}, marks=(1,))


def test_only_caches_of_rows_without_weights_are_made(tmp_path, in_process, monkeypatch):
    """A further row on the trained base needs the cache of its own references and no other."""
    made, tasks, clip = [], [], Temptation(reference="same clip", share=1.0)
    monkeypatch.setattr(ablate, "make_start", lambda ablation: None)
    monkeypatch.setattr(ablate, "make_cache", lambda kind, *rest: made.append(kind))
    monkeypatch.setattr(ablate, "do_all", lambda given, *rest: tasks.append(given) or 0)
    for words, kinds in ((["--rows", "base"], [APART]), (["--reference", "same clip", "--rows", "tass"], [clip])):
        made.clear(), tasks.clear()
        code, _, error = in_process(ablate.main, "ablate.py", *words, "--out", tmp_path / "out")
        assert code == 0, error
        begun = [task.args[0] for task in tasks[0] if task.func is ablate.make_cache]
        assert made + begun == kinds
        weights = Ablation(ablate.BUDGETS["small"], tmp_path / "out").weights(Run("base", 0))
        judge.write_text(weights, "trained")


@pytest.mark.slow
def test_a_small_run_and_its_continuation(root, tmp_path, in_process, monkeypatch):
    """Base and TASS rows for two steps each, of two people; the second run trains and measures nothing again."""
    here, out = tmp_path / "here", tmp_path / "out"
    (here / "configs").mkdir(parents=True)
    (here / "assets").mkdir()
    for name in ("train.py", "assets/faces"):
        (here / name).symlink_to(root / name)
    config = (root / "configs" / "toy-ablation.toml").read_text()
    (here / "configs" / "toy-ablation.toml").write_text(config)
    monkeypatch.setattr(ablate, "HERE", here)
    monkeypatch.setitem(ablate.BUDGETS, "small", SMALLEST)
    options = ["--rows", "tass,base", "--seeds", 2, "--out", out, "--reference", "same clip"]
    code, _, error = in_process(ablate.main, "ablate.py", *options)
    assert code == 0, error
    made = sorted((out / "results").glob("*/*.json"))
    assert [path.relative_to(out / "results").as_posix() for path in made] == [
        *[f"apart/{name}.json" for name in ("base-0-0-2", "base-0-1-2", "drawn-0-0-0", "drawn-0-1-0")],
        *[f"same-clip-1/tass-0-{seed}-{steps}.json" for seed in (0, 1) for steps in (1, 2)],
    ]
    assert all(len(json.loads(path.read_text())) == 2 for path in made)
    text = (out / "copying.md").read_text()
    assert "| base: text to video |" in text and "| + TASS-RoPE |" in text and "(copying.png)" in text
    assert "## Training references: same clip, share 1" in text and "guidance.png" not in text
    drawn = copying.read_results(out)[copying.Key("apart", "drawn", 0)][0]
    assert drawn["similarity"] > 0.6 and drawn["background"] == 1
    settings = json.loads((out / "same-clip-1" / "cache" / "cache.json").read_text())
    assert (settings["reference"], settings["share"], settings["toy"]) == ("same clip", 1.0, 8)
    assert (out / "copying.png").stat().st_size > 1000

    (out / "copying.md").write_text("What people wrote.\n" + text)
    monkeypatch.setattr(ablate, "run_command", lambda *command: pytest.fail(f"again: {command}"))
    monkeypatch.setattr(ablate.judge, "make_videos", lambda *a, **k: pytest.fail("measured again"))
    code, _, error = in_process(ablate.main, "ablate.py", *options)
    assert code == 0, error
    assert (out / "copying.md").read_text() == "What people wrote.\n" + text
    assert not (here / "docs").exists()
    code, _, error = in_process(ablate.main, "ablate.py", *options, "--publish")
    assert code == 0, error
    assert "../assets/copying.png" in (here / "docs" / "copying.md").read_text()
    assert (here / "assets" / "copying.png").is_file()

    (here / "configs" / "toy-ablation.toml").write_text(config.replace("lr = 1e-3", "lr = 2e-3"))
    code, _, error = in_process(ablate.main, "ablate.py", *options)
    assert code == 2 and "was begun with optim.lr = 0.001 and this run has 0.002" in error


@pytest.mark.slow
def test_the_smallest_study(tmp_path, in_process, monkeypatch):
    """One row with two kinds of references, two at a time: base, caches, marks, sweep, page."""
    monkeypatch.setitem(ablate.BUDGETS, "minutes", SMALLEST)
    monkeypatch.setattr(ablate, "STUDY", [ablate.Cell(ablate.HALF, ("tass",), ("tass",))])
    monkeypatch.setattr(ablate, "FURTHER", [ablate.Cell(APART, ("tass",))])
    out = tmp_path / "out"
    options = ["--study", "--budget", "minutes", "--seeds", 1, "--jobs", 2, "--out", out]
    code, _, error = in_process(ablate.main, "ablate.py", *options)
    assert code == 0, error
    made = {path.relative_to(out / "results").with_suffix("").as_posix() for path in out.glob("results/*/*.json")}
    expected = {f"{kind}/tass-0-0-{steps}" for kind in ("apart", "same-clip-0.5") for steps in (1, 2)}
    expected |= {f"same-clip-0.5/tass-0-0-2-{s_y}-{s_r}" for s_y, s_r in ablate.SCALES}
    assert made == expected | {"apart/base-0-0-2", "apart/drawn-0-0-0"}
    assert {path.parent.name for path in out.glob("*/cache")} == {"apart", "same-clip-0.5"}
    text = (out / "copying.md").read_text()
    assert text.count("## Training references: ") == 2 and text.count("| + TASS-RoPE | 1 |") == 2
    assert "(copying.png)" in text and "(guidance.png)" in text and "2 rows at a time" in text
    assert (out / "copying.png").is_file() and (out / "guidance.png").is_file()

    code, _, error = in_process(ablate.main, "ablate.py", *options, "--deadline", 0)
    assert code == 0 and copying.numbers(copying.read_results(out)) in text, error

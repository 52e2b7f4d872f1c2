"""Table 1's cumulative ablation in the tiny world: each row is the one before plus one component of the method.

    base ──> + reference ──> + TASS ──> + augmentation ──> + identity losses ──> + decoupled guidance
                                │
                                └──> TASS replaced by a placement that Sec. 3.2 argues against

As in the paper, the base is a text-to-video model, and each further row is fine-tuned from the base's weights: same
seed, same steps, same clips. Decoupled guidance is inference only and shares the weights of the row before it. Rows
are trained by train.py with configs/toy-ablation.toml and the changes below, and measured by toy/judge.py on people,
prompts and pairs of motion and color of the test split. Their DiT is smaller than that of assets/ and their videos are
shorter, so that two cores are enough; the VAE is the same.

    python -m toy.ablate --budget minutes                   # a few steps: does a change run at all?
    python -m toy.ablate --budget small                     # for two cores
    python -m toy.ablate --budget large                     # for a GPU: batches of 256
    python -m toy.ablate --rows base,reference,tass         # only these; the others can follow later
    python -m toy.ablate --reference "same clip" --share 1  # training references are frames of their own clips
    python -m toy.ablate --study --training-seeds 3 --seeds 3 --jobs 2   # all of docs/copying.md
    python -m toy.ablate --set parallel.compile=true        # 1.2 times as fast on two cores; it wants a C++ compiler

The same command again continues: rows that are trained or measured are kept. copying.md, with tables and figures, goes
into the run's folder. --publish also writes docs/copying.md and its figures in assets/.
"""

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.device import hardware, resolve_device
from common.errors import Parser, UserError, one_line_errors, whole, write_text
from common.outputs import require_same
from common.schema import parse_json
from config import ASSETS, Config, as_dict, read_config
from evaluation.metrics import FaceReader
from rope import PLACEMENTS
from toy import copying, judge
from toy.cache import add_temptation, read_temptation
from toy.eye import Eye
from toy.jobs import do_all, run_command, run_program, torchrun
from toy.make import DEFAULTS, ON_GPU, assemble
from toy.text import narrow
from toy.world import APART, Temptation

HERE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Row:
    change: dict[str, Any]  # options of train.py
    shares: str = ""  # the row whose weights this one uses, where only inference differs


TASS = {"reference.placement": "tass"}
AUGMENTED = TASS | {"reference.augment": True}
IDENTITY = AUGMENTED | {"faces.pack": "assets/faces"}
ROWS = {
    "base": Row({"model.scratch": True, "reference.use": False, "guidance.s_ref": 0.0}),
    "reference": Row({"reference.placement": "overlap"}),
    "tass": Row(TASS),
    "augmentation": Row(AUGMENTED),
    "identity": Row(IDENTITY),
    "guidance": Row(IDENTITY | {"guidance.s_ref": 3.0}, shares="identity"),
    **{k: Row({"reference.placement": k}) for k in PLACEMENTS if k not in ("tass", "overlap")},
}


@dataclass(frozen=True)
class Budget:
    base: int  # steps of the base
    row: int  # steps of each further row
    clips: int  # drawn clips of the cache
    people: int  # in an evaluation
    text: int = 800  # steps of the text path
    change: dict[str, Any] = field(default_factory=dict)  # options of train.py, which --set may overrule
    marks: tuple[int, ...] = ()  # steps after which a further row is measured too; the learning rate must not fall


STEADY = {"optim.decay": "constant", "faces.min_weight": 0.2}
QUICK = {"optim.batch": 16, "optim.lr": 1.5e-3, "optim.warmup": 30, "guidance.steps": 10}
BUDGETS = {
    "minutes": Budget(10, 5, 64, 4, 10, STEADY | {"optim.batch": 8, "guidance.steps": 4}, (3,)),
    "gpu": Budget(1_200, 200, 4_000, 48, 800, STEADY | {"optim.batch": 64, "optim.lr": 1.5e-3}, (50, 100)),
    "small": Budget(500, 120, 2_000, 16, 800, STEADY | QUICK, (60,)),
    "long": Budget(500, 960, 2_000, 16, 800, STEADY | QUICK, (480,)),
    "medium": Budget(3_000, 1_200, 16_000, 64),
    "large": Budget(1_800, 600, 16_000, 64, 2_500, {"optim.batch": 256, "optim.lr": 2e-3, "faces.min_weight": 0.5}),
}
DIT = narrow(4) | {"num_layers": 6}  # 128 wide, a fifth of the weights of the model in assets/
SHORT = DEFAULTS | {"frames": 9, "steps": 12, "s_ref": 2.0}  # s_y = s_r, unless a row says otherwise
TITLE = "# Identity and copying in the tiny world\n\n"
PROSE = "<!-- Everything below this line is written by toy/ablate.py. -->"


class Cell(NamedTuple):
    """Rows that are trained with the same kind of references. sweep: also measured at SCALES."""

    temptation: Temptation
    rows: tuple[str, ...]
    sweep: tuple[str, ...] = ()


# The rows of docs/copying.md, the most important first. "identity" takes longest, so it begins first.
CORE, SWEPT = ("identity", "reference", "tass", "phase", "augmentation"), ("reference", "tass", "augmentation")
CLIP, HALF = (Temptation(reference="same clip", share=share) for share in (1.0, 0.5))
STUDY = [Cell(CLIP, CORE), Cell(HALF, CORE, SWEPT), Cell(APART, CORE)]
FURTHER = [Cell(CLIP, ("guidance", "temporal", "fixed", "remote"))]  # after all seeds of the others
SCALES = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (2, 5), (4, 2), (4, 4), (4, 6)]  # (s_y, s_r) of Eq. 13


class Run(NamedTuple):
    """A row trained with one seed on one kind of references. Those of the base do not matter: it sees none."""

    row: str
    seed: int
    temptation: Temptation = APART

    def path(self, out: Path) -> Path:
        return out / label(self.temptation) / f"{self.row}-{self.seed}"


@dataclass(frozen=True)
class Ablation:
    """The settings that all rows share."""

    budget: Budget
    out: Path
    set: list[str] = field(default_factory=list)  # "section.key=value" of the user
    device: str = "cpu"  # of the evaluation
    seeds: int = 2  # evaluation seeds for each training seed
    jobs: int = 1  # rows that are trained at a time

    def cache(self, temptation: Temptation) -> Path:
        return self.out / label(temptation) / "cache"

    @property
    def start(self) -> Path:
        """VAE, text path and a random DiT, from which the base begins."""
        return self.out / "start.safetensors"

    def marks(self, row: str) -> list[int]:
        """The steps after which a row is exported and measured. Weights that a row shares are there at the end only."""
        if row in ("base", "drawn"):
            return [self.budget.base if row == "base" else 0]
        return [*(() if ROWS[row].shares else self.budget.marks), self.budget.row]

    def weights(self, run: Run, steps: int = 0) -> Path:
        """The export after these steps, or after the last."""
        return Path(f"{run.path(self.out)}-{steps or self.marks(run.row)[-1]}.safetensors")

    def options(self, run: Run, steps: int = 0) -> list[str]:
        """The changes of a run's configuration: budget and device first, then the user's, then the row's."""
        row = ROWS[run.row].change | {"data.cache": self.cache(run.temptation), "run.out": run.path(self.out)}
        row |= {"run.seed": run.seed, "optim.steps": steps or self.marks(run.row)[-1]}
        row |= {"model.ckpt": self.start if run.row == "base" else self.weights(Run("base", run.seed))}
        row |= {"model.gemma": self.out / "gemma"}
        start = as_words(self.budget.change) + (ON_GPU.split() if torch.cuda.is_available() else [])
        if self.jobs > 1 and run.row != "base":
            start.append("data.workers=0")  # the other rows use the cores
        return [*start, *self.set, *as_words(row)]

    def refuse_overruled(self, rows: list[str]) -> None:
        """UserError for an option of the user that the ablation itself sets to another value in one of these rows."""
        own = dict.fromkeys(("run.out", "data.cache", "model.gemma"), "--out")
        own |= {"run.seed": "--training-seeds", "optim.steps": "--budget", "model.ckpt": "the base"}
        for change in self.set:
            key = change.partition("=")[0].strip()
            setters = [own[key]] if key in own else [f"row {name}" for name in rows if key in ROWS[name].change]
            if setters:
                raise UserError(f"--set {change} would have no effect: {key} is decided by {setters[0]}")


def read(options: list[str]) -> Config:
    return read_config(HERE / "configs" / "toy-ablation.toml", options)


def label(temptation: Temptation) -> str:
    """The name of the folder of a kind of references."""
    return temptation.reference.replace(" ", "-") + ("" if temptation == APART else f"-{temptation.share:g}")


def as_words(options: dict[str, Any]) -> list[str]:
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()]


def train_run(run: Run, steps: int, ablation: Ablation) -> None:
    """Train a run up to these steps and export it, unless that is done. The run that it starts from is there."""
    if (out := ablation.weights(run, steps)).is_file():
        return
    row, begun, here = ROWS[run.row], time.perf_counter(), ablation.jobs > 1
    options = ablation.options(run._replace(row=row.shares or run.row), steps)
    options += as_words(row.change) if row.shares else []  # the same weights with other defaults
    command = [str(HERE / "train.py"), str(HERE / "configs" / "toy-ablation.toml"), *(f"--set={o}" for o in options)]
    if not row.shares:
        run_program(command if here else [*torchrun(), *command], here)
    run_program([*command, "--export", str(out)], here)
    write_text(out.with_suffix(".seconds"), f"{time.perf_counter() - begun:.0f} {hardware()}\n")


@lru_cache
def instruments(device: str) -> tuple[FaceReader, Eye]:
    faces = FaceReader(ASSETS / "faces", device=device, det_size=128)
    return faces, Eye.from_file(ASSETS / "judge.safetensors", device)


people = lru_cache(judge.cases)


def judge_run(run: Run, steps: int, seed: int, ablation: Ablation, scales: tuple[int, int] | None = None) -> None:
    """Measure a run after these steps, or the drawn clips, on the people of one evaluation seed: a file of results/.

    Their references are independent of the prompts, whatever the training references are. scales: s_y and s_r instead
    of the row's, for half of the people.
    """
    name = "-".join(map(str, [run.row, run.seed, seed, steps, *(scales or ())]))
    record, count = ablation.out / "results" / label(run.temptation) / f"{name}.json", ablation.budget.people
    if record.is_file():
        return
    path = ablation.weights(Run("base", 0) if run.row == "drawn" else run, steps)
    changes = {"steps": read(ablation.options(Run("base", 0))).guidance.steps}
    recipe = judge.recipe_of(path, **changes | dict(zip(("s_text", "s_ref"), map(float, scales or ()))))
    clips = people(seed, count, recipe.frames, recipe.fps, recipe.height)[: count // 2 if scales else count]
    if run.row == "drawn":
        videos = np.stack([clip["frames"] for clip in clips])
    else:
        photos, seeds = [clip["reference"] for clip in clips], range(seed * count, seed * count + len(clips))
        how = recipe, *resolve_device(argparse.Namespace(device=ablation.device, dtype=None)), count
        videos = judge.make_videos(path, ablation.out / "gemma", clips, photos, seeds, *how, title=name)
    rows = judge.measure(videos, clips, *instruments(ablation.device))
    if not scales and run.seed == 0 and steps == ablation.marks(run.row)[-1]:
        judge.draw_rows(record.with_suffix(".jpg"), clips[:4], rows, videos)
    rounded = json.loads(json.dumps(rows), parse_float=lambda digits: round(float(digits), 5))
    write_text(record, json.dumps(rounded))


def do(run: Run, ablation: Ablation, sweep: bool = False) -> None:
    """Train a run and measure it after each of its marks; every training seed has people of its own."""
    seeds = range(run.seed * ablation.seeds, (run.seed + 1) * ablation.seeds)
    for steps in ablation.marks(run.row):
        if run.row != "drawn":
            train_run(run, steps, ablation)
        for seed in seeds:
            judge_run(run, steps, seed, ablation)
    for scales in SCALES if sweep else ():
        for seed in seeds:
            judge_run(run, steps, seed, ablation, scales)


def make_start(ablation: Ablation) -> None:
    """The text path of the small DiT, and the checkpoint from which all bases begin."""
    if ablation.start.is_file():
        return
    text, steps = ablation.out / "text.safetensors", ablation.budget.text
    words = f"-m toy.text --heads 4 --steps {steps} --out {text} --gemma {ablation.out / 'gemma'}".split()
    run_command([*words, "--device", ablation.device])
    assemble(ASSETS / "tiny.safetensors", text, ablation.start, DIT, SHORT)


def make_cache(temptation: Temptation, ablation: Ablation, processes: int) -> None:
    words = ["--reference", temptation.reference, "--share", str(temptation.share)]
    words += ["--count", str(ablation.budget.clips), "--out", str(ablation.cache(temptation))]
    words += ["--ckpt", str(ablation.start), "--gemma", str(ablation.out / "gemma")]
    words += ["--device", ablation.device] if ablation.jobs > 1 else []
    start = [*torchrun()[:-1], f"--nproc_per_node={processes}"] if ablation.jobs > 1 else torchrun()
    run_command([*start, "-m", "toy.cache", *words])


def settings_text(ablation: Ablation, command: str) -> str:
    """How the numbers were made."""
    out, budget, config = ablation.out, ablation.budget, read(ablation.options(Run("base", 0)))
    trained = [path.read_text().strip().partition(" ") for path in sorted(out.rglob("*.seconds"))]
    minutes, where = sum(int(seconds) for seconds, _, _ in trained) / 60, sorted({place for _, _, place in trained})
    steps = ", ".join(map(str, ablation.marks("tass")))
    return (
        f"Written by `python -m toy.ablate {command}` on {date.today()}: {budget.base} steps for the base, then each "
        f"further row from the base's weights, measured after {steps} steps; optim.batch = {config.optim.batch}, "
        f"optim.lr = {config.optim.lr}, faces.min_weight = {config.faces.min_weight}, {budget.clips} clips. People and "
        "prompts are of the test split, and each training seed has people of its own. Mean ± standard error over "
        "training seeds; a difference above two of them is bold. Chance for the nearest reference is 1 in "
        f"{budget.people}. {judge.LEGEND} `toy/judge.py` explains all columns.\n\n"
        f"Trained on {'; '.join(where)}, {ablation.jobs} rows at a time, {minutes:.0f} minutes if one by one.\n\n"
    )


def write_page(page: Path, figures: Path, text: str, results: copying.Results) -> None:
    """Figures, and the page with the prose that people wrote at its top."""
    for figure in copying.draw(figures, results):
        text += f"![{figure.stem}]({os.path.relpath(figure, page.parent)})\n\n"
    above = page.read_text(encoding="utf-8").partition(PROSE)[0] if page.is_file() else TITLE
    write_text(page, f"{above}{PROSE}\n\n{text}{copying.numbers(results)}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=list(BUDGETS), default="small", help="steps and people (%(default)s)")
    parser.add_argument("--rows", default=",".join(ROWS), help="rows, by comma (%(default)s)")
    parser.add_argument("--study", action="store_true", help="these rows with all kinds of references, and a sweep")
    few = whole(1, 1000)
    parser.add_argument("--seeds", type=few, default=2, help="evaluation seeds for each training seed (%(default)s)")
    parser.add_argument("--training-seeds", type=few, default=1, help="each trains all rows anew (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for train.py, in all rows")
    add_temptation(parser)
    parser.add_argument("--jobs", type=few, default=1, help="rows at a time, on one GPU or 1 core each (%(default)s)")
    parser.add_argument("--deadline", type=float, default=1e9, metavar="SECONDS", help="then stop, with what is done")
    parser.add_argument("--out", help="folder of runs, results and page (default: runs/ablation-BUDGET)")
    parser.add_argument("--publish", action="store_true", help="also write docs/copying.md and its figures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the evaluation")
    options = parser.parse_args(namespace=argparse.Namespace(dtype=None))  # as resolve_device needs it
    options.rows = [name.strip() for name in options.rows.split(",")]
    if unknown := set(options.rows) - set(ROWS):
        raise UserError(f"--rows has {', '.join(sorted(unknown))}: it takes {', '.join(ROWS)}")
    options.temptation = read_temptation(options)
    if options.study and options.temptation != APART:
        raise UserError("--study has kinds of references of its own: leave out --reference")
    options.out = Path(options.out or f"runs/ablation-{options.budget}")
    return options


def plan(options: argparse.Namespace) -> dict[Run, bool]:
    """The runs in their order, each with whether it is also measured at SCALES."""
    parts = [STUDY, FURTHER] if options.study else [[Cell(options.temptation, tuple(options.rows))]]
    runs = {Run("base", seed): False for seed in range(options.training_seeds)}
    for part in parts:
        for seed in range(options.training_seeds):
            for temptation, rows, swept in part:
                for row in [row for row in rows if row in options.rows and row != "base"]:
                    if shared := ROWS[row].shares:
                        runs.setdefault(Run(shared, seed, temptation), False)
                    runs[Run(row, seed, temptation)] = row in swept
    return runs


def main() -> None:
    options, begun = parse_arguments(), time.monotonic()
    resolve_device(options)
    ends, jobs = begun + options.deadline, options.jobs
    ablation = Ablation(BUDGETS[options.budget], options.out, options.set, options.device, options.seeds, jobs)
    runs = plan(options)
    ablation.refuse_overruled([run.row for run in runs])
    for run in runs:  # a wrong option is an error before the work
        read(ablation.options(run))
    same_settings(ablation)
    instruments(options.device)
    make_start(ablation)
    caches = dict.fromkeys(run.temptation for run in runs if not ablation.weights(run).is_file())
    if APART in caches:  # first, since the base needs it
        make_cache(APART, ablation, jobs)
        del caches[APART]
    stages = {run: 0 if run.row == "base" else 1 + bool(ROWS[run.row].shares) for run in runs}
    bases, own, shared = (
        [partial(do, run, ablation, runs[run]) for run in runs if stages[run] == stage] for stage in range(3)
    )
    each = max(1, (jobs - len(bases)) // max(1, len(caches)))  # the bases and the further caches at a time
    failed = do_all([*bases, *[partial(make_cache, kind, ablation, each) for kind in caches]], jobs, ends)
    drawn = [partial(do, Run("drawn", seed), ablation) for seed in range(options.training_seeds)]
    failed += do_all([*own, *drawn], jobs, ends)
    failed += do_all(shared, jobs, ends)
    results = copying.read_results(options.out)
    text = settings_text(ablation, shlex.join(sys.argv[1:]))
    pages = [(options.out / "copying.md", options.out)]
    pages += [(HERE / "docs" / "copying.md", HERE / "assets")] if options.publish else []
    for page, figures in pages:
        write_page(page, figures, text, results)
    print(f"{copying.numbers(results)}{judge.LEGEND}\n")
    print(f"wrote {', '.join(str(page) for page, _ in pages)} after {time.monotonic() - begun:.0f} s")
    if failed:
        raise UserError(f"{failed} tasks failed, see above: the same command tries them again")


def same_settings(ablation: Ablation) -> None:
    """Rows of different settings cannot be compared: UserError where the folder was begun with others."""
    config, record = as_dict(read(ablation.set)), ablation.out / "settings.json"
    settings = {f"{section}.{key}": value for section, options in config.items() for key, value in options.items()}
    settings |= asdict(ablation.budget) | {"marks": list(ablation.budget.marks), "seeds": ablation.seeds}
    if record.is_file():
        before = parse_json(dict[str, Any], record.read_bytes(), record)
        return require_same(before, settings, ablation.out, "give another --out")
    write_text(record, json.dumps(settings, indent=1))


if __name__ == "__main__":
    with one_line_errors():
        main()

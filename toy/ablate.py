"""Table 1's cumulative ablation in the tiny world: each row is the one before plus one component of the method.

    base ──> + reference ──> + TASS ──> + augmentation ──> + identity losses ──> + decoupled guidance
                                │
                                └──> TASS replaced by a placement that Sec. 3.2 argues against

As in the paper, the base is a text-to-video model, and each further row is fine-tuned from the base's weights: same
seed, same steps, same clips. Decoupled guidance is inference only and shares the weights of the row before it. Rows
are trained by train.py with configs/toy-ablation.toml and the changes below, and measured by toy/judge.py on people,
prompts and pairs of motion and color of the test split.

    python -m toy.ablate --budget minutes                   # a few steps: does a change run at all?
    python -m toy.ablate --budget small                     # three quarters of an hour on two cores
    python -m toy.ablate --budget large                     # for a GPU: batches of 256
    python -m toy.ablate --rows base,reference,tass         # only these; the others can follow later
    python -m toy.ablate --reference "same clip" --share 1  # training references are frames of their own clips
    python -m toy.ablate --set parallel.compile=true        # 1.2 times as fast on two cores; it wants a C++ compiler

The same command again continues: rows that are trained or measured are kept. Table and figure go into the run's folder;
--publish also replaces docs/ablation.md and assets/ablation.png.
"""

import argparse
import json
import os
import platform
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from common.device import resolve_device
from common.errors import Parser, UserError, one_line_errors, whole_file
from common.outputs import require_same
from common.schema import parse_json
from config import ASSETS, Config, as_dict, read_config
from evaluation.metrics import FaceReader
from rope import PLACEMENTS
from toy import judge
from toy.cache import add_temptation, read_temptation
from toy.eye import Eye
from toy.make import ON_GPU, run_command, torchrun
from toy.world import APART, Temptation

HERE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Row:
    title: str
    change: dict[str, Any]  # options of train.py
    shares: str = ""  # the row whose weights this one uses, where only inference differs


TASS = {"reference.placement": "tass"}
AUGMENTED = TASS | {"reference.augment": True}
IDENTITY = AUGMENTED | {"faces.pack": "assets/faces"}
ROWS = {
    "base": Row("base: text to video", {"model.scratch": True, "reference.use": False, "guidance.s_ref": 0.0}),
    "reference": Row("+ reference concatenation", {"reference.placement": "overlap"}),
    "tass": Row("+ TASS-RoPE", TASS),
    "augmentation": Row("+ reference augmentation", AUGMENTED),
    "identity": Row("+ identity losses", IDENTITY),
    "guidance": Row("+ decoupled guidance", IDENTITY | {"guidance.s_ref": 3.0}, shares="identity"),
    **{k: Row(f"TASS -> {k}", {"reference.placement": k}) for k in PLACEMENTS if k not in ("tass", "overlap")},
}
TITLES = {name: row.title for name, row in ROWS.items()} | {"drawn": "drawn clips, the truth"}


@dataclass(frozen=True)
class Budget:
    base: int  # steps of the base
    row: int  # steps of each further row
    clips: int  # drawn clips of the cache
    people: int  # in an evaluation
    change: dict[str, Any] = field(default_factory=dict)  # options of train.py, which --set may overrule


BUDGETS = {
    "minutes": Budget(10, 5, 64, 4, {"faces.min_weight": 0.2, "optim.batch": 8, "guidance.steps": 4}),
    "small": Budget(800, 250, 4_000, 32, {"faces.min_weight": 0.2}),
    "medium": Budget(3_000, 1_200, 16_000, 64),
    "large": Budget(1_800, 600, 16_000, 64, {"optim.batch": 256, "optim.lr": 2e-3, "faces.min_weight": 0.5}),
}
# Number of an evaluation -> digits in the table.
FIGURES = {"similarity": 3, "retrieved": 2, "direction": 2, "motion": 2, "background": 2, "face_rate": 2, "drift": 3}
FIGURES |= {f"copied {group}": 2 for group in judge.GROUPS}
PROSE = "<!-- Everything above this line is written by toy/ablate.py. -->"
Evaluation = dict[str, float | None]  # means of one row, training seed and evaluation seed


def needed(rows: list[str]) -> list[str]:
    """The rows to train for these rows, in the order of ROWS."""
    names = {"base", *rows, *[ROWS[name].shares for name in rows]}
    return [name for name in ROWS if name in names]


@dataclass(frozen=True)
class Ablation:
    """The settings that all rows share."""

    budget: Budget
    out: Path
    set: list[str] = field(default_factory=list)  # "section.key=value" of the user
    temptation: Temptation = APART

    def cache(self) -> Path:
        return Path("-".join([read(self.set).data.cache, str(self.budget.clips), *label(self.temptation)]))

    def weights(self, name: str, seed: int) -> Path:
        return self.out / f"{name}-{seed}.safetensors"

    def options(self, name: str, seed: int) -> list[str]:
        """The changes of a row's configuration: budget and device first, then the user's, then the row's."""
        row = ROWS[name].change | {"data.cache": self.cache(), "run.out": self.out / f"{name}-{seed}", "run.seed": seed}
        row["optim.steps"] = self.budget.base if name == "base" else self.budget.row
        if name != "base":
            row["model.ckpt"] = self.weights("base", seed)
        start = self.budget.change | (ON_GPU if torch.cuda.is_available() else {})
        return [*as_words(start), *self.set, *as_words(row)]

    def refuse_overruled(self, rows: list[str]) -> None:
        """UserError for an option of the user that the ablation itself sets to another value in one of these rows."""
        own = {"run.out": "--out", "run.seed": "--training-seeds", "optim.steps": "--budget", "model.ckpt": "the base"}
        for change in self.set:
            key = change.partition("=")[0].strip()
            setters = [own[key]] if key in own else [f"row {name}" for name in rows if key in ROWS[name].change]
            if setters:
                raise UserError(f"--set {change} would have no effect: {key} is decided by {setters[0]}")


def read(options: list[str]) -> Config:
    return read_config(HERE / "configs" / "toy-ablation.toml", options)


def label(temptation: Temptation) -> list[str]:
    """The words of a folder's name that tell temptations apart."""
    return [] if temptation == APART else [temptation.reference.replace(" ", "-"), f"{temptation.share:g}"]


def as_words(options: dict[str, Any]) -> list[str]:
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()]


def train_row(name: str, seed: int, ablation: Ablation) -> None:
    """Train a row and export it, unless its weights are there. The row whose weights it shares is there."""
    if ablation.weights(name, seed).is_file():
        return
    row, begun = ROWS[name], time.perf_counter()
    options = ablation.options(row.shares or name, seed)
    options += as_words(row.change) if row.shares else []  # the same weights with other defaults
    command = [str(HERE / "train.py"), str(HERE / "configs" / "toy-ablation.toml"), *(f"--set={o}" for o in options)]
    if not row.shares:
        run_command([*torchrun(), *command])
    run_command([*command, "--export", str(ablation.weights(name, seed))])
    judge.write_text(ablation.out / f"{name}-{seed}.seconds", f"{time.perf_counter() - begun:.0f} {hardware()}\n")


def judge_row(name: str, train_seed: int, seed: int, ablation: Ablation, where: tuple, instruments: tuple) -> None:
    """Measure a row, or the drawn clips, on the people of one evaluation seed: results/<row>-<seeds>.json.

    Their references are independent of the prompts, whatever the training references are. where: device and dtype;
    instruments: FaceReader and Eye.
    """
    record, people = ablation.out / "results" / f"{name}-{train_seed}-{seed}.json", ablation.budget.people
    if record.is_file():
        return
    path = ablation.weights("base" if name == "drawn" else name, train_seed)
    recipe = judge.recipe_of(path)
    clips = judge.cases(seed, people, recipe.frames, recipe.fps, recipe.height)
    if name == "drawn":
        videos = np.stack([clip["frames"] for clip in clips])
    else:
        photos, seeds = [clip["reference"] for clip in clips], range(seed * people, (seed + 1) * people)
        videos = judge.make_videos(path, ASSETS / "gemma", clips, photos, seeds, recipe, *where, title=f"{name} {seed}")
    judge.write_text(record, json.dumps(judge.measure(videos, clips, *instruments)))


def read_results(out: Path) -> dict[str, list[Evaluation]]:
    """Row -> its evaluations, one for each pair of seeds, in the order of TITLES."""
    results: dict[str, list[Evaluation]] = {}
    for name in TITLES:
        for path in sorted((out / "results").glob(f"{name}-*-*.json")):
            means = {key: number and number[0] for key, number in judge.summarize(judge.read_rows(path)).items()}
            results.setdefault(name, []).append(means)
    return results


def spread(evaluations: list[Evaluation], key: str) -> list[float]:
    """Mean and, of several evaluations, standard deviation; empty where none has the number."""
    values = [e[key] for e in evaluations if e[key] is not None]
    return [number(values) for number, least in ((fmean, 1), (stdev, 2)) if len(values) >= least]


def table(results: dict[str, list[Evaluation]]) -> str:
    """Markdown: a line for each row, mean ± standard deviation over seeds."""
    lines = [
        [TITLES[name], *(" ± ".join(f"{x:.{digits}f}" for x in spread(each, key)) for key, digits in FIGURES.items())]
        for name, each in results.items()
    ]
    return judge.markdown(f"| row | {' | '.join(judge.HEADINGS[key] for key in FIGURES)} |", lines)


def draw(path: Path, results: dict[str, list[Evaluation]]) -> None:
    """Identity, prompt and copying side by side: a bar for each row, a line for the spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = ["retrieved", "direction", "background", "copied pose", "copied light", "copied background"]
    figure, axes = plt.subplots(1, len(keys), figsize=(15, 0.35 * len(results) + 1), sharey=True)
    for ax, key, color in zip(axes, keys, ["C0", "C1", "C1", "C2", "C2", "C2"]):
        means, deviations = np.array([[*spread(each, key), 0, 0][:2] for each in results.values()]).T
        ax.barh([TITLES[name] for name in results], means, xerr=deviations, color=color, ecolor="#00000090")
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_title(judge.HEADINGS[key], fontsize=10)
        ax.set_xlim(min(0, ax.get_xlim()[0]), max(1, ax.get_xlim()[1]))
    axes[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def hardware() -> str:
    """The devices of train.py on this machine."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())  # none on ARM
    return f"{len(os.sched_getaffinity(0))} cores of {[*names, platform.machine()][0]}, PyTorch {torch.__version__}"


def report(ablation: Ablation, budget: str, figure: str) -> str:
    """The page: the table, its settings, its hardware."""
    out, steps, temptation = ablation.out, ablation.budget, ablation.temptation
    config = read(ablation.options("base", 0))
    records = [record.stem.split("-") for record in (out / "results").glob("*.json")]
    trained = {path.stem: path.read_text().strip().partition(" ") for path in sorted(out.glob("*.seconds"))}
    times = ", ".join(f"{name} {int(seconds) / 60:.0f}" for name, (seconds, _, _) in trained.items())
    where = "; ".join(sorted({place for _, _, place in trained.values()}))
    words = f"--budget {budget}" + "".join(f" --set {change}" for change in ablation.set)
    relation = "All training references are drawn apart from their clips."
    if temptation != APART:
        words += f" --reference '{temptation.reference}' --share {temptation.share:g}"
        relation = f"Of the training references, a share of {temptation.share:g} is of the {temptation.reference}."
    return (
        "# The ablation in the tiny world\n\n"
        f"Written by `python -m toy.ablate {words}`: {steps.base} steps for the base, {steps.row} for each further row "
        f"from the base's weights, optim.batch = {config.optim.batch}, optim.lr = {config.optim.lr}, "
        f"faces.min_weight = {config.faces.min_weight}, the same seed and clips. {relation} An evaluation has "
        f"{steps.people} people who, like their prompts, are of the test split. Mean ± standard deviation over "
        f"{len({record[1] for record in records})} training and {len({record[2] for record in records})} evaluation "
        f"seeds; chance for the nearest reference is 1 in {steps.people}.\n\n{table(read_results(out))}\n"
        f"![The same as bars]({figure})\n\n{judge.LEGEND} All columns are explained in `toy/judge.py`.\n\n"
        f"Trained on {where}. Minutes of training: {times}.\n\n"
    )


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=list(BUDGETS), default="small", help="steps and people (%(default)s)")
    parser.add_argument("--rows", default=",".join(ROWS), help="rows, by comma (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="evaluation seeds (%(default)s)")
    parser.add_argument("--training-seeds", type=int, default=1, help="each trains all rows anew (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for train.py, in all rows")
    add_temptation(parser)
    parser.add_argument("--out", help="folder of runs, results, table and figure (default: runs/ablation-BUDGET...)")
    parser.add_argument("--publish", action="store_true", help="also replace docs/ablation.md and assets/ablation.png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the evaluation")
    options = parser.parse_args(namespace=argparse.Namespace(dtype=None))  # as resolve_device needs it
    options.rows = [name.strip() for name in options.rows.split(",")]
    if unknown := set(options.rows) - set(ROWS):
        raise UserError(f"--rows has {', '.join(sorted(unknown))}: it takes {', '.join(ROWS)}")
    if not (1 <= options.seeds <= 1000 and 1 <= options.training_seeds <= 1000):
        raise UserError("--seeds and --training-seeds are at least 1 and at most 1000")
    options.temptation = read_temptation(options)
    options.out = Path(options.out or "-".join(["runs/ablation", options.budget, *label(options.temptation)]))
    return options


def main() -> None:
    options = parse_arguments()
    where = resolve_device(options)
    ablation = Ablation(BUDGETS[options.budget], options.out, options.set, options.temptation)
    rows, seeds = needed(options.rows), range(options.training_seeds)
    ablation.refuse_overruled(rows)
    for name in rows:  # a wrong option is an error before the work
        read(ablation.options(name, 0))
    same_settings(ablation)
    faces = FaceReader(ASSETS / "faces", device=where[0], det_size=128)
    instruments = faces, Eye.from_file(ASSETS / "judge.safetensors", where[0])
    if not all(ablation.weights(name, seed).is_file() for name in rows for seed in seeds):
        words = ["--reference", ablation.temptation.reference, "--share", str(ablation.temptation.share)]
        words += ["--count", str(ablation.budget.clips), "--out", str(ablation.cache())]
        run_command([*torchrun(), "-m", "toy.cache", *words])
    for train_seed in seeds:
        for name in rows:
            train_row(name, train_seed, ablation)
            for seed in range(options.seeds if name in options.rows else 0):
                judge_row(name, train_seed, seed, ablation, where, instruments)
    for seed in range(options.seeds):
        judge_row("drawn", 0, seed, ablation, where, instruments)
    pages = [(ablation.out / "ablation.md", ablation.out / "ablation.png")]
    if options.publish:
        pages.append((HERE / "docs" / "ablation.md", HERE / "assets" / "ablation.png"))
    for page, figure in pages:
        draw(figure, read_results(ablation.out))
        below = page.read_text(encoding="utf-8").partition(PROSE)[2] if page.is_file() else "\n"
        text = report(ablation, options.budget, os.path.relpath(figure, page.parent))
        judge.write_text(page, text + PROSE + below)  # people write the part below
    chance = f"Chance for the nearest reference is 1 in {ablation.budget.people}."
    print(f"{table(read_results(ablation.out))}\n{judge.LEGEND} {chance}\n")
    print("wrote " + ", ".join(str(path) for pair in pages for path in pair))


def same_settings(ablation: Ablation) -> None:
    """Rows of different settings cannot be compared: UserError where the folder was begun with others."""
    config, record = as_dict(read(ablation.set)), ablation.out / "settings.json"
    settings = {f"{section}.{key}": value for section, options in config.items() for key, value in options.items()}
    settings |= asdict(ablation.budget) | {f"toy.{key}": value for key, value in asdict(ablation.temptation).items()}
    if record.is_file():
        before = parse_json(dict[str, Any], record.read_bytes(), record)
        return require_same(before, settings, ablation.out, "give another --out")
    judge.write_text(record, json.dumps(settings, indent=1))


if __name__ == "__main__":
    with one_line_errors():
        main()

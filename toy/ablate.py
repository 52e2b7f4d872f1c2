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
    python -m toy.ablate --budget medium                    # four times as many steps
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
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.device import resolve_device
from common.errors import Parser, UserError, one_line_errors, whole_file
from common.outputs import require_same
from common.schema import parse_json
from config import ASSETS, as_dict, read_config
from evaluation.metrics import FaceReader
from toy.cache import add_temptation, read_temptation
from toy.eye import Eye
from toy.judge import GROUPS, HEADINGS, LEGEND, cases, copied, make_videos, measure, read_rows, recipe_of
from toy.make import ON_GPU, run_command, torchrun
from toy.world import APART, Temptation

HERE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Row:
    title: str
    before: str  # the row whose changes this one inherits; "" for none
    change: dict[str, Any]  # options of train.py
    shares: str = ""  # the row whose weights this one uses, where only inference differs


ROWS = {
    "base": Row("base: text to video", "", {"model.scratch": True, "reference.use": False, "guidance.s_ref": 0.0}),
    "reference": Row("+ reference concatenation", "", {"reference.placement": "overlap"}),
    "tass": Row("+ TASS-RoPE", "reference", {"reference.placement": "tass"}),
    "augmentation": Row("+ reference augmentation", "tass", {"reference.augment": True}),
    "identity": Row("+ identity losses", "augmentation", {"faces.pack": "assets/faces"}),
    "guidance": Row("+ decoupled guidance", "identity", {"guidance.s_ref": 3.0}, shares="identity"),
    "temporal": Row("TASS -> temporal", "tass", {"reference.placement": "temporal"}),
    "fixed": Row("TASS -> fixed", "tass", {"reference.placement": "fixed"}),
    "remote": Row("TASS -> remote", "tass", {"reference.placement": "remote"}),
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
FIGURES = {  # number of an evaluation -> digits in the table
    **{"similarity": 3, "retrieved": 2, "direction": 2, "motion": 2, "background": 2, "face_rate": 2, "drift": 3},
    **{f"copied {group}": 2 for group in GROUPS},
}
PROSE = "<!-- Everything above this line is written by toy/ablate.py. -->"


def changes(name: str) -> dict[str, Any]:
    """All changes of a row, with those of the rows before it."""
    row = ROWS[name]
    return (changes(row.before) if row.before else {}) | row.change


def needed(rows: list[str]) -> list[str]:
    """The rows to train for these rows, in the order of ROWS."""
    names = {"base", *rows, *[ROWS[name].shares for name in rows]}
    return [name for name in ROWS if name in names]


# ---------------------------------------------------------------------------------------------------------------------
# One row


@dataclass(frozen=True)
class Ablation:
    """The settings that all rows share."""

    budget: Budget
    out: Path
    set: list[str] = field(default_factory=list)  # "section.key=value" of the user
    temptation: Temptation = APART

    def cache(self) -> Path:
        folder = read_config(HERE / "configs" / "toy-ablation.toml", self.set).data.cache
        return Path("-".join([folder, str(self.budget.clips), *label(self.temptation)]))

    def weights(self, name: str, seed: int) -> Path:
        return self.out / f"{name}-{seed}.safetensors"

    def train_options(self, name: str, seed: int) -> list[str]:
        """The options of train.py: budget and device first, then the user's, then the row's."""
        row = changes(name) | {"data.cache": self.cache(), "run.out": self.out / f"{name}-{seed}", "run.seed": seed}
        row["optim.steps"] = self.budget.base if name == "base" else self.budget.row
        if name != "base":
            row["model.ckpt"] = self.weights("base", seed)
        start = self.budget.change | (ON_GPU if torch.cuda.is_available() else {})
        words = [*as_words(start), *self.set, *as_words(row)]
        return [str(HERE / "configs" / "toy-ablation.toml"), *[f"--set={change}" for change in words]]

    def refuse_overruled(self, rows: list[str]) -> None:
        """UserError for an option of the user that the ablation itself sets to another value in one of these rows."""
        own = {"run.out": "--out", "run.seed": "--training-seeds", "optim.steps": "--budget", "model.ckpt": "the base"}
        for change in self.set:
            key = change.partition("=")[0].strip()
            setters = [f"row {name}" for name in rows if key in changes(name)]
            if setters := [own[key]] if key in own else setters:
                raise UserError(f"--set {change} would have no effect: {key} is decided by {setters[0]}")


def label(temptation: Temptation) -> list[str]:
    """The words of a folder's name that tell temptations apart."""
    return [] if temptation == APART else [temptation.reference.replace(" ", "-"), f"{temptation.share:g}"]


def as_words(options: dict[str, Any]) -> list[str]:
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()]


def split(options: list[str]) -> tuple[str, list[str]]:
    """The words for train.py as read_config takes them: the config's path and the changes."""
    return options[0], [option.removeprefix("--set=") for option in options[1:]]


def make_cache(ablation: Ablation) -> None:
    words = ["--count", str(ablation.budget.clips), "--out", str(ablation.cache())]
    temptation = ablation.temptation
    words += ["--reference", temptation.reference, "--share", str(temptation.share)]
    run_command([*torchrun(), "-m", "toy.cache", *words])


def train_row(name: str, seed: int, ablation: Ablation) -> None:
    """Train a row and export it, unless its weights are there. The row whose weights it shares is there."""
    if ablation.weights(name, seed).is_file():
        return
    row, begun, train = ROWS[name], time.perf_counter(), str(HERE / "train.py")
    options = ablation.train_options(row.shares or name, seed)
    if row.shares:  # the same weights with other defaults
        options += [f"--set={word}" for word in as_words(row.change)]
    else:
        run_command([*torchrun(), train, *options])
    run_command([train, *options, "--export", str(ablation.weights(name, seed))])
    with whole_file(ablation.out / f"{name}-{seed}.seconds") as temporary:
        temporary.write_text(f"{time.perf_counter() - begun:.0f} {hardware()}\n")


def judge_row(name: str, train_seed: int, seed: int, ablation: Ablation, tools: dict[str, Any]) -> None:
    """Measure a row, or the drawn clips, on the people of one evaluation seed: results/<row>-<seeds>.json.

    Their references are independent of the prompts, whatever the training references are.
    """
    record, people = ablation.out / "results" / f"{name}-{train_seed}-{seed}.json", ablation.budget.people
    if record.is_file():
        return
    path = ablation.weights("base" if name == "drawn" else name, train_seed)
    recipe = recipe_of(path)
    clips = cases(seed, people, recipe.frames, recipe.fps, recipe.height)
    if name == "drawn":
        videos = np.stack([clip["frames"] for clip in clips])
    else:
        photos, seeds = [clip["reference"] for clip in clips], [seed * people + k for k in range(people)]
        where = tools["device"], tools["dtype"]
        videos = make_videos(path, ASSETS / "gemma", clips, photos, seeds, recipe, *where, title=f"{name} {seed}")
    rows = measure(videos, clips, tools["reader"], tools["eye"])
    record.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(record) as temporary:
        temporary.write_text(json.dumps(rows))


# ---------------------------------------------------------------------------------------------------------------------
# Table and figure


def evaluate(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The means of one evaluation, each over the videos that have the number."""
    means: dict[str, float | None] = {}
    for key in FIGURES:
        if key.startswith("copied "):
            means[key] = copied(rows, key.removeprefix("copied "))
        else:
            values = [row[key] for row in rows if row[key] is not None]
            means[key] = float(np.mean(values)) if values else None
    return means


def read_results(out: Path) -> dict[str, list[dict[str, float | None]]]:
    """Row -> its evaluations, one for each pair of seeds, in the order of TITLES."""
    files = {name: sorted((out / "results").glob(f"{name}-*-*.json")) for name in TITLES}
    return {name: [evaluate(read_rows(path)) for path in paths] for name, paths in files.items() if paths}


def spread(evaluations: list[dict[str, float | None]], key: str) -> tuple[float, float] | None:
    """Mean and standard deviation over evaluations; the latter is nan for a single one."""
    values = [e[key] for e in evaluations if e[key] is not None]
    if not values:
        return None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def table(results: dict[str, list[dict[str, float | None]]]) -> str:
    """Markdown: a line for each row, mean ± standard deviation over seeds."""
    lines = ["| row | " + " | ".join(HEADINGS[key] for key in FIGURES) + " |", "|---|" + "---:|" * len(FIGURES)]
    for name, evaluations in results.items():
        cells = []
        for key, digits in FIGURES.items():
            mean, deviation = spread(evaluations, key) or (None, None)
            text = "" if mean is None else f"{mean:.{digits}f}"
            cells.append(text if mean is None or np.isnan(deviation) else f"{text} ± {deviation:.{digits}f}")
        lines.append(f"| {TITLES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(path: Path, results: dict[str, list[dict[str, float | None]]]) -> None:
    """Identity, prompt and copying side by side: a bar for each row, a line for the spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {
        "own reference nearest": ["retrieved"],
        "prompt followed": ["direction", "background"],
        "copied from the reference": ["copied pose", "copied light", "copied background"],
    }
    colors = ["#4c78a8", "#f58518", "#54a24b"]
    figure, axes = plt.subplots(1, len(shown), figsize=(13, 0.55 * len(results) + 1.6), sharey=True)
    at = np.arange(len(results))
    for ax, (title, keys) in zip(axes, shown.items()):
        height = 0.8 / len(keys)
        for k, key in enumerate(keys):
            pairs = [spread(evaluations, key) or (0.0, 0.0) for evaluations in results.values()]
            means, deviations = np.nan_to_num(np.array(pairs)).T
            label = HEADINGS[key][:-2].removesuffix(" right").removesuffix(" copied")
            place = at + (k - (len(keys) - 1) / 2) * height
            ax.barh(place, means, 0.9 * height, xerr=deviations, color=colors[k], label=label, ecolor="#00000090")
        ax.set_title(title)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_xlim(min(0, ax.get_xlim()[0]), max(1, ax.get_xlim()[1]))
        if len(keys) > 1:
            ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=len(keys), frameon=False)
    axes[0].set_yticks(at, [TITLES[name] for name in results])
    axes[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def hardware() -> str:
    """The devices of train.py on this machine."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}, PyTorch {torch.__version__}"


def report(ablation: Ablation, budget: str, figure: str) -> str:
    """The page: the table, its settings, its hardware."""
    out, steps, temptation = ablation.out, ablation.budget, ablation.temptation
    results, config = read_results(out), read_config(*split(ablation.train_options("base", 0)))
    records = [record.stem.split("-") for record in sorted((out / "results").glob("*.json"))]
    trained = {path.stem: path.read_text().strip().partition(" ") for path in sorted(out.glob("*.seconds"))}
    seeds = {kind: len({record[k] for record in records}) for k, kind in ((1, "training"), (2, "evaluation"))}
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
        f"{seeds['training']} training and {seeds['evaluation']} evaluation seeds; chance for the nearest reference is "
        f"1 in {steps.people}.\n\n{table(results)}\n![The same as bars]({figure})\n\n{LEGEND} All columns are "
        f"explained in `toy/judge.py`.\n\nTrained on {where}. Minutes of training: {times}.\n\n"
    )


def write_page(path: Path, text: str) -> None:
    """Replace the part of the page above PROSE; the part below it is written by people."""
    below = path.read_text(encoding="utf-8").partition(PROSE)[2] if path.is_file() else "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text + PROSE + below, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Command


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
    options = parser.parse_args()
    options.rows = [name.strip() for name in options.rows.split(",")]
    for name in options.rows:
        if name not in ROWS:
            raise UserError(f"--rows {name}: there are {', '.join(ROWS)}")
    if not (1 <= options.seeds <= 1000 and 1 <= options.training_seeds <= 1000):
        raise UserError("--seeds and --training-seeds are at least 1 and at most 1000")
    options.dtype, options.temptation = None, read_temptation(options)
    default = "-".join(["runs/ablation", options.budget, *label(options.temptation)])
    options.out = Path(options.out or default)
    return options


def main() -> None:
    options = parse_arguments()
    device, dtype = resolve_device(options)
    ablation = Ablation(BUDGETS[options.budget], options.out, options.set, options.temptation)
    rows, seeds = needed(options.rows), range(options.training_seeds)
    ablation.refuse_overruled(rows)
    for name in rows:  # a wrong option is an error before the work
        read_config(*split(ablation.train_options(name, 0)))
    same_settings(ablation)
    reader = FaceReader(ASSETS / "faces", device=device, det_size=128)
    tools = {"device": device, "dtype": dtype, "reader": reader}
    tools["eye"] = Eye.from_file(ASSETS / "judge.safetensors", device)
    if not all(ablation.weights(name, seed).is_file() for name in rows for seed in seeds):
        make_cache(ablation)
    for train_seed in seeds:
        for name in rows:
            train_row(name, train_seed, ablation)
            if name in options.rows:
                for seed in range(options.seeds):
                    judge_row(name, train_seed, seed, ablation, tools)
    for seed in range(options.seeds):
        judge_row("drawn", 0, seed, ablation, tools)
    pages = [(ablation.out / "ablation.md", ablation.out / "ablation.png")]
    if options.publish:
        pages.append((HERE / "docs" / "ablation.md", HERE / "assets" / "ablation.png"))
    for page, figure in pages:
        draw(figure, read_results(ablation.out))
        write_page(page, report(ablation, options.budget, os.path.relpath(figure, page.parent)))
    chance = f"Chance for the nearest reference is 1 in {ablation.budget.people}."
    print(f"{table(read_results(ablation.out))}\n{LEGEND} {chance}\n")
    print("wrote " + ", ".join(str(path) for pair in pages for path in pair))


def same_settings(ablation: Ablation) -> None:
    """Rows of different settings cannot be compared: UserError where the folder was begun with others."""
    config = as_dict(read_config(HERE / "configs" / "toy-ablation.toml", ablation.set))
    settings = {f"{section}.{key}": value for section, options in config.items() for key, value in options.items()}
    settings |= asdict(ablation.budget) | {f"toy.{key}": value for key, value in asdict(ablation.temptation).items()}
    record = ablation.out / "settings.json"
    if record.is_file():
        require_same(
            parse_json(dict[str, Any], record.read_bytes(), record), settings, ablation.out, "give another --out"
        )
        return
    ablation.out.mkdir(parents=True, exist_ok=True)
    with whole_file(record) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Table 1's cumulative ablation in the tiny world: each row is the one before plus one component of the method.

    base ──> + reference ──> + TASS ──> + augmentation ──> + identity losses ──> + decoupled guidance
                                │
                                └──> TASS replaced by a placement that Sec. 3.2 argues against

As in the paper, the base is a text-to-video model and each further row is fine-tuned from the base's weights: same
seed, same steps, same clips. Decoupled guidance is inference only and shares the weights of the row before it. Rows
are trained by train.py with configs/toy-ablation.toml and the changes below, and measured by judge.py on people,
prompts and pairs of motion and color that were never trained on.

    python -m toy.ablate --budget small                     # three quarters of an hour on two cores
    python -m toy.ablate --budget medium                    # four times as many steps
    python -m toy.ablate --budget large                     # for a GPU: batches of 256
    python -m toy.ablate --rows base,reference,tass         # only these; the others can follow later
    python -m toy.ablate --set parallel.compile=true        # 1.2 times as fast on two cores; it wants a C++ compiler

Run the same command again to continue: what is trained is not trained again, what is measured not measured again.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.device import resolve_device
from common.errors import Parser, UserError, one_line_errors, whole_file
from config import ASSETS, read_config
from evaluation.metrics import FaceReader
from toy.eye import Eye
from toy.judge import GROUPS, cases, copied, make_videos, measure, recipe_of
from toy.make import ON_GPU, run_command, torchrun

HERE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Row:
    title: str
    before: str  # the row whose changes it takes over; "" for none
    change: dict[str, Any]  # options of train.py
    shares: str = ""  # the row whose weights it uses, where it differs at inference only


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
BUDGETS = {  # steps of the base and of each further row, drawn clips, people a seed, options of train.py
    "small": {"base": 800, "row": 250, "clips": 4_000, "people": 32, "change": {"faces.min_weight": 0.2}},
    "medium": {"base": 3_000, "row": 1_200, "clips": 16_000, "people": 64, "change": {}},
    "large": {
        **{"base": 1_800, "row": 600, "clips": 16_000, "people": 64},
        "change": {"optim.batch": 256, "optim.lr": 2e-3, "faces.min_weight": 0.5},
    },
}
FIGURES = {  # of an evaluation -> heading, digits, which way is better
    "similarity": ("similarity", 3, "↑"),
    "retrieved": ("own reference nearest", 2, "↑"),
    "direction": ("direction right", 2, "↑"),
    "motion": ("motions right", 2, "↑"),
    "background": ("background right", 2, "↑"),
    "face_rate": ("frames with a face", 2, "↑"),
    "drift": ("drift", 3, "↓"),
    **{f"copied {group}": (f"{group} copied", 2, "↓") for group in GROUPS},
}
PROSE = "<!-- Everything above this line is written by ablate.py. -->"


def changes(name: str) -> dict[str, Any]:
    """All that a row changes, those of the rows before it included."""
    row = ROWS[name]
    return (changes(row.before) if row.before else {}) | row.change


# ---------------------------------------------------------------------------------------------------------------------
# One row


def train_options(name: str, seed: int, budget: dict[str, Any], out: Path, common: list[str]) -> list[str]:
    """What train.py is given for a row: the config and its --set, what all rows have in common first: of the budget,
    of the device, and of the user, who may overrule both."""
    config = HERE / "configs" / "toy-ablation.toml"
    start = budget["change"] | (ON_GPU if torch.cuda.is_available() else {})
    cache, clips = read_config(config, common).data.cache, budget["clips"]
    options = changes(name) | {"data.toy": clips, "data.cache": f"{cache}-{clips}"}
    options |= {"run.out": str(out / f"{name}-{seed}"), "run.seed": seed}
    options["optim.steps"] = budget["base" if name == "base" else "row"]
    if name != "base":
        options["model.ckpt"] = str(weights("base", seed, out))

    def shown(options: dict[str, Any]) -> list[str]:
        return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()]

    return [str(config), *[f"--set={change}" for change in (*shown(start), *common, *shown(options))]]


def split(options: list[str]) -> tuple[str, list[str]]:
    """Of the words for train.py the config's path and the changes, as read_config takes them."""
    return options[0], [option.removeprefix("--set=") for option in options[1:]]


def weights(name: str, seed: int, out: Path) -> Path:
    return out / f"{name}-{seed}.safetensors"


def train_row(name: str, seed: int, budget: dict[str, Any], out: Path, common: list[str]) -> None:
    """Train a row and export it, unless that is done. The row whose weights it shares must be there."""
    if weights(name, seed, out).is_file():
        return
    row, begun, train = ROWS[name], time.perf_counter(), str(HERE / "train.py")
    if row.shares:  # the same weights with other defaults
        options = [*train_options(row.shares, seed, budget, out, common)]
        options += [f"--set={key}={value}" for key, value in row.change.items()]
    else:
        options = train_options(name, seed, budget, out, common)
        read_config(*split(options))  # a mistake is said before the work
        run_command([*torchrun(), train, *options])
    run_command([train, *options, "--export", str(weights(name, seed, out))])
    with whole_file(out / f"{name}-{seed}.seconds") as temporary:
        temporary.write_text(f"{time.perf_counter() - begun:.0f} {hardware()}\n")


def judge_row(name: str, train_seed: int, seed: int, people: int, out: Path, tools: dict[str, Any]) -> None:
    """Measure a row on the people of one evaluation seed, unless that is done: results/<row>-<seeds>.json."""
    record = out / "results" / f"{name}-{train_seed}-{seed}.json"
    if record.is_file():
        return
    path = weights(name, train_seed, out)
    recipe = recipe_of(path)
    told = cases(seed, people, recipe.frames, recipe.fps, recipe.height)
    photos, seeds = [case["reference"] for case in told], [seed * people + k for k in range(people)]
    videos = make_videos(
        path, ASSETS / "gemma", told, photos, seeds, recipe, tools["device"], tools["dtype"], title=f"{name} {seed}"
    )
    rows = measure(videos, told, tools["reader"], tools["look"])
    record.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(record) as temporary:
        temporary.write_text(json.dumps(rows))


# ---------------------------------------------------------------------------------------------------------------------
# Table and figure


def evaluate(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """One evaluation's means: of a row's people, those where a number is there."""
    found: dict[str, float | None] = {}
    for key in FIGURES:
        if key.startswith("copied "):
            found[key] = copied(rows, key.removeprefix("copied "))
        else:
            values = [row[key] for row in rows if row[key] is not None]
            found[key] = float(np.mean(values)) if values else None
    return found


def read_results(out: Path) -> dict[str, list[dict[str, float | None]]]:
    """Row -> its evaluations, one for each pair of seeds, in the order of ROWS."""
    results = {}
    for name in ROWS:
        records = sorted((out / "results").glob(f"{name}-*-*.json"))
        if records:
            results[name] = [evaluate(json.loads(record.read_text())) for record in records]
    return results


def spread(evaluations: list[dict[str, float | None]], key: str) -> tuple[float, float] | None:
    """Mean and standard deviation over evaluations; nan for the latter where there is one only."""
    values = [e[key] for e in evaluations if e[key] is not None]
    if not values:
        return None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def table(results: dict[str, list[dict[str, float | None]]]) -> str:
    """Markdown: a line for each row, mean ± standard deviation over seeds."""
    heads = [f"{heading} {way}" for heading, _, way in FIGURES.values()]
    lines = ["| row | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name, evaluations in results.items():
        cells = []
        for key, (_, digits, _) in FIGURES.items():
            mean_and_spread = spread(evaluations, key)
            if mean_and_spread is None:
                cells.append("")
                continue
            mean, deviation = mean_and_spread
            cells.append(f"{mean:.{digits}f}" + ("" if np.isnan(deviation) else f" ± {deviation:.{digits}f}"))
        lines.append(f"| {ROWS[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(path: Path, results: dict[str, list[dict[str, float | None]]]) -> None:
    """Identity, prompt and copy-paste beside each other, a bar for each row, a line for the spread."""
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
            label = FIGURES[key][0].removesuffix(" right").removesuffix(" copied")
            place = at + (k - (len(keys) - 1) / 2) * height
            ax.barh(place, means, 0.9 * height, xerr=deviations, color=colors[k], label=label, ecolor="#00000090")
        ax.set_title(title)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_xlim(min(0, ax.get_xlim()[0]), max(1, ax.get_xlim()[1]))
        if len(keys) > 1:
            ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=len(keys), frameon=False)
    axes[0].set_yticks(at, [ROWS[name].title for name in results])
    axes[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def hardware() -> str:
    """What train.py runs on here."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}, PyTorch {torch.__version__}"


def report(out: Path, budget: str, common: list[str], figure: str) -> str:
    """The page: the table and how it came about."""
    results, steps = read_results(out), BUDGETS[budget]
    config = read_config(*split(train_options("base", 0, steps, out, common)))  # where the user overrules the budget
    records = [record.stem.split("-") for record in sorted((out / "results").glob("*.json"))]
    trained = {path.stem: path.read_text().strip().partition(" ") for path in sorted(out.glob("*.seconds"))}
    seeds = {kind: len({record[k] for record in records}) for k, kind in ((1, "training"), (2, "evaluation"))}
    times = ", ".join(f"{name} {int(seconds) / 60:.0f}" for name, (seconds, _, _) in trained.items())
    where = "; ".join(sorted({place for _, _, place in trained.values()}))
    named = [key.split(".") for key in ("optim.batch", "optim.lr", "faces.min_weight")]
    options = ", ".join(f"{section}.{key} = {getattr(getattr(config, section), key)}" for section, key in named)
    given = " ".join([f"--budget {budget}", *[f"--set {change}" for change in common]])
    return (
        "# The ablation in the tiny world\n\n"
        f"Written by `python -m toy.ablate {given}`: {steps['base']} steps for the base, {steps['row']} for each "
        f"further row from the base's weights, {options}, the same seed and clips; "
        f"{steps['people']} people a seed who, like their prompts, were never trained on. Mean ± standard deviation "
        f"over {seeds['training']} training and {seeds['evaluation']} evaluation seeds; chance for the nearest "
        f"reference is 1 in {steps['people']}.\n\n"
        f"{table(results)}\n![The same as bars]({figure})\n\n"
        "What each column means stands in `judge.py`. *Copied* is a regression slope: 0, the video does not follow the "
        "reference's pose, light or colors; 1, it repeats them.\n\n"
        f"Trained on {where}. Minutes of training: {times}.\n\n"
    )


def write_page(path: Path, text: str) -> None:
    """The page, followed by what people have written below it."""
    below = path.read_text(encoding="utf-8").partition(PROSE)[2] if path.is_file() else "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text + PROSE + below, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=list(BUDGETS), default="small", help="steps and people (%(default)s)")
    parser.add_argument("--rows", default=",".join(ROWS), help="which, by comma (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="evaluation seeds (%(default)s)")
    parser.add_argument("--training-seeds", type=int, default=1, help="each trains all rows anew (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for train.py, in all rows")
    parser.add_argument("--out", help="folder of runs and results (default: runs/ablation-BUDGET)")
    parser.add_argument("--page", default="docs/ablation.md", help="the table (%(default)s)")
    parser.add_argument("--figure", default="assets/ablation.png", help="the picture (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the evaluation")
    options = parser.parse_args()
    options.dtype, options.out = None, Path(options.out or f"runs/ablation-{options.budget}")
    options.rows = [name.strip() for name in options.rows.split(",")]
    for name in options.rows:
        if name not in ROWS:
            raise UserError(f"--rows {name}: there are {', '.join(ROWS)}")
    if options.seeds < 1 or options.training_seeds < 1:
        raise UserError("--seeds and --training-seeds are at least 1")
    return options


def needed(rows: list[str]) -> list[str]:
    """The rows that must be trained for these, in the order of ROWS."""
    wanted = {"base", *rows, *[ROWS[name].shares for name in rows]}
    return [name for name in ROWS if name in wanted]


def main() -> None:
    options = parse_arguments()
    device, dtype = resolve_device(options)
    out, budget = options.out, BUDGETS[options.budget]
    out.mkdir(parents=True, exist_ok=True)
    config = read_config(HERE / "configs" / "toy-ablation.toml", options.set)
    same_settings(out, {"budget": budget, "config": config})
    reader = FaceReader(ASSETS / "faces", device=device, det_size=128)
    tools = {"device": device, "dtype": dtype, "reader": reader}
    tools["look"] = Eye.from_file(ASSETS / "judge.safetensors", device)
    for train_seed in range(options.training_seeds):
        for name in needed(options.rows):
            train_row(name, train_seed, budget, out, options.set)
            if name in options.rows:
                for seed in range(options.seeds):
                    judge_row(name, train_seed, seed, budget["people"], out, tools)
    page, figure = Path(options.page), Path(options.figure)
    draw(figure, read_results(out))
    write_page(page, report(out, options.budget, options.set, os.path.relpath(figure, page.parent)))
    print(f"{table(read_results(out))}\nwrote {page} and {figure}")


def same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Rows of different settings cannot be compared: refuse to mix them in one folder."""
    record = out / "settings.json"
    if record.is_file():
        if json.loads(record.read_text()) != json.loads(json.dumps(settings)):
            raise UserError(f"{out} was begun with other settings (toy-ablation.toml, --set): give another --out")
        return
    with whole_file(record) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Identity and copying of the rows of toy/ablate.py, compared: tables and figures of docs/copying.md.

The unit of error is the training seed. Each seed trains all rows anew and measures them on people of its own, so a
difference of two rows is taken within a seed, and its standard error over seeds.

A row that learns more slowly copies less, and resembles less too. So rows are compared twice: after equal steps, and
at equal identity, where each row's curve of copying over similarity, from the base through the steps at which it was
measured, is read at the largest similarity that both rows reach.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from common.errors import whole_file
from rope import PLACEMENTS
from toy import judge

PLACED = [name for name in PLACEMENTS if name not in ("tass", "overlap", "phase")]
TITLES = {  # rows in the order of tables and figures
    "base": "base: text to video",
    "reference": "+ reference concatenation (overlap)",
    "tass": "+ TASS-RoPE",
    "augmentation": "+ reference augmentation",
    "identity": "+ identity losses",
    "guidance": "+ decoupled guidance",
    "phase": "overlap -> phase",
    **{name: f"TASS -> {name}" for name in PLACED},
    "drawn": "drawn clips, the truth",
}
QUESTIONS = [("reference", "tass"), ("reference", "phase"), ("tass", "phase"), ("tass", "augmentation")]
QUESTIONS += [("augmentation", "identity"), ("identity", "guidance"), *(("tass", name) for name in PLACED)]
COPIED = [f"copied {group}" for group in judge.GROUPS]
COMMON = {"base": ("apart",), "drawn": ("apart",)}  # rows that no kind of references changes, and their folder
HEADINGS = judge.HEADINGS | {"copied": "copied, mean ↓", "copied control": "copied from the next reference"}
COLUMNS = ["similarity", "retrieved", "direction", "background", "drift", *COPIED]
Means = dict[str, float]
Curve = dict[int, Means]  # steps -> means


class Key(NamedTuple):
    """What was measured."""

    kind: str  # of training references, as the name of a folder
    row: str  # of TITLES
    steps: int
    scales: tuple[int, ...] = ()  # s_y and s_r, where they are not the row's


Results = dict[Key, dict[int, Means]]  # -> training seed -> means over its people


def read_results(out: Path) -> Results:
    """The folder results/ of an ablation. "copied" is the mean of the five slopes. Its control is the mean slope on the
    scene of the next video's reference, which is repeated only by chance."""
    rows = defaultdict(lambda: defaultdict(list))
    for path in sorted((out / "results").glob("*/*.json")):
        row, seed, steps, scales = re.fullmatch(r"(.+?)-(\d+)-\d+-(\d+)((?:-\d+)*)", path.stem).groups()
        key = Key(path.parent.name, row, int(steps), tuple(map(int, scales.split("-")[1:])))
        rows[key][int(seed)] += judge.read_rows(path)
    return {key: {seed: means(videos) for seed, videos in seeds.items()} for key, seeds in rows.items()}


def means(rows: judge.Rows) -> Means:
    result = {key: [float(row[key]) for row in rows if row[key] is not None] for key in judge.COLUMNS}
    result = {key: fmean(values) if values else float("nan") for key, values in result.items()}
    result |= {f"copied {group}": float(judge.copied(rows, group)) for group in judge.GROUPS}
    others = [
        row | {key: other[key] for key in ("photo", "photo_read")} for row, other in zip(rows, rows[1:] + rows[:1])
    ]
    control = fmean(float(judge.copied(others, group)) for group in judge.GROUPS)
    return result | {"copied": fmean(result[key] for key in COPIED), "copied control": control, "videos": len(rows)}


def curve(results: Results, kind: str, row: str) -> dict[int, Curve]:
    """Training seed -> the means of a row after each number of steps. 0 steps: the base."""
    base = next((seeds for key, seeds in results.items() if key.row == "base"), {})
    marks = {0: base} | {
        key.steps: seeds for key, seeds in results.items() if key[:2] == (kind, row) and not key.scales
    }
    seeds = set.intersection(*map(set, marks.values())) if len(marks) > 1 else ()
    return {seed: {steps: marks[steps][seed] for steps in sorted(marks)} for seed in sorted(seeds)}


def equal_steps(one: Curve, other: Curve, key: str) -> float:
    """After the most steps at which both rows were measured."""
    steps = max(one.keys() & other.keys())
    return other[steps][key] - one[steps][key]


def equal_identity(one: Curve, other: Curve, key: str) -> float:
    """Each row's number at the largest similarity that both reach, between its measurements on a straight line."""
    curves = [sorted(each.values(), key=lambda point: point["similarity"]) for each in (one, other)]
    most = min(points[-1]["similarity"] for points in curves)
    first, second = (np.interp(most, [p["similarity"] for p in points], [p[key] for p in points]) for points in curves)
    return float(second - first)


def kinds_of(results: Results) -> list[str]:
    """The kinds of references that further rows were trained with, in the order of their words."""
    return sorted({key.kind for key in results if key.row not in ("base", "drawn")})


def words(kind: str) -> str:
    """A folder's name in words: "same-clip-0.5" -> "same clip, share 0.5"."""
    *name, share = kind.split("-")
    return f"{' '.join(name)}, share {share}" if name else kind


Compare = Callable[[Curve, Curve, str], float]


def differences(results: Results, kind: str, one: str, other: str, key: str, compare: Compare) -> list[float]:
    """Of two rows, `other` minus `one`, for each training seed that has both."""
    curves = curve(results, kind, one), curve(results, kind, other)
    return [compare(curves[0][seed], curves[1][seed], key) for seed in curves[0] if seed in curves[1]]


def cell(values: list[float], sign: str = "") -> str:
    """Mean ± standard error; a difference (sign "+") above two of them is bold."""
    values = [value for value in values if isfinite(value)]  # nan: a seed without a single value
    if not values:
        return ""
    mean = fmean(values)
    if len(values) == 1:
        return f"{mean:{sign}.2f}"
    error = stdev(values) / len(values) ** 0.5
    digits = 2 if error >= 0.005 else 3
    text = f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"
    return f"**{text}**" if sign and abs(mean) > 2 * error else text


def table(results: Results, kind: str) -> str:
    """A line for each row after its last step: mean ± standard error over training seeds, and the chance level."""
    keys, lines = [*COLUMNS, "copied", "retrieved_permuted", "copied control"], []
    for row, title in TITLES.items():
        last = max(
            (key for key in results if key.row == row and not key.scales and key.kind in (kind, *COMMON.get(row, ()))),
            default=None,
        )
        if last:
            seeds = results[last].values()
            videos = sum(seed["videos"] for seed in seeds)
            lines.append([title, str(len(seeds)), str(videos), *(cell([seed[key] for seed in seeds]) for key in keys)])
    return judge.markdown(f"| row | seeds | videos | {' | '.join(HEADINGS[key] for key in keys)} |", lines)


def difference_table(results: Results, kind: str, compare: Compare) -> str:
    """A line for each of QUESTIONS."""
    keys = [key for key in (*COLUMNS, "copied") if not (compare is equal_identity and key == "similarity")]
    lines = []
    for one, other in QUESTIONS:
        if differences(results, kind, one, other, "similarity", equal_steps):
            cells = [cell(differences(results, kind, one, other, key, compare), "+") for key in keys]
            lines.append([f"{other} less {one}", *cells])
    return judge.markdown(f"| | {' | '.join(HEADINGS[key] for key in keys)} |", lines)


def numbers(results: Results) -> str:
    """All tables, in Markdown."""
    text = ""
    for kind in kinds_of(results):
        text += f"## Training references: {words(kind)}\n\n{table(results, kind)}\n"
        text += "Differences after equal steps (second row less first), within each training seed:\n\n"
        text += f"{difference_table(results, kind, equal_steps)}\nDifferences at equal similarity:\n\n"
        text += f"{difference_table(results, kind, equal_identity)}\n"
    return text


def draw(folder: Path, results: Results) -> list[Path]:
    """Figures of what was measured: copying over similarity, and the sweep of guidance."""
    paths = []
    for name, there, draw_one in (
        ("copying", kinds_of(results), draw_copying),
        ("guidance", [key for key in results if key.scales], draw_sweep),
    ):
        if there:
            figure, path = draw_one(results), folder / f"{name}.png"
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                figure.savefig(temporary, dpi=110, bbox_inches="tight", metadata={"Software": None})
            paths.append(path)
    return paths


def draw_copying(results: Results) -> Figure:
    """Copying over similarity, a curve for each row and a panel for each kind of training references."""
    rows = [row for row in TITLES if row not in ("base", "drawn", "guidance")]
    kinds = kinds_of(results)
    figure = Figure((3.6 * len(kinds) + 1.8, 3.8), layout="tight")
    axes = figure.subplots(1, len(kinds), sharey="row", squeeze=False)
    for ax, kind in zip(axes[0], kinds):
        for number, row in enumerate(rows):
            if curves := list(curve(results, kind, row).values()):
                x, y = (
                    np.array([[point[key] for point in each.values()] for each in curves])  # (seeds, marks)
                    for key in ("similarity", "copied")
                )
                errors = [v[:, -1].std(ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0 for v in (x, y)]
                ax.plot(x.mean(0), y.mean(0), "o-", color=f"C{number}", markersize=3, label=TITLES[row])
                ax.errorbar(x[:, -1].mean(), y[:, -1].mean(), errors[1], errors[0], color=f"C{number}", capsize=2)
        ax.set_title(f"training references: {words(kind)}", fontsize=10)
        ax.set_xlabel("similarity to the reference's face")
        ax.axhline(0, color="black", linewidth=0.6)
    axes[0, 0].set_ylabel("scene copied (1: a copy)")
    lines = {line.get_label(): line for ax in axes[0] for line in ax.get_lines() if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def draw_sweep(results: Results) -> Figure:
    """What guidance does to the rows that were swept: a column for each row, a curve for each s_y over s_r."""
    swept = {key: seeds for key, seeds in sorted(results.items()) if key.scales}
    columns = sorted({key[:2] for key in swept}, key=lambda key: list(TITLES).index(key[1]))
    numbers = {"similarity": "similarity", "copied": "scene copied", "background": "background of the prompt"}
    figure = Figure((3 * len(columns), 2.2 * len(numbers)), layout="tight")
    axes = figure.subplots(len(numbers), len(columns), sharey="row", squeeze=False)
    for ax, title in zip(axes[:, 0], numbers.values()):
        ax.set_ylabel(title)
    for panels, column in zip(axes.T, columns):
        for ax, number in zip(panels, numbers):
            for s_y in sorted({key.scales[0] for key in swept}):
                keys = [key for key in swept if key[:2] == column and key.scales[0] == s_y]  # s_r rises
                means = [fmean(seed[number] for seed in swept[key].values()) for key in keys]
                ax.plot([key.scales[1] for key in keys], means, "o-", markersize=3, label=f"s_y = {s_y}")
        panels[0].set_title(TITLES[column[1]], fontsize=9)
        panels[-1].set_xlabel("s_r")
    axes[0, 0].legend(fontsize=8)
    return figure

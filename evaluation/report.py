"""The results of an evaluation: scores of each video, means with intervals, Table 1's row, a sheet of pictures."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from common.errors import whole_file

# Columns: heading, digits. Table 1's in its order, the last four VBench's; then ours, which are not in the paper.
QUALITY = {"aq": ("AQ", 3), "iq": ("IQ", 3), "ms": ("MS", 3), "dd": ("DD", 2)}
TABLE = {
    "facesim_arc": ("FaceSim-Arc", 3),
    "facesim_cur": ("FaceSim-Cur", 3),
    "clip_score": ("CLIP-Score", 2),
} | QUALITY
OURS = {
    "face_rate": ("frames with a face ↑", 3),
    "background_copy": ("background copied (ours) ↓", 3),
    "background_chance": ("background, by chance", 3),
    "pose_copy": ("pose copied (ours) ↓", 3),
    "pose_chance": ("pose, by chance", 3),
    "identity_drift": ("identity drift (ours) ↓", 3),
}
LEGEND = (
    "Copied: how much of the colours around the photo's face, and of its head pose, the video repeats; 1 is a copy. "
    "By chance: the same against the photo of another case. Drift: how far the face of a frame is from the video's "
    "mean face, 1 - cosine; 0 is a face that stays the same. ↑ more is better, ↓ less is better."
)
COLUMNS = ["id", "facesim_arc", "facesim_cur", "face_rate", "retried", "clip_score", "aq", "iq", "ms", "dd"]
COLUMNS += ["background_copy", "background_chance", "pose_copy", "pose_chance", "identity_drift"]
COLUMNS += ["video", "reference", "problem"]
FILL = {  # how to fill columns that are empty
    "give --curricular glint360k_curricular_face_r101_backbone.bin (docs/table1.md says from where)": ["facesim_cur"],
    "give --clip openai/clip-vit-base-patch32": ["clip_score"],
    "run make vbench once, then add --vbench": list(QUALITY),
}
RESAMPLES = 2000


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line for each case, scored or not; empty cells where nothing was measured."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as temporary:
        temporary.write_bytes(file.getvalue().encode(errors="backslashreplace"))


def bootstrap(values: np.ndarray, groups: list[str], seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of the mean by resampling groups with replacement, percentiles 2.5 and 97.5.

    A group is a reference: the videos of one face rise and fall together, so drawing them one by one would make the
    interval too narrow. None with fewer than two groups.
    """
    number = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    if len(number) < 2:
        return None
    places = [number[group] for group in groups]
    sums, counts = np.bincount(places, values), np.bincount(places)
    drawn = np.random.default_rng(seed).integers(len(number), size=(RESAMPLES, len(number)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)


def summarize(rows: list[dict[str, Any]], key: str) -> dict[str, Any] | None:
    """videos, mean, spread (standard deviation over videos), interval of a column; None if it is empty."""
    there = [row for row in rows if row.get(key) is not None]
    if not there:
        return None
    values = np.array([row[key] for row in there], float)
    spread = float(values.std(ddof=1)) if len(values) > 1 else None
    interval = bootstrap(values, [str(row["reference"]) for row in there])
    return {"videos": len(values), "mean": float(values.mean()), "spread": spread, "interval": interval}


def markdown(name: str, rows: list[dict[str, Any]], cases: int, how: str) -> str:
    """Table 1's row, then mean, spread and interval of every column, then the empty columns and how to fill them."""
    sums = {key: summarize(rows, key) for key in TABLE | OURS}
    cells = [f"{sums[key]['mean']:.{digits}f}" if sums[key] else "" for key, (_, digits) in TABLE.items()]
    name = " ".join(name.split()).replace("|", "\\|")
    lines = [
        f"| Method | {' | '.join(f'{title} ↑' for title, _ in TABLE.values())} |",
        "|---|" + "---:|" * len(TABLE),
        f"| {name} | {' | '.join(cells)} |",
        "",
        f"{len(rows)} of {cases} cases scored; {how}",
        "",
        "| | videos | mean | spread | 95 % interval |",
        "|---|---:|---:|---:|---|",
    ]
    for key, (title, digits) in (TABLE | OURS).items():
        if s := sums[key]:
            spread = "" if s["spread"] is None else f"{s['spread']:.{digits}f}"
            interval = "{:.{d}f} to {:.{d}f}".format(*s["interval"], d=digits) if s["interval"] else ""
            lines.append(f"| {title} | {s['videos']} | {s['mean']:.{digits}f} | {spread} | {interval} |")
    lines += ["", LEGEND]
    if faceless := sum(row["face_rate"] == 0 for row in rows):
        lines += ["", f"{faceless} videos show no face in any frame; their FaceSim of 0 counts in the means."]
    empty = {way: [TABLE[key][0] for key in keys if not sums[key]] for way, keys in FILL.items()}
    if ways := [f"- {', '.join(titles)} empty: {way}." for way, titles in empty.items() if titles]:
        lines += ["", *ways]
    return "\n".join(lines) + "\n"


def extremes(rows: list[dict[str, Any]], count: int = 4) -> list[dict[str, Any]]:
    """The best and the worst `count` by FaceSim-Arc, best first, none twice."""
    ranked = sorted(rows, key=lambda row: -row["facesim_arc"])
    return ranked if len(ranked) <= 2 * count else ranked[:count] + ranked[-count:]


def draw_sheet(path: Path, pictures: list[tuple[str, Image.Image, np.ndarray]], cell: int = 160) -> None:
    """A PNG with a line for each video: its title, the reference, some frames (n, H, W, 3)."""
    gap, text = 4, 18
    columns = 1 + max(len(frames) for _, _, frames in pictures)
    shapes = [frames.shape[1] / frames.shape[2] for _, _, frames in pictures]
    heights = [text + round(cell * min(max(shape, 0.1), 4)) + gap for shape in shapes]  # also of a strip
    sheet = Image.new("RGB", (columns * (cell + gap), sum(heights)), "white")
    y = 0
    for (title, reference, frames), height in zip(pictures, heights):
        ImageDraw.Draw(sheet).text((2, y + 3), title, fill="black")
        box = cell, height - text - gap
        for k, image in enumerate([reference, *map(Image.fromarray, frames)]):
            scale = min(box[0] / image.width, box[1] / image.height)
            shown = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
            sheet.paste(shown, (k * (cell + gap) + (box[0] - shown.width) // 2, y + text))
        y += height
    with whole_file(path) as temporary:
        sheet.save(temporary)

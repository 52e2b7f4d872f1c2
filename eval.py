"""Table 1 for a folder of videos, ours or anyone's: FaceSim-Arc and -Cur, CLIP-Score, AQ, IQ, MS, DD, and copying.

    python eval.py --videos videos --cases cases.jsonl --curricular glint360k_curricular_face_r101_backbone.bin
    python eval.py --videos consisid --cases cases.jsonl --out out/consisid --vbench        # a baseline, all of Table 1

A video is a case's if its name is the case's id (cases.py). What each number means is said where it is computed: faces,
prompt, copying in metrics.py, quality in quality.py, means and intervals in report.py. The folder --out receives

    results.jsonl   every video's scores, as they come: after a kill, the same command goes on where it was
    scores.csv      a line per case, with the reason where there is no score
    summary.md      Table 1's row, means, spreads, intervals
    sheet.png       the best and the worst videos, to look at
    vbench/         what VBench was given and what it said
"""

import common  # isort: skip  # noqa: F401 (before torch: sets the wait policy of its threads)

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from clips.manifest import VIDEO_SUFFIXES
from common.errors import Parser, UserError, one_line_errors, whole_file
from common.media import count_frames, read_frames, read_image
from evaluation.cases import Case, read_cases
from evaluation.metrics import PROTOCOLS, ClipScore, FaceReader, clip_frames, measure, spaced_frames
from evaluation.report import draw_sheet, extremes, markdown, write_csv
from evaluation.vbench import DIMENSIONS, read_vbench, run_vbench
from face import recognition_file

CLIP = "openai/clip-vit-base-patch32"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", required=True, help="folder of <id>.mp4 (or .webm, .mkv, ...)")
    parser.add_argument("--cases", required=True, help="JSONL of id, reference, prompt")
    parser.add_argument("--out", default="out/eval", help="folder of the results (%(default)s)")
    parser.add_argument("--name", help="what Table 1's row is called (default: the videos' folder)")
    parser.add_argument("--faces", default="buffalo_l", help="insightface model pack, name or folder (%(default)s)")
    parser.add_argument("--det-size", type=int, default=320, help="side the detector sees; 0: its own (%(default)s)")
    parser.add_argument("--onnx", action="store_true", help="ArcFace by insightface and onnxruntime, to compare with")
    parser.add_argument("--curricular", help="CurricularFace's IR-101, .bin or .safetensors; without it no FaceSim-Cur")
    parser.add_argument("--clip", default=CLIP, help="folder or hub id; none: no CLIP-Score (%(default)s)")
    parser.add_argument("--clip-bgr", action="store_true", help="colours reversed, as in the published script")
    parser.add_argument(
        "--protocol", choices=list(PROTOCOLS), default="consisid", help="frames and rules (%(default)s)"
    )
    parser.add_argument("--vbench", action="store_true", help="AQ, IQ, MS, DD too; needs make vbench and a GPU")
    parser.add_argument("--gpus", type=int, default=1, help="for VBench (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    # ---- which videos; what is there already
    options = parse_arguments()
    cases, out = read_cases(options.cases), Path(options.out)
    files = find_videos(options.videos)
    if strangers := files.keys() - {case.id for case in cases}:
        print(f"note: {len(strangers)} videos belong to no case, {sorted(strangers)[0]} for one")
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "protocol": options.protocol,
        "faces": str(recognition_file(options.faces)),
        "det_size": options.det_size,
        "onnx": options.onnx,
        "clip": None if options.clip == "none" else options.clip,
        "clip_bgr": options.clip_bgr,
    }
    told = json.dumps(settings), options.curricular and Path(options.curricular)
    there = [case for case in cases if case.id in files]
    stamps = {case.id: stamp(files[case.id], case.reference, case.prompt, *told) for case in there}
    file_stamps = {case.id: stamp(files[case.id]) for case in there}  # VBench sees the video and nothing else
    results = read_results(out / "results.jsonl")
    todo = [case for case in cases if results.get(case.id, {}).get("stamp") != stamps.get(case.id, "")]

    # ---- faces and prompt, one video after the other
    problems: dict[str, str] = {}
    if any(case.id in files and not case.problem for case in todo):
        reader = FaceReader(options.faces, options.curricular, options.device, options.det_size or None, options.onnx)
        clip = ClipScore(settings["clip"], options.device, options.clip_bgr) if settings["clip"] else None
    for case in tqdm(todo, "videos", disable=not todo):
        try:
            if case.problem or case.id not in files:
                raise UserError(case.problem or f"no video {case.id}.mp4 in {options.videos}")
            total = count_frames(files[case.id])
            frames = read_frames(files[case.id], spaced_frames(total, PROTOCOLS[options.protocol]))
            for_clip = read_frames(files[case.id], clip_frames(total)) if clip else None
            scores = measure(frames, for_clip, case.prompt, read_image(case.reference), reader, clip, options.protocol)
        except UserError as error:
            problems[case.id] = str(error)
            tqdm.write(f"{case.id} skipped: {error}")
            continue
        results[case.id] = {"id": case.id, "stamp": stamps[case.id], **scores}
        append_line(out / "results.jsonl", results[case.id])

    # ---- quality, by VBench
    scored = {case.id: case for case in cases if case.id not in problems}
    if not scored:
        raise UserError(f"none of {len(cases)} cases could be scored: {next(iter(problems.values()))}")
    of_vbench, failure = read_vbench(out / "vbench", file_stamps), None
    lacking = [name for name in scored if of_vbench.get(name, {}).keys() < DIMENSIONS.keys()]
    if options.vbench and lacking:
        try:
            run_vbench({name: (files[name], file_stamps[name]) for name in lacking}, out / "vbench", options.gpus)
        except UserError as error:  # said at the end: the rest of the table does not depend on it
            failure = error
        of_vbench = read_vbench(out / "vbench", file_stamps)

    # ---- tables and pictures
    rows = [
        {"id": case.id, "reference": str(case.reference or ""), "video": str(files.get(case.id, ""))}
        | ({"problem": problems[case.id]} if case.id in problems else results[case.id] | of_vbench.get(case.id, {}))
        for case in cases
    ]
    write_csv(out / "scores.csv", rows)
    good = [row for row in rows if "problem" not in row]
    how = f"protocol {options.protocol}, faces by {Path(settings['faces']).name}"
    how += ", CLIP sees BGR" if options.clip_bgr else ""
    text = markdown(options.name or Path(options.videos).resolve().name, good, len(cases), how)
    with whole_file(out / "summary.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    draw_sheet(out / "sheet.png", [picture(row, scored[row["id"]]) for row in extremes(good)])
    print(f"{text}\nwrote scores.csv, summary.md and sheet.png into {out}")
    if failure:
        raise failure


def find_videos(folder: str | Path) -> dict[str, Path]:
    """Video files by stem."""
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}: give --videos the folder of the videos")
    files = sorted(file for file in Path(folder).iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
    by_name: dict[str, Path] = {}
    for file in files:
        if not file.name.startswith("."):  # what a killed run left half written
            if file.stem in by_name:
                raise UserError(f"{file} and {by_name[file.stem].name} are both videos of {file.stem}: remove one")
            by_name[file.stem] = file
    if not by_name:
        raise UserError(f"no video in {folder}: they are looked for as <id>.mp4, .webm, .mkv, ...")
    return by_name


def stamp(*parts: Path | str | None) -> str:
    """Of all that a result depends on: texts, and files by name, size and time of change."""
    texts = []
    for part in parts:
        if isinstance(part, Path) and part.is_file():
            part = f"{part.name} {part.stat().st_size} {part.stat().st_mtime_ns}"
        texts.append(str(part))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Results by id, later lines over earlier ones. A last line without its end, from a kill, is cut off."""
    if not path.is_file():
        return {}
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with whole_file(path) as temporary:
            temporary.write_bytes(whole)
    try:
        return {row["id"]: row for row in map(json.loads, whole.splitlines())}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: remove it, and everything is measured anew") from None


def append_line(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def picture(row: dict[str, Any], case: Case) -> tuple:
    """A line of the sheet: title, reference, five frames."""
    numbers = spaced_frames(count_frames(row["video"]), 5)
    figures = [f"{row[key]:.3f}" for key in ("facesim_arc", "facesim_cur") if row.get(key) is not None]
    title = f"{case.id}   FaceSim {' / '.join(figures)}   face in {row['face_rate']:.0%} of frames"
    if row.get("clip_score") is not None:
        title += f"   CLIP {row['clip_score']:.2f}"
    return title, read_image(case.reference), read_frames(row["video"], numbers)


if __name__ == "__main__":
    with one_line_errors():
        main()

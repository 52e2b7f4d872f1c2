"""Table 1 for a folder of videos, ours or anyone's: FaceSim-Arc and -Cur, CLIP-Score, AQ, IQ, MS, DD, and copying.

    python eval.py --videos videos --cases cases.jsonl --curricular glint360k_curricular_face_r101_backbone.bin
    python eval.py --videos consisid --cases cases.jsonl --out out/consisid --vbench        # a baseline, all of Table 1

The name of a video is the id of its case (evaluation/cases.py). The meaning of each number stands where it is
computed: faces, prompt and copying in evaluation/metrics.py, quality in vbench.py, intervals in report.py. In --out:

    eval.json       the videos and the list of cases
    results.jsonl   the scores of each video, one by one: after a kill, the same command continues
    scores.csv      a line for each case, with the reason where there is no score
    summary.md      Table 1's row, means, spreads, intervals
    sheet.png       the best and the worst videos, to look at
    vbench/         input and output of VBench
"""

import common  # isort: skip  # noqa: F401 (before torch: sets the wait policy of its threads)

import argparse
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from tqdm import tqdm

from clips.manifest import VIDEO_SUFFIXES
from common.device import resolve_device
from common.errors import Parser, UserError, one_line_errors, write_text
from common.media import count_frames, read_frames, read_image
from common.outputs import refuse_overwrite
from common.schema import validate
from evaluation.batch import one_line
from evaluation.cases import Case, read_cases
from evaluation.metrics import ClipScore, FaceReader, clip_frames, measure, read_reference, spaced_frames
from evaluation.report import draw_sheet, extremes, markdown, write_csv
from evaluation.results import Result, append_line, begin, read_results, stamp
from evaluation.vbench import DIMENSIONS, read_vbench, run_vbench
from face import recognition_file

CLIP = "openai/clip-vit-base-patch32"
DetectorSize = Annotated[int, Field(ge=0, le=4096, multiple_of=32)]  # the detector's coarsest grid is 32 pixels
Gpus = Annotated[int, Field(ge=1, le=1024)]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", required=True, help="folder of <id>.mp4 (or .webm, .mkv, ...)")
    parser.add_argument("--cases", required=True, help="JSONL of id, reference, prompt")
    parser.add_argument("--out", default="out/eval", help="folder of the results (%(default)s)")
    parser.add_argument("--name", help="the name of Table 1's row (default: the videos' folder)")
    parser.add_argument("--faces", default="buffalo_l", help="insightface model pack, name or folder (%(default)s)")
    parser.add_argument("--det-size", type=int, default=320, help="pixels of the detector's side; 0: its own (320)")
    parser.add_argument("--curricular", help="CurricularFace's IR-101, .bin or .safetensors; without it no FaceSim-Cur")
    parser.add_argument("--clip", default=CLIP, help="folder or hub id; none: no CLIP-Score (%(default)s)")
    parser.add_argument("--clip-bgr", action="store_true", help="colours reversed, as in the published script")
    parser.add_argument("--vbench", action="store_true", help="AQ, IQ, MS, DD too; needs make vbench and a GPU")
    parser.add_argument("--gpus", type=int, default=1, help="for VBench (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(dtype="float32")
    options = parser.parse_args()
    validate(DetectorSize, options.det_size, f"--det-size {options.det_size}")
    validate(Gpus, options.gpus, f"--gpus {options.gpus}")
    if "" in vars(options).values():
        raise UserError("an option is empty: give a name, or leave it out")
    return options


def main() -> None:
    # --- videos and cases; results of an earlier run
    options = parse_arguments()
    device, _ = resolve_device(options)
    cases, out, files = read_cases(options.cases), Path(options.out), find_videos(options.videos)
    if strangers := files.keys() - {case.id for case in cases}:
        print(f"note: {len(strangers)} videos belong to no case, {min(strangers)!a} for one")
    claim(out, options, [options.cases, options.curricular, *files.values(), *(case.reference for case in cases)])
    clip_name = None if options.clip == "none" else options.clip
    faces = recognition_file(options.faces)
    others = {case.id: other_photo(cases, k) for k, case in enumerate(cases)}
    stamps, file_stamps = {}, {id: stamp([file]) for id, file in files.items()}  # VBench depends on the video alone
    for case in (case for case in cases if case.id in files):
        depends = files[case.id], case.reference, others[case.id], options.curricular and Path(options.curricular)
        stamps[case.id] = stamp(depends, [case.prompt, faces, options.det_size, clip_name, options.clip_bgr])
    results, of_vbench = read_results(out / "results.jsonl"), read_vbench(out / "vbench", file_stamps)
    todo = [case for case in cases if case.id not in results or results[case.id].stamp != stamps.get(case.id)]
    if changed := [case for case in todo if case.id in results and case.id in files]:
        print(f"note: {len(changed)} videos are measured anew, since the file, the case or an option has changed")

    # --- faces and prompt, one video after the other
    problems: dict[str, str] = {}
    if any(case.id in files and not case.problem for case in todo):
        reader = FaceReader(options.faces, options.curricular, device, options.det_size or None)
        clip = ClipScore(clip_name, device, options.clip_bgr) if clip_name else None
    for case in tqdm(todo, "videos", disable=not todo):
        try:
            if case.problem or case.id not in files:
                raise UserError(case.problem or f"no video {case.id}.mp4 in {options.videos}")
            scores = {"id": case.id, "stamp": stamps[case.id]}
            scores |= score(files[case.id], case, others[case.id], reader, clip)
            results[case.id] = validate(Result, scores, "scores")  # a NaN is this case's problem
        except Exception as error:
            problems[case.id] = one_line(error)
            tqdm.write(f"{case.id} skipped: {problems[case.id]}")
        else:
            append_line(out / "results.jsonl", asdict(results[case.id]))
    scored = {case.id: case for case in cases if case.id not in problems}
    if not scored:
        raise UserError(f"none of {len(cases)} cases could be scored: {next(iter(problems.values()))}")

    # --- quality, by VBench
    failure, lacking = None, [name for name in scored if of_vbench.get(name, {}).keys() < DIMENSIONS.keys()]
    if options.vbench and lacking:
        try:
            run_vbench({name: (files[name], file_stamps[name]) for name in lacking}, out / "vbench", options.gpus)
            of_vbench = read_vbench(out / "vbench", file_stamps)
        except UserError as error:  # reported at the end: the rest of the table does not depend on it
            failure = error

    # --- tables and pictures
    rows: list[dict[str, Any]] = []
    for case in cases:
        row = {"id": case.id, "reference": str(case.reference or ""), "video": str(files.get(case.id, ""))}
        known = asdict(results[case.id]) | of_vbench.get(case.id, {}) if case.id in scored else {}
        rows.append(row | (known or {"problem": problems[case.id]}))
    write_csv(out / "scores.csv", rows)
    good = [row for row in rows if "problem" not in row]
    how = f"faces by {faces.name}" + (", CLIP receives BGR" if options.clip_bgr else "")
    text = markdown(options.name or Path(options.videos).resolve().name, good, len(cases), how)
    write_text(out / "summary.md", text)
    draw_sheet(out / "sheet.png", [picture(row, scored[row["id"]]) for row in extremes(good)])
    print(f"{text}\nwrote scores.csv, summary.md and sheet.png into {out}")
    if failure:
        raise failure


def find_videos(folder: str | Path) -> dict[str, Path]:
    """Video files by stem."""
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}: give --videos the folder of the videos")
    by_name: dict[str, Path] = {}
    for file in sorted(Path(folder).iterdir()):
        if file.suffix.lower() in VIDEO_SUFFIXES and not file.name.startswith("."):  # hidden: half written
            if file.stem in by_name:
                raise UserError(f"{file} and {by_name[file.stem].name} are both videos of {file.stem}: remove one")
            by_name[file.stem] = file
    if not by_name:
        raise UserError(f"no video in {folder}: they are named <id>.mp4, .webm, .mkv, ...")
    return by_name


def claim(out: Path, options: argparse.Namespace, inputs: list) -> None:
    """Make the folder of the results. UserError if it holds results of other videos, or inputs of this run."""
    begun, results = out / "eval.json", out / "results.jsonl"
    tables = [out / name for name in ("scores.csv", "summary.md", "sheet.png")]
    refuse_overwrite([begun, results, *tables], inputs)
    strange = [] if begun.exists() or results.exists() else [table for table in tables if table.exists()]
    if strange:
        raise UserError(f"{strange[0]} is there, and eval.py has not made it: give another --out")
    settings = {key: ascii(str(Path(vars(options)[key]).resolve()))[1:-1] for key in ("videos", "cases")}
    begin(begun, settings, "give another --out")


def other_photo(cases: list[Case], k: int) -> Path | None:
    """The photo of the next case with another one, for the chance level of copying."""
    photos = [case.reference for case in cases[k + 1 :] + cases[:k] if case.reference]
    return next((photo for photo in photos if photo != cases[k].reference), None)


def score(file: Path, case: Case, other: Path | None, reader: FaceReader, clip: ClipScore | None) -> dict[str, Any]:
    reference, stranger = read_reference(read_image(case.reference), reader), None
    with suppress(Exception):  # a photo of another case, which has its own line in the report
        stranger = read_reference(read_image(other), reader)
    total = count_frames(file)
    for_clip = read_frames(file, clip_frames(total)) if clip else None
    return measure(read_frames(file, spaced_frames(total)), for_clip, case.prompt, reference, stranger, reader, clip)


def picture(row: dict[str, Any], case: Case) -> tuple:
    """A line of the sheet: title, reference, five frames."""
    figures = [f"{row[key]:.3f}" for key in ("facesim_arc", "facesim_cur") if row.get(key) is not None]
    title = f"{case.id}   FaceSim {' / '.join(figures)}   face in {row['face_rate']:.0%} of frames"
    if row.get("clip_score") is not None:
        title += f"   CLIP {row['clip_score']:.2f}"
    return title, read_image(case.reference), read_frames(row["video"], spaced_frames(count_frames(row["video"]), 5))


if __name__ == "__main__":
    with one_line_errors():
        main()

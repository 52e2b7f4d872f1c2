"""AQ, IQ, MS and DD of Table 1: VBench's own package, in an environment of its own, and its results read back.

    aq  aesthetic_quality    LAION's predictor on CLIP ViT-L/14, mean over frames, 0 to 1
    iq  imaging_quality      MUSIQ (SPAQ), longer side at 512, mean over frames; its 0 to 100 is 0 to 1 here
    ms  motion_smoothness    AMT predicts every second frame; scaled down where GPU memory is small, so name the GPU
    dd  dynamic_degree       RAFT: does the video move, yes or no; the mean is a share of videos

Its pins (numpy below 2, transformers 4.33.2) rule out one environment for both. Its command `vbench evaluate` starts
whatever `python` comes first in PATH and hides its exit code, so the module behind it is called instead. It takes the
pictures in a folder for videos: hence links to the videos alone. It needs an NVIDIA GPU, wget and unzip.
"""

import math
import os
import subprocess
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from common.errors import UserError
from common.images import require_file
from common.schema import foreign_record, parse_json, validate

DIMENSIONS = {"aq": "aesthetic_quality", "iq": "imaging_quality", "ms": "motion_smoothness", "dd": "dynamic_degree"}
SCALE = {"iq": 100}  # its figures per video are divided by this
PYTHON = Path(__file__).parent.parent / ".venv-vbench" / "bin" / "python"


@foreign_record
class _Score:
    """Of one video. A results file has for each dimension the mean, then a list of these."""

    video_path: str
    video_results: bool | Annotated[float, Field(allow_inf_nan=True)]  # NaN is a missing score, not a damaged file


def run_vbench(videos: dict[str, tuple[Path, str]], folder: Path, gpus: int = 1) -> None:
    """Score videos, {id: (file, stamp)}; the results land in `folder`. Raises UserError where VBench cannot run."""
    if not PYTHON.is_file():
        raise UserError(f"--vbench: there is no {PYTHON.parent.parent.name} beside eval.py: run make vbench")
    folder = folder.resolve()
    links = folder / "videos"
    links.mkdir(parents=True, exist_ok=True)
    for link in links.iterdir():
        if not link.is_symlink():
            raise UserError(f"{link} is there, and eval.py has not made it: give another --out")
        link.unlink()
    try:
        for name, (file, stamp) in videos.items():
            (links / f"{name}@{stamp}.mp4").symlink_to(file.resolve())  # VBench takes only files named .mp4
        command = [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        command += ["-m", "vbench.launch.evaluate", "--videos_path", links, "--output_path", folder]
        command += ["--mode", "custom_input", "--dimension", *DIMENSIONS.values()]
        # In a folder without Python files: from here, this repository's modules would hide those of its packages.
        subprocess.run(command, cwd=folder, check=True)
    except subprocess.CalledProcessError as error:
        raise UserError(f"VBench ended with code {error.returncode}, its last lines say why") from None
    except OSError as error:
        raise UserError(f"VBench could not be started: {error}") from None


def read_vbench(folder: Path, stamps: dict[str, str]) -> dict[str, dict[str, float]]:
    """Scores from all *_eval_results.json in `folder`, the newest last: {id: {"aq": 0.57, ...}}, ids of `stamps` only.

    A result counts for the file with the stamp in its name, so a video made a second time has none. Results on
    <id>.mp4, made without eval.py, count too.
    """
    scores: dict[str, dict[str, float]] = {}
    for file in sorted(folder.glob("*_eval_results.json"), key=os.path.getmtime):
        try:
            require_file(file, "results")
            results = parse_json(dict[str, Any], file.read_bytes(), file)
            for key, dimension in DIMENSIONS.items():
                _, entries = validate(
                    tuple[Any, list[_Score]], results.get(dimension, (None, ())), f"{file}: {dimension}"
                )
                for entry in entries:
                    name, _, stamp = Path(entry.video_path).stem.partition("@")
                    if name in stamps and stamp in ("", stamps[name]) and math.isfinite(entry.video_results):
                        scores.setdefault(name, {})[key] = float(entry.video_results) / SCALE.get(key, 1)
        except UserError as error:
            raise UserError(f"{error}: not a results file of VBench, move it away") from None
    return scores

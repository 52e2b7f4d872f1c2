"""AQ, IQ, MS and DD of Table 1: VBench's own package, in an environment of its own, and its results read back.

    scored videos ──> links vbench/videos/<id>@<stamp>.mp4 ──> python -m vbench.launch.evaluate ──> *_eval_results.json
                                                               (.venv-vbench, made by make vbench)        │
    {id: {"aq": ..., "iq": ..., "ms": ..., "dd": ...}}  <───────────────── read_vbench ───────────────────┘

    aq  aesthetic_quality    LAION's predictor on CLIP ViT-L/14, mean over frames, 0 to 1
    iq  imaging_quality      MUSIQ (SPAQ), longer side at 512, mean over frames; its 0 to 100 is 0 to 1 here
    ms  motion_smoothness    AMT predicts every second frame; scaled down where GPU memory is small, so name the GPU
    dd  dynamic_degree       RAFT: does the video move, yes or no; the mean is a share of videos

Its pins (numpy below 2, transformers 4.33.2) rule out one environment for both. Its command `vbench evaluate` starts
whatever `python` comes first in PATH and hides its exit code, so the module behind it is called instead. It takes the
pictures in a folder for videos: hence links to the videos alone. It needs an NVIDIA GPU, wget and unzip.
"""

import json
import shutil
import subprocess
from pathlib import Path

from common.errors import UserError

DIMENSIONS = {
    "aq": "aesthetic_quality",
    "iq": "imaging_quality",
    "ms": "motion_smoothness",
    "dd": "dynamic_degree",
}
SCALE = {"iq": 100}  # its per-video figures are divided by this
PYTHON = Path(__file__).parent.parent / ".venv-vbench" / "bin" / "python"


def vbench_command(videos: Path, out: Path, gpus: int = 1) -> list[str]:
    launcher = [str(PYTHON), "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    options = ["--videos_path", str(videos), "--output_path", str(out), "--mode", "custom_input"]
    return [*launcher, "-m", "vbench.launch.evaluate", *options, "--dimension", *DIMENSIONS.values()]


def run_vbench(videos: dict[str, tuple[Path, str]], folder: Path, gpus: int = 1) -> None:
    """Score videos, {id: (file, stamp)}; the results land in `folder`. Raises UserError where VBench cannot run."""
    if not PYTHON.is_file():
        raise UserError(f"--vbench: there is no {PYTHON.parent.parent.name} beside eval.py: run make vbench")
    folder = folder.resolve()
    links = folder / "videos"
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir(parents=True)
    for name, (file, stamp) in videos.items():
        (links / f"{name}@{stamp}.mp4").symlink_to(file.resolve())  # it only looks at files named .mp4
    try:
        # In a folder without Python files: from here, this repository's modules would hide those of its packages.
        subprocess.run(vbench_command(links, folder, gpus), cwd=folder, check=True)
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"VBench ended with code {error.returncode}, its last lines say why; the rest is written"
        ) from None


def read_vbench(folder: Path, stamps: dict[str, str]) -> dict[str, dict[str, float]]:
    """Scores from all *_eval_results.json in `folder`, the newest last: {id: {"aq": 0.57, ...}}, ids of `stamps` only.

    A result counts for the file with the stamp in its name, so a video that was made anew has none. Results that were
    made without eval.py, on <id>.mp4, count too.
    """
    scores: dict[str, dict[str, float]] = {}
    for file in sorted(folder.glob("*_eval_results.json"), key=lambda file: file.stat().st_mtime):
        try:
            results = json.loads(file.read_text())
            for key, dimension in DIMENSIONS.items():
                _mean, videos = results.get(dimension, (None, []))
                for entry in videos:
                    name, _, stamp = Path(entry["video_path"]).stem.partition("@")
                    if name in stamps and stamp in ("", stamps[name]):
                        value = float(entry["video_results"]) / SCALE.get(key, 1)
                        scores.setdefault(name, {})[key] = value
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{file} is not a results file of VBench: remove it") from None
    return scores

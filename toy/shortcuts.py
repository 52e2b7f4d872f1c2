"""Price and gain of a step cache, and of guidance on an interval of noise levels, on the tiny model.

    python -m toy.shortcuts                                             # 32 people, all rows
    python -m toy.shortcuts --count 8 --rows "cache 0.08" "0.2 to 0.8"  # a piece of it

All rows make the same videos: people, prompts and noise of toy/judge.py, whose instruments read them, one video at a
time as in sample.py. PSNR is against the first row's videos. Blocks are counted as tokens through a block, a figure of
no machine; the speed is that of the DiT's passes on this one.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from common.device import DTYPES, resolve_device
from common.errors import Parser, UserError, one_line_errors, whole, write_text
from config import ASSETS
from evaluation.metrics import FaceReader
from model import Block, LTXVideo
from toy import judge
from toy.eye import Eye

PLAIN = "plain"
ROWS: dict[str, dict[str, Any]] = {PLAIN: {}}
ROWS |= {f"cache {threshold}": {"cache": threshold} for threshold in (0.02, 0.04, 0.08, 0.12, 0.2)}
INTERVALS = (0, 0.8), (0, 0.5), (0.2, 1), (0.5, 1), (0.2, 0.8)
ROWS |= {f"{low} to {high}": {"guidance_interval": (low, high)} for low, high in INTERVALS}
ROWS |= {"cache 0.08, 0.5 to 1": ROWS["cache 0.08"] | ROWS["0.5 to 1"]}
HEAD = "| | similarity | minus plain | own nearest | direction | background | PSNR, dB | blocks | speed |"
LEGEND = (
    "*a to b*: guidance at these noise levels only. *minus plain*: mean difference of the same videos, standard error."
)


@contextmanager
def meter(device: torch.device) -> Iterator[dict[str, float]]:
    """Counts tokens through blocks, and seconds in the DiT, of all models that run inside."""
    counts = {"tokens": 0.0, "seconds": 0.0}

    def clock() -> float:
        if device.type == "cpu":
            return time.process_time()  # other programs on the machine do not count
        torch.cuda.synchronize(device)
        return time.perf_counter()

    def before(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, Block):
            counts["tokens"] += inputs[0].shape[:2].numel()
        elif isinstance(module, LTXVideo):
            counts["seconds"] -= clock()

    def after(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if isinstance(module, LTXVideo):
            counts["seconds"] += clock()

    hooks = register_module_forward_pre_hook(before), register_module_forward_hook(after)
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def psnr(videos: np.ndarray, others: np.ndarray) -> float:
    """Peak signal to noise of bytes (N, F, H, W, 3), mean over videos."""
    errors = np.square(videos.astype(float) - others).reshape(len(videos), -1).mean(1)
    return float((10 * np.log10(255**2 / np.maximum(errors, 1e-9))).mean())


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=str(ASSETS / "tiny.safetensors"), help="of the tiny world (%(default)s)")
    parser.add_argument("--count", type=whole(2), default=32, help="people (%(default)s)")
    parser.add_argument("--steps", type=whole(), default=30, help="Euler steps (%(default)s)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--out", default="out/shortcuts.md", help="file of the table (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bfloat16 on a GPU, float32 on a CPU")
    options = parser.parse_args()
    for row in options.rows:
        if row not in ROWS:
            raise UserError(f"--rows: there is no row {row!r}; there are {', '.join(ROWS)}")
    device, dtype = resolve_device(options)
    reader = FaceReader(ASSETS / "faces", device=device, det_size=128)
    eye, lines, first = Eye.from_file(ASSETS / "judge.safetensors", device), [], None
    for name in dict.fromkeys([PLAIN, *options.rows]):
        recipe = judge.recipe_of(options.ckpt, steps=options.steps, **ROWS[name])
        clips = judge.cases(0, options.count, recipe.frames, recipe.fps, recipe.height)
        photos, how = [clip["reference"] for clip in clips], (recipe, device, dtype, 1, name)
        with meter(device) as counts:
            videos = judge.make_videos(options.ckpt, ASSETS / "gemma", clips, photos, range(options.count), *how)
        rows = judge.measure(videos, clips, reader, eye)
        cells = {key: f"{cell[0]:.2f}" if cell else "" for key, cell in judge.summarize(rows).items()}
        similarity = np.array([row["similarity"] for row in rows], float)
        first = first or (videos, similarity, counts)
        less, gain = similarity - first[1], ["", ""]
        if name != PLAIN:
            gain = [f"{less.mean():+.3f} ± {less.std(ddof=1) / len(less) ** 0.5:.3f}", f"{psnr(videos, first[0]):.1f}"]
        costs = [f"{counts['tokens'] / first[2]['tokens']:.0%}", f"{first[2]['seconds'] / counts['seconds']:.2f}"]
        quality = [cells["similarity"], gain[0], *(cells[key] for key in ("retrieved", "direction", "background"))]
        lines.append([name, *quality, gain[1], *costs])
        print(" | ".join(lines[-1]), flush=True)
    text = judge.markdown(HEAD, lines) + f"\n{options.count} videos of {options.steps} steps. {LEGEND}\n"
    write_text(Path(options.out), text)
    print(f"\n{text}wrote {options.out}")


if __name__ == "__main__":
    with one_line_errors():
        main()

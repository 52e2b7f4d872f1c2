"""What a person sees of a run: one line per `log.every` steps, the same figures in log.jsonl, and TensorBoard; the
figures of the held-out clips in held_out.jsonl."""

import json
import math
import re
import resource
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError, write_text
from config import LEVELS, Config, as_dict
from engine.plan import CARDS, Plan


def _step(line: str) -> float:
    """The step of a line of log.jsonl; infinity for a damaged one, such as the half of a line that a kill leaves."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return math.inf


class Log:
    COLUMNS = ("loss", "flow", "id", "tic", "w_aux", "t", "reference", "faces", "frames", "skipped")

    def __init__(self, config: Config, plan: Plan, run: Path, first: int, enabled: bool):
        self.config, self.first, self.begin = config, first, time.perf_counter()
        self.grid = plan.grid  # of this step's clips
        # Tokens and operations of a sample, by grid.
        self.costs = {p.grid: (p.tokens + p.reference_tokens, p.flops_per_sample()) for p, _ in plan.buckets}
        self.file = self.held_out = self.board = self.wandb = None
        self.sinks = ExitStack()
        if not enabled:
            return
        self.file = self.open(run / "log.jsonl")
        if config.data.holdout:
            self.held_out = self.open(run / "held_out.jsonl")
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = self.sinks.enter_context(SummaryWriter(str(run / "tensorboard"), purge_step=first + 1))
        if config.log.wandb:
            try:
                import wandb
            except ModuleNotFoundError:
                raise UserError("log.wandb is on and wandb is not installed: pip install wandb") from None
            options = {"dir": str(run), "config": as_dict(config), "resume": "allow", "id": run.name}
            self.wandb = wandb.init(project="nano-st-drc", **options)
            self.sinks.callback(self.wandb.finish)

    def open(self, path: Path) -> TextIO:
        """A file of lines to append to. Steps after the checkpoint come again, so their lines go."""
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []
        write_text(path, "".join(line for line in lines if self.first and _step(line) <= self.first))
        return self.sinks.enter_context(path.open("a", buffering=1))

    def figures(self, step: int, table: Tensor, norm: float, lr: float, seconds: float) -> dict[str, float]:
        columns = dict(zip(self.COLUMNS, table.double().unbind(1)))
        intact = columns["skipped"] == 0
        with_face = (columns["faces"] > 0) & intact
        # Where there is nothing to compare, a loss is 0, which would make its mean look better than it is.
        compared = {"id": with_face & (columns["reference"] > 0), "tic": with_face}
        intact = intact if intact.any() else ~intact
        figures = {"step": step} | {key: columns[key][intact].mean().item() for key in ("loss", "flow", "w_aux")}
        figures |= {key: columns[key][rows].mean().item() if rows.any() else 0.0 for key, rows in compared.items()}
        faces, frames = (columns[key][intact].sum().item() for key in ("faces", "frames"))
        figures |= {"face_rate": faces / frames if frames else 0.0, "grad_norm": norm, "lr": lr, "seconds": seconds}
        tokens, flops = self.costs[self.grid]
        figures["tokens_per_s"] = len(table) * tokens / seconds
        figures["tflops"] = len(table) * flops / seconds / dist.get_world_size() / 1e12
        return figures | {"memory_gib": memory_gib()}

    def line(self, f: dict[str, float]) -> str:
        step, steps, seconds = f["step"], self.config.optim.steps, f["seconds"]
        left = (steps - step) * (time.perf_counter() - self.begin) / max(1, step - self.first)
        left = time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 86400:.1f} days"
        identity = "id off"
        if self.config.faces.pack:
            identity = f"id {f['id']:.3f}  tic {f['tic']:.3f}  w {f['w_aux']:.3f}  faces {f['face_rate']:.0%}"
        mfu = f" ({f['tflops'] / peak:.0%} MFU)" if (peak := peak_tflops()) else ""
        return (
            f"step {step}/{steps}  loss {f['loss']:.4f}  flow {f['flow']:.4f}  {identity}  grad {f['grad_norm']:.2f}  "
            f"lr {f['lr']:.1e}  {f['tokens_per_s']:,.0f} tok/s  {f['tflops']:.3g} TFLOP/s{mfu}  "
            f"{f['memory_gib']:.1f} GiB  {seconds:.2f} s  {left} left"
        )

    def add(self, step: int, table: Tensor, norm: float, lr: float, seconds: float) -> None:
        edge = step in (1, self.config.optim.steps)
        if self.file is None or (step % self.config.log.every and not edge):
            return
        figures = self.figures(step, table, norm, lr, seconds)
        print(self.line(figures), flush=True)
        self.file.write(json.dumps(figures) + "\n")
        # By noise level too: the mean moves with the draw of t more than with learning.
        flow, t = (table[:, self.COLUMNS.index(key)] for key in ("flow", "t"))
        bins = (t * 5).long().clamp(max=4)
        by_level = {f"flow_by_t/{k / 5:.1f}": flow[bins == k].mean().item() for k in bins.unique().tolist()}
        self.draw(figures | by_level, step)

    def draw(self, figures: dict[str, float], step: int) -> None:
        """Points of the curves."""
        for name, value in figures.items() if self.board else ():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(figures, step=step)

    def add_held_out(self, step: int, figures: dict[str, Any]) -> None:
        """The figures of `holdout.evaluate`."""
        if self.held_out is None:
            return
        self.held_out.write(json.dumps({"step": step} | figures) + "\n")
        line = f"held out, step {step}  flow {figures['flow']:.4f} ± {figures['flow_error']:.4f}"
        for key, name in (("no_reference", "without reference"), ("similarity", "similarity")):
            line += f"  {name} {figures[key]:.4f}" if key in figures else ""
        print(line, flush=True)
        curves = {}
        for key, value in figures.items():
            by_level = zip(LEVELS, value) if isinstance(value, list) else ()
            curves |= {f"held_out_{key}/{t:.4f}": each for t, each in by_level} or {f"held_out/{key}": value}
        self.draw(curves, step)

    def close(self) -> None:
        self.sinks.close()


def memory_gib() -> float:
    """Most memory this process has held: of its GPU, or of the machine where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def peak_tflops() -> float | None:
    """The GPU's dense bf16 peak by its data sheet, if it is a known one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((tflops for card, (tflops, _) in CARDS.items() if re.search(rf"\b{card.split('-')[0]}\b", name)), None)

"""What a person sees of a run: one line per `log.every` steps, the same figures in log.jsonl, and TensorBoard."""

import json
import re
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError, whole_file
from config import Config, as_dict
from engine.plan import CARDS, Plan


class Log:
    """One line per `log.every` steps, the same figures in log.jsonl, and TensorBoard (or Weights & Biases)."""

    COLUMNS = ("loss", "flow", "id", "tic", "w_aux", "t", "faces", "frames", "skipped")

    def __init__(self, config: Config, plan: Plan, run: Path, first: int, enabled: bool):
        self.config, self.first, self.begin = config, first, time.perf_counter()
        self.flops, self.tokens = plan.flops_per_sample(), plan.tokens + plan.reference_tokens
        self.file = self.board = self.wandb = None
        if not enabled:
            return
        path = run / "log.jsonl"
        kept = [line for line in path.open() if json.loads(line)["step"] <= first] if path.exists() else []
        with whole_file(path) as temporary:  # steps after the checkpoint come again
            temporary.write_text("".join(kept))
        self.file = path.open("a", buffering=1)
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=first + 1)
        if config.log.wandb:
            try:
                import wandb
            except ModuleNotFoundError:
                raise UserError("log.wandb is on and wandb is not installed: pip install wandb") from None
            options = {"dir": str(run), "config": as_dict(config), "resume": "allow", "id": run.name}
            self.wandb = wandb.init(project="nano-st-drc", **options)

    def figures(self, step: int, table: Tensor, norm: float, lr: float, seconds: float) -> dict[str, float]:
        skipped = table[:, self.COLUMNS.index("skipped")] > 0
        intact = table if skipped.all() else table[~skipped]
        mean = dict(zip(self.COLUMNS, intact.double().mean(0).tolist()))
        total = dict(zip(self.COLUMNS, intact.double().sum(0).tolist()))
        seen = (table[:, self.COLUMNS.index("faces")] > 0) & ~skipped
        id_column, tic_column = self.COLUMNS.index("id"), self.COLUMNS.index("tic")
        figures = {"step": step, "loss": mean["loss"], "flow": mean["flow"], "w_aux": mean["w_aux"]}
        # Over the samples in which a face was found: the others' zeros would make the figure look better than it is.
        figures["id"] = table[seen, id_column].double().mean().item() if seen.any() else 0.0
        figures["tic"] = table[seen, tic_column].double().mean().item() if seen.any() else 0.0
        figures["face_rate"] = total["faces"] / total["frames"] if total["frames"] else 0.0
        figures |= {"grad_norm": norm, "lr": lr, "seconds": seconds}
        figures["tokens_per_s"] = len(table) * self.tokens / seconds
        figures["tflops"] = len(table) * self.flops / seconds / dist.get_world_size() / 1e12
        figures["memory_gib"] = memory_gib()
        return figures

    def line(self, step: int, table: Tensor, norm: float, lr: float, seconds: float) -> str:
        f = self.figures(step, table, norm, lr, seconds)
        steps = self.config.optim.steps
        left = (steps - step) * (time.perf_counter() - self.begin) / max(1, step - self.first)
        left = time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 86400:.1f} days"
        peak = peak_tflops()
        identity = "id off"
        if self.config.faces.pack:
            identity = f"id {f['id']:.3f}  tic {f['tic']:.3f}  w {f['w_aux']:.3f}  faces {f['face_rate']:.0%}"
        mfu = f" ({f['tflops'] / peak:.0%} MFU)" if peak else ""
        return (
            f"step {step}/{steps}  loss {f['loss']:.4f}  flow {f['flow']:.4f}  {identity}  "
            f"grad {norm:.2f}  lr {lr:.1e}  "
            f"{f['tokens_per_s']:,.0f} tok/s  {f['tflops']:.3g} TFLOP/s{mfu}  {f['memory_gib']:.1f} GiB  "
            f"{seconds:.2f} s  {left} left"
        )

    def add(self, step: int, table: Tensor, norm: float, lr: float, seconds: float) -> None:
        edge = step in (1, self.config.optim.steps)  # a first look, and how it ended
        if self.file is None or (step % self.config.log.every and not edge):
            return
        figures = self.figures(step, table, norm, lr, seconds)
        print(self.line(step, table, norm, lr, seconds), flush=True)
        self.file.write(json.dumps(figures) + "\n")
        # By noise level too: the mean moves with the draw of t more than with learning.
        bins = (table[:, self.COLUMNS.index("t")] * 5).long().clamp(max=4)
        flow = table[:, self.COLUMNS.index("flow")]
        by_level = {f"flow_by_t/{k / 5:.1f}": flow[bins == k].mean().item() for k in bins.unique().tolist()}
        if self.board:
            for name, value in (figures | by_level).items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(figures | by_level, step=step)

    def close(self) -> None:
        for sink in (self.file, self.board):
            if sink is not None:
                sink.close()
        if self.wandb:
            self.wandb.finish()


def memory_gib() -> float:
    """Most memory this process has held: of its GPU, or of the machine where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def peak_tflops() -> float | None:
    """The GPU's dense bf16 peak by its data sheet, if it is a known one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((tflops for card, (tflops, _) in CARDS.items() if re.search(rf"\b{card.split('-')[0]}\b", name)), None)

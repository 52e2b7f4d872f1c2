"""A training step of the full-size DiT, compiled: ways to recompute, products in 8 bits, optimizer, gradients' error.

    python -m bench.train_step                     # all 48 blocks, on a GPU of 141 GB
    python -m bench.train_step --layers 16         # of 80 GB; the last column computes the share of 48 blocks from it
    python -m bench.train_step --ckpt assets/tiny.safetensors --size 64x64x17     # sizes of any LTX-2.3 file, on a CPU
    python -m bench.train_step --gradients --size 480x832x9 --device cpu          # gradients' error alone

Random weights in bf16 with AdamW's moments in bf16 (engine/optim.py), one sample with reference. Prints Markdown. The
ceiling is a bf16 matrix product measured in the same run. Useful operations are three forward passes.
"""

import argparse
import gc
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import FPS, LTX, ceilings, device_name, draw_weights, latent_grid, measure, resolve_sizes
from checkpoint import open_checkpoint
from common.device import free, resolve_device
from common.errors import Parser, one_line_errors, whole
from engine.fp8_training import train_in_fp8
from engine.optim import AdamWBF16
from engine.parallel import set_recompute
from engine.plan import GIB, dit_flops
from losses import flow_loss
from model import LTXVideo, append_reference
from rope import RefPositions, reference_positions, video_positions
from text import MAX_TOKENS
from vae import latent_scale


class Step:
    """A model with `layers` blocks, and one batch that its training step computes."""

    def __init__(self, ltx: dict[str, Any], layers: int, options: argparse.Namespace, dtype: torch.dtype):
        device, scale = options.device, latent_scale(ltx["vae"])
        grid = latent_grid(options.size, scale)
        self.dit, self.device, self.n, self.r = ltx["transformer"], device, math.prod(grid), grid[1] * grid[2]
        torch.manual_seed(0)
        with torch.device("meta"):
            model = LTXVideo(self.dit | {"num_layers": layers})
        self.model = draw_weights(model, device, dtype).train().requires_grad_(True)
        channels = self.dit["in_channels"]
        batch = [torch.randn(1, k, channels) for k in (self.n, self.n, self.r)]  # z_0, eps, z_ref
        batch.append(torch.randn(1, options.text_tokens, model.dim))
        self.batch = [t.pin_memory() if device.type == "cuda" else t for t in batch]
        self.positions = video_positions(*grid, FPS, scale)[None].to(device)
        self.ref_positions = RefPositions(reference_positions(*grid, FPS, scale)[None].to(device))
        self.t, self.dtype = torch.full((1,), 0.7, device=device), dtype
        self.context = options.text_tokens

    def upload(self) -> list[Tensor]:
        return [t.to(self.device, non_blocking=True) for t in self.batch]

    def forward(self, batch: list[Tensor]) -> Tensor:
        z_0, eps, z_ref, context = batch
        z_t = ((1 - self.t) * z_0 + self.t * eps).to(self.dtype)
        tokens = append_reference(z_t, z_ref, self.t, self.positions, self.ref_positions)
        v = self.model(tokens.latents, tokens.timesteps, self.t, context.to(self.dtype), tokens.positions)
        return flow_loss(v[:, : self.n], z_0, eps).sum()

    def both(self) -> None:
        self.model.zero_grad(set_to_none=False)
        self.forward(self.upload()).backward()

    def flops(self, layers: int) -> float:
        return 3 * dit_flops(self.dit | {"num_layers": layers}, self.n, self.r, self.context)


def speed(step: Step, name: str, ways: list, ceiling: float, options: argparse.Namespace) -> None:
    """A row for each way to recompute. The time of a further block is that of the measured blocks less half of them."""
    blocks, whole = step.model.transformer_blocks, step.dit["num_layers"]
    count = len(blocks)
    half = nn.ModuleList([*blocks[: count // 2 - 1], blocks[-1]])  # without inner blocks: those of more layers
    for how in ways:
        try:
            seconds = {}
            for part in (blocks,) if count == whole else (half, blocks):
                step.model.transformer_blocks = part
                set_recompute(step.model, how)
                step.both()
                free(options.device)
                seconds[len(part)], peak = measure(step.both, options.device, options.repeat, warm=True)
            block = (seconds[count] - seconds[len(half)]) / (count - len(half)) if count < whole else 0
            in_all = seconds[count] + (whole - count) * block
            shares = [step.flops(n) / s / ceiling for n, s in ((count, seconds[count]), (whole, in_all))]
            cells = f"{1000 * seconds[count]:,.0f} | {step.flops(count) / seconds[count] / 1e12:,.1f} | {shares[0]:.0%}"
            memory = f"{peak / GIB:.1f}" if peak else ""
            print(f"| {name}, {how} | {cells} | {1000 * in_all:,.0f} | {shares[1]:.0%} | {memory} |", flush=True)
        except torch.OutOfMemoryError:
            print(f"| {name}, {how} | out of memory | | | | | |", flush=True)
            step.model.zero_grad(set_to_none=True)
            free(options.device)
    step.model.transformer_blocks = blocks


def whole_step(step: Step, options: argparse.Namespace) -> None:
    """Each part of a step alone, and whole steps as train.py makes them: clipping and update queued, then one wait."""
    set_recompute(step.model, len(step.model.transformer_blocks) // 2)
    optimizer, parameters = AdamWBF16(step.model.parameters(), lr=1e-6), list(step.model.parameters())
    kept: dict[str, Any] = {}

    def clip() -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)

    parts: dict[str, Callable] = {
        "batch to the GPU": lambda: kept.update(batch=step.upload()),
        "forward": lambda: kept.update(loss=step.forward(kept["batch"])),
        "backward": lambda: kept.pop("loss").backward(),
        "clipping": clip,
        "optimizer": optimizer.step,
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(options.repeat + 1):  # the first is warm-up
        step.model.zero_grad(set_to_none=False)
        for name, run in parts.items():
            times[name].append(measure(run, options.device, 1, warm=True)[0])
    numbers = sum(p.numel() for p in parameters)
    print(f"\n| part of a step, {numbers / 1e9:.2f} B parameters | ms |\n|---|---:|")
    for name, values in times.items():
        print(f"| {name} | {1000 * sorted(values[1:])[len(values[1:]) // 2]:,.1f} |")

    def step_as_in_training() -> None:
        step.both()
        norm = clip()
        optimizer.step()
        norm.item()

    seconds, peak = measure(step_as_in_training, options.device, options.repeat, warm=True)
    print(f"| the whole step, queued without a wait | {1000 * seconds:,.1f} |", flush=True)
    if peak:
        print(f"\npeak of the whole step {peak / GIB:.1f} GiB")


def gradient_errors(ltx: dict[str, Any], options: argparse.Namespace) -> None:
    """Relative error of weight gradients of the second of four random blocks, bf16 and fp8 against float32."""
    layers, found = 4, {}
    for kind in ("float32", "bf16", "fp8"):
        step = Step(ltx, layers, options, torch.float32)  # the same weights for all, drawn from one seed
        step.dtype = torch.float32 if kind == "float32" else torch.bfloat16
        step.model.to(step.dtype)
        if kind == "fp8":
            train_in_fp8(step.model, options.device)
        set_recompute(step.model, "all")
        step.both()
        weights = step.model.transformer_blocks[1].named_parameters()
        found[kind] = {name: p.grad.float() for name, p in weights if name.endswith("weight") and p.ndim == 2}
        del step, weights
        free(options.device)
    print("\n| gradient of | bf16 | fp8 |\n|---|---:|---:|")
    for name, exact in found["float32"].items():
        off = [((found[kind][name] - exact).norm() / exact.norm()).item() for kind in ("bf16", "fp8")]
        print(f"| {name.removesuffix('.weight')} | {off[0]:.2%} | {off[1]:.2%} |")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="sizes of this checkpoint (default: of LTX-2.3); its weights are not read")
    parser.add_argument("--size", default="480x832x121", help="HEIGHTxWIDTHxFRAMES (%(default)s)")
    # The first and the last block stay in bf16, so below 4 nothing could be told from their time.
    parser.add_argument("--layers", type=whole(4, 1000), help="number of blocks, at least 4 (default: all)")
    parser.add_argument("--text-tokens", type=whole(), default=MAX_TOKENS, help="length of the context (%(default)s)")
    parser.add_argument("--repeat", type=whole(), default=3, help="timed calls; their median counts (%(default)s)")
    parser.add_argument("--plain", action="store_true", help="do not compile")
    parser.add_argument("--gradients", action="store_true", help="only the last table, which a CPU computes too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(namespace=argparse.Namespace(dtype="bfloat16"))
    options.device, options.dtype = resolve_device(options)
    return options


def main() -> None:
    options = parse_arguments()
    ltx = open_checkpoint(options.ckpt).config if options.ckpt else json.loads(LTX.read_text())
    (options.size,) = resolve_sizes([options.size], latent_scale(ltx["vae"]))
    if options.gradients:
        return gradient_errors(ltx, options)
    layers = options.layers or ltx["transformer"]["num_layers"]
    begin, (name, driver) = time.perf_counter(), device_name(options.device)
    ceiling, copy = ceilings(options.device, options.dtype, 5)
    print(
        f"# {name}, driver {driver}, PyTorch {torch.__version__}, {'x'.join(map(str, options.size))}, {layers} blocks"
    )
    print(f"\nceilings: {ceiling / 1e12:,.1f} TFLOP/s (bf16 product), {copy / 1e9:,.0f} GB/s (copy)\n")
    columns = "ms | TFLOP/s | of the ceiling | ms of all blocks | of the ceiling | peak GiB"
    print(f"| forward and backward | {columns} |\n|---|---:|---:|---:|---:|---:|---:|")
    step = Step(ltx, layers, options, options.dtype)
    if not options.plain:
        step.model.compile_blocks()
    speed(step, "bf16", ["all", "products", "none"], ceiling, options)
    whole_step(step, options)
    step.model.zero_grad(set_to_none=True)
    gc.collect()
    train_in_fp8(step.model, options.device)
    print(f"\n| forward and backward | {columns} |\n|---|---:|---:|---:|---:|---:|---:|")
    speed(step, "fp8", ["products", "none"], ceiling, options)
    del step
    free(options.device)
    gradient_errors(ltx, options)
    print(f"\n{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    with one_line_errors():
        main()

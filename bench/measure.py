"""What a forward pass, a guided step and a training step cost on this device, beside what the device can do at best.

    python -m bench                                     # the released model's size, random weights drawn here
    python -m bench --size 512x768x121 --compile        # one size (height x width x frames); blocks compiled
    python -m bench --against diffusers                 # its LTX-2 transformer of the same size, in the same run
    python -m bench --ckpt assets/tiny.safetensors --size 64x64x17      # anything that looks like an LTX-2.3 file

Writes bench/<device>.md. The ceilings, a large matrix product and a copy, are measured in the same run. Operations are
those of plan.py; the floor of a row is the larger of operations over the first ceiling and the weights' bytes over the
second. A row that does not fit into memory says so.
"""

import argparse
import gc
import json
import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from checkpoint import Checkpoint
from common.device import DTYPES, free, resolve_device
from common.errors import Parser, UserError, whole_file
from engine.fp8 import store_in_fp8
from engine.offload import offload
from engine.optim import AdamWBF16
from engine.parallel import set_recompute
from engine.plan import GIB, dit_flops, vae_flops
from guidance import DECODE_CHUNK, sample_latents, sigma_schedule
from losses import flow_loss, predict_x0
from model import LTXVideo
from objective import decode_window
from rope import Place, reference_positions, video_positions
from vae import VideoVAE, from_tokens, latent_scale

HERE = Path(__file__).parent.parent
# 720 is no multiple of 32: the nearest that the VAE takes is 704.
SIZES = ("480x832x121", "512x768x121", "704x1280x121")
FPS, TEXT_TOKENS = 24.0, 1024


class Row(NamedTuple):
    """What is timed: `flops` useful operations over `weights` bytes of weights."""

    name: str
    flops: float
    weights: int
    run: Callable[[], Any]


class Measured(NamedTuple):
    seconds: float  # the median
    peak: int | None  # bytes on the device, weights included; None where nobody counts


def measure(run: Callable[[], Any], device: torch.device, repeat: int, warm: bool = False) -> Measured:
    """The median time of a call, after one to warm up unless it is `warm` already."""
    cuda = device.type == "cuda"
    if not warm:
        run()
    times = []
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeat):
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        else:
            before = time.perf_counter()
            run()
            times.append(time.perf_counter() - before)
    return Measured(statistics.median(times), torch.cuda.max_memory_allocated(device) if cuda else None)


def ceilings(device: torch.device, dtype: torch.dtype, repeat: int) -> tuple[float, float]:
    """Operations per second of a matrix product, bytes per second of a copy (read and written)."""
    n, size = (8192, GIB) if device.type == "cuda" else (512, 2**26)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = measure(lambda: a @ b, device, 2 * repeat)
    x, y = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = measure(lambda: y.copy_(x), device, 2 * repeat)
    return 2 * n**3 / product.seconds, 2 * size / copy.seconds


def drawn(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A module built on the meta device, with small random weights drawn on `device`."""
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.normal_(std=0.02)
    return module


def rows(ltx: dict[str, Any], size: tuple[int, int, int], options: argparse.Namespace) -> Iterator[Row]:
    """What is measured at one size (height, width, frames); each part of the model is there while it is needed."""
    (height, width, frames), config = size, ltx["transformer"]
    device, dtype = options.device, options.dtype
    scale = latent_scale(ltx["vae"])
    grid = ((frames - 1) // scale[0] + 1, height // scale[1], width // scale[2])
    n, r, s, channels = math.prod(grid), grid[1] * grid[2], options.text_tokens, config["in_channels"]
    text_only, with_reference = dit_flops(config, n, 0, s), dit_flops(config, n, r, s)
    with torch.device("meta"):
        model, vae = LTXVideo(config), VideoVAE(ltx["vae"])

    model = drawn(model, device, dtype)
    if options.fp8:
        store_in_fp8(model)
    weights = sum(p.nbytes for p in model.parameters())
    if options.offload:
        model = offload(model.cpu(), device)
        free(device)
    if options.compile:
        model.compile_blocks()
    z, ref = (torch.randn(1, k, channels, device=device) for k in (n, r))
    context, null = (torch.randn(1, s, model.dim, device=device, dtype=dtype) for _ in range(2))
    places, ref_places = (f(*grid, FPS, scale)[None].to(device) for f in (video_positions, reference_positions))
    both_places, sigma = torch.cat([places, ref_places], dim=2), torch.full((1,), 0.7, device=device)

    def forward(reference: bool) -> Tensor:
        x = torch.cat([z, ref], dim=1) if reference else z
        timesteps = torch.cat([sigma.expand(n), torch.zeros(x.shape[1] - n, device=device)])[None]
        return model(x.to(dtype), timesteps, sigma, context, both_places if reference else places)

    def guided(steps: int) -> Tensor:
        levels = sigma_schedule(steps, n)
        return sample_latents(model, z, levels, places, context, null, ref, Place(ref_places), dtype=dtype)

    with torch.no_grad():
        yield Row("DiT forward, text only", text_only, weights, lambda: forward(False))
        yield Row("DiT forward, with reference", with_reference, weights, lambda: forward(True))
        step = 2 * text_only + with_reference
        yield Row("guided step, three streams", step, 2 * weights, lambda: guided(1))
        name = f"{options.steps} guided steps, without VAE"
        yield Row(name, options.steps * step, options.steps * 2 * weights, lambda: guided(options.steps))

    with torch.no_grad():
        vae = drawn(vae, device, dtype)
        video = torch.zeros(1, 3, frames, height, width, device=device, dtype=dtype)
        latents = torch.zeros(1, channels, *grid, device=device, dtype=dtype)
        encode, decode = vae_flops(ltx["vae"], grid[0], height, width, frames)
        parts = [sum(p.nbytes for p in part.parameters()) for part in (vae.encoder, vae.decoder)]
        chunk = DECODE_CHUNK
        yield Row("VAE encode, in pieces", encode, parts[0], lambda: vae.encode(video, chunk))
        yield Row("VAE decode, in pieces", decode, parts[1], lambda: vae.decode(latents, chunk))
        yield Row("VAE decode, at once", decode, parts[1], lambda: vae.decode(latents))

    if options.fp8 or options.offload:
        return
    model.train().requires_grad_(True)
    set_recompute(model, True)
    window = min(4, grid[0])  # two latent frames and one more on either side
    _, decode_window_flops = vae_flops(ltx["vae"], window, height, width)
    start = min(1, grid[0] - 1)

    def training(faces: bool) -> None:
        model.zero_grad(set_to_none=False)
        v = forward(True)[:, :n]
        loss = flow_loss(v, torch.zeros_like(z), z).sum()
        if faces:
            z_0 = from_tokens(predict_x0(z, v, sigma), grid).to(dtype)
            loss = loss + decode_window(vae, z_0, start, window - start - 1 if window > 2 else 1).square().mean()
        loss.backward()

    yield Row("training, forward and backward", 3 * with_reference, 2 * weights, lambda: training(False))
    flops = 3 * with_reference + 2 * decode_window_flops
    yield Row("the same with the decoder of the identity losses", flops, 2 * weights, lambda: training(True))
    optimizer = AdamWBF16(model.parameters(), lr=1e-6)
    if dtype == torch.bfloat16:
        yield Row("optimizer step, adamw-bf16", 0, 7 * weights, optimizer.step)  # 4 read, 3 written


def diffusers_row(ltx: dict[str, Any], size: tuple[int, int, int], options: argparse.Namespace) -> Row:
    """diffusers' transformer, text only. It cannot be without its audio branch, which gets a single token here."""
    try:
        from diffusers import LTX2VideoTransformer3DModel
    except ImportError:
        raise UserError("--against diffusers needs diffusers: pip install diffusers") from None
    config, scale, (height, width, frames) = ltx["transformer"], latent_scale(ltx["vae"]), size
    device, dtype, s = options.device, options.dtype, options.text_tokens
    grid = ((frames - 1) // scale[0] + 1, height // scale[1], width // scale[2])
    heads, head_dim, layers = (config[k] for k in ("num_attention_heads", "attention_head_dim", "num_layers"))
    n, channels, dim = math.prod(grid), config["in_channels"], heads * head_dim
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            cross_attention_dim=dim,
            num_layers=layers,
            gated_attn=True,
            cross_attn_mod=True,
            audio_gated_attn=True,
            audio_cross_attn_mod=True,
            rope_type="split",
            use_prompt_embeddings=False,
        )
    model = drawn(model, device, dtype)
    audio_dim = model.config.audio_num_attention_heads * model.config.audio_attention_head_dim
    timestep = torch.full((1, n), 700.0, device=device)
    given = {
        "hidden_states": torch.randn(1, n, channels, device=device, dtype=dtype),
        "audio_hidden_states": torch.randn(1, 1, 128, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, s, dim, device=device, dtype=dtype),
        "audio_encoder_hidden_states": torch.randn(1, s, audio_dim, device=device, dtype=dtype),
        "timestep": timestep,
        "audio_timestep": timestep[:, :1],
        "sigma": timestep[:, 0],
        "num_frames": grid[0],
        "height": grid[1],
        "width": grid[2],
        "audio_num_frames": 1,
    }

    @torch.no_grad()
    def run() -> Any:
        return model(**given)

    flops, weights = dit_flops(config, n, 0, s), sum(p.nbytes for p in model.parameters())
    return Row("diffusers' transformer, text only, one audio token", flops, weights, run)


def table(ltx: dict[str, Any], size: tuple[int, int, int], options: argparse.Namespace, best: tuple) -> list[str]:
    """The Markdown of one size."""
    lines = [
        f"\n## {size[0]}x{size[1]}, {size[2]} frames\n",
        "| | ms | TFLOP | TFLOP/s | of the ceiling | floor, ms | peak GiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]

    def add(row: Row) -> None:
        floor = 1000 * max(row.flops / best[0], row.weights / best[1])
        start = f"| {row.name} |"
        try:
            long = "guided steps" in row.name  # the row before it has warmed up all that it calls
            got = measure(row.run, options.device, 1 if long else options.repeat, warm=long)
        except torch.OutOfMemoryError:
            lines.append(f"{start} out of memory | {row.flops / 1e12:,.2f} | | | {floor:,.1f} | |")
            return
        rate = row.flops / got.seconds
        peak = "" if got.peak is None else f"{got.peak / GIB:.1f}"
        lines.append(
            f"{start} {1000 * got.seconds:,.1f} | {row.flops / 1e12:,.2f} | {rate / 1e12:,.2f} | "
            f"{rate / best[0]:.0%} | {floor:,.1f} | {peak} |"
        )
        print(lines[-1], flush=True)

    try:
        for row in rows(ltx, size, options):
            add(row)
            del row  # it holds the model
    except torch.OutOfMemoryError:
        lines.append("| what is missing | out of memory | | | | | |")
    gc.collect()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    if options.against:
        add(diffusers_row(ltx, size, options))
    return lines


def device_name(device: torch.device) -> tuple[str, str]:
    """The device's name, and its driver where it has one."""
    if device.type != "cuda":
        return platform.processor() or platform.machine() or "cpu", "none"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0] or "unknown"
    return torch.cuda.get_device_name(device), driver


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(HERE / "configs" / "ltx-2.3.json"), help="sizes, as JSON")
    parser.add_argument("--ckpt", help="take the sizes of this checkpoint; its weights are not read")
    parser.add_argument("--size", action="append", help=f"HEIGHTxWIDTHxFRAMES, may be repeated ({', '.join(SIZES)})")
    parser.add_argument("--text-tokens", type=int, default=TEXT_TOKENS, help="length of the context")
    parser.add_argument("--steps", type=int, default=30, help="of a whole sample")
    parser.add_argument("--repeat", type=int, default=5, help="calls of which the median is taken")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--fp8", action="store_true", help="DiT weights in 8 bits; no training then")
    parser.add_argument("--offload", action="store_true", help="DiT blocks in host memory, streamed; no training then")
    parser.add_argument("--against", choices=["diffusers"], help="time its transformer too, if it is installed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--out", help="default bench/<device>.md")
    return parser.parse_args()


def resolve_sizes(texts: list[str], scale: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    sizes = []
    for text in texts:
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
        height, width, frames = map(int, match.groups()) if match else (0, 0, 0)
        if not (height and width and frames) or height % scale[1] or width % scale[2] or (frames - 1) % scale[0]:
            raise UserError(
                f"--size {text}: write HEIGHTxWIDTHxFRAMES, sides multiples of {scale[1]}, frames {scale[0]}k+1"
            )
        sizes.append((height, width, frames))
    return sizes


def main() -> None:
    options = parse_arguments()
    ltx = Checkpoint(options.ckpt).config if options.ckpt else json.loads(Path(options.config).read_text())
    sizes = resolve_sizes(options.size or list(SIZES), latent_scale(ltx["vae"]))
    options.device, options.dtype = resolve_device(options)
    if min(options.steps, options.repeat, options.text_tokens) < 1:
        raise UserError("--steps, --repeat and --text-tokens are 1 or more")
    if options.against:
        diffusers_row(ltx, (32, 32, 1), argparse.Namespace(**vars(options) | {"device": torch.device("meta")}))
    name, driver = device_name(options.device)
    how = " ".join(word for word in ("compile", "fp8", "offload") if getattr(options, word)) or "plain"
    best = ceilings(options.device, options.dtype, options.repeat)
    lines = [
        f"# {name}\n",
        f"{date.today()}, driver {driver}, PyTorch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, "
        f"{str(options.dtype).removeprefix('torch.')}, {how}; random weights of "
        f"{Path(options.ckpt or options.config).name}, {options.text_tokens:,} text tokens.\n",
        f"Measured ceilings: {best[0] / 1e12:,.2f} TFLOP/s (matrix product), {best[1] / 1e9:,.0f} GB/s (copy). "
        "Empty cells have not been measured.",
    ]
    for size in sizes:
        lines += table(ltx, size, options, best)
    out = Path(options.out or HERE / "bench" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print(f"wrote {out}")

"""Time and memory of a forward pass, a guided step, the VAE and a training step, beside the device's own limits.

    python -m bench                                     # sizes of the released model, random weights
    python -m bench --size 512x768x121 --compile        # one size (height x width x frames); blocks compiled
    python -m bench --against diffusers                 # its LTX-2 transformer of the same size, in the same run
    python -m bench --fp8 --compile --against bf16 --only "guided step,"    # one row in 8 bits and in bf16
    python -m bench --ckpt assets/tiny.safetensors --size 64x64x17      # sizes of any LTX-2.3 file
    python -m bench --publish                           # replace the page in bench/ that README shows

Writes out/bench/<device>-<how>.md. Two ceilings are measured in the same run: operations per second of a large matrix
product, bytes per second of a copy. A row's floor is the larger of its operations (engine/plan.py) over the first and
the bytes of its weights over the second. A row beyond the memory says so.
"""

import argparse
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

from checkpoint import open_checkpoint
from common.device import DTYPES, free, resolve_device
from common.errors import Parser, UserError, whole, write_text
from common.outputs import refuse_folders, refuse_overwrite
from engine.fp8 import E4M3, can_multiply, multiply_in_fp8, quantize, store_in_fp8
from engine.offload import offload
from engine.optim import AdamWBF16
from engine.parallel import set_recompute
from engine.plan import GIB, dit_flops, vae_flops
from guidance import sample_latents, sigma_schedule
from losses import flow_loss, predict_x0
from model import LTXVideo, append_reference, video_tokens
from objective import decode_window
from rope import RefPositions, reference_positions, video_positions
from text import MAX_TOKENS
from vae import CHUNK, VideoVAE, from_tokens, latent_scale

ROOT = Path(__file__).parent.parent
LTX = ROOT / "configs" / "ltx-2.3.json"
SIZES = ("480x832x121", "512x768x121", "704x1280x121")  # 720 is no multiple of 32
FPS = 24.0


class Row(NamedTuple):
    """One measurement: `run` does `flops` useful operations and reads `weights` bytes of weights."""

    name: str
    flops: float
    weights: int
    run: Callable[[], Any]


def measure(run: Callable[[], Any], device: torch.device, repeat: int, warm: bool = False) -> tuple[float, int | None]:
    """Median seconds of `repeat` calls, and the peak memory in bytes, None on a CPU. One call before them is not timed,
    unless everything is `warm` already."""
    cuda, times = device.type == "cuda", []
    if not warm:
        run()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeat):
        before = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - before)
    return statistics.median(times), torch.cuda.max_memory_allocated(device) if cuda else None


def ceilings(device: torch.device, dtype: torch.dtype, repeat: int) -> tuple[float, float]:
    """Operations per second of a matrix product, and bytes per second of a copy, reads and writes counted."""
    n, size = (8192, GIB) if device.type == "cuda" else (512, 2**26)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product, _ = measure(lambda: a @ b, device, 2 * repeat)
    x, y = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy, _ = measure(lambda: y.copy_(x), device, 2 * repeat)
    return 2 * n**3 / product, 2 * size / copy


def fp8_ceiling(device: torch.device, dtype: torch.dtype, repeat: int) -> float:
    """Operations per second of a product of 8-bit factors with a scale for each row."""
    n = 8192
    q, scale = quantize(torch.randn(n, n, device=device))
    rows, columns = q.view(E4M3), q.view(E4M3).t()
    kind = {"out_dtype": dtype, "use_fast_accum": True}
    product, _ = measure(lambda: torch._scaled_mm(rows, columns, scale, scale.t(), **kind), device, 2 * repeat)
    return 2 * n**3 / product


def draw_weights(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Give a module from the meta device small random weights on `device`."""
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.normal_(std=0.02)
    return module


def draw_dit(model: LTXVideo, options: argparse.Namespace) -> None:
    """The same for a DiT, one block at a time: with --fp8 or --offload the card never holds all blocks in bf16."""
    blocks, model.transformer_blocks = model.transformer_blocks, nn.ModuleList()
    draw_weights(model, options.device, options.dtype)
    for block in blocks:
        model.transformer_blocks = nn.ModuleList([draw_weights(block, options.device, options.dtype)])
        if options.fp8:
            store_in_fp8(model)
        if options.offload:
            block.cpu()
    model.transformer_blocks = blocks


def rows(ltx: dict[str, Any], size: tuple[int, int, int], options: argparse.Namespace) -> Iterator[Row]:
    """All measurements at one size (height, width, frames). Each part of the model is made when its rows begin."""
    (height, width, frames), dit, scale = size, ltx["transformer"], latent_scale(ltx["vae"])
    device, dtype, s, channels = options.device, options.dtype, options.text_tokens, dit["in_channels"]
    grid = latent_grid(size, scale)
    n, r = math.prod(grid), grid[1] * grid[2]
    text_only, with_reference = dit_flops(dit, n, 0, s), dit_flops(dit, n, r, s)
    with torch.device("meta"):
        model, vae = LTXVideo(dit), VideoVAE(ltx["vae"])

    draw_dit(model, options)
    if options.fp8 and can_multiply(device, dtype):
        multiply_in_fp8(model)
    weights = sum(p.nbytes for p in model.parameters())
    if options.offload:
        model = offload(model.cpu(), device)
        free(device)
    if options.compile:
        torch._dynamo.reset()  # graphs of the last size count towards the limit of one function
        model.compile_blocks()
    z, z_ref = (torch.randn(1, k, channels, device=device) for k in (n, r))  # (1, N, C), (1, R, C)
    context, null = (torch.randn(1, s, model.dim, device=device, dtype=dtype) for _ in range(2))
    positions, t = video_positions(*grid, FPS, scale)[None].to(device), torch.full((1,), 0.7, device=device)
    ref_positions = RefPositions(reference_positions(*grid, FPS, scale)[None].to(device))

    def forward(reference: bool) -> Tensor:
        x = z.to(dtype)
        tokens = append_reference(x, z_ref, t, positions, ref_positions) if reference else video_tokens(x, t, positions)
        return model(tokens.latents, tokens.timesteps, t, context, tokens.positions)  # (1, N or N + R, C)

    def guided(steps: int) -> Tensor:
        sigmas = sigma_schedule(steps, n)
        return sample_latents(model, z, sigmas, positions, context, null, z_ref, ref_positions, dtype=dtype)

    with torch.no_grad():
        yield Row("DiT forward, text only", text_only, weights, lambda: forward(False))
        yield Row("DiT forward, with reference", with_reference, weights, lambda: forward(True))
        step = 2 * text_only + with_reference
        yield Row("guided step, three streams", step, 2 * weights, lambda: guided(1))
        name, count = f"{options.steps} guided steps, without VAE", options.steps
        yield Row(name, count * step, count * 2 * weights, lambda: guided(count))

        vae = draw_weights(vae, device, dtype)
        video = torch.zeros(1, 3, frames, height, width, device=device, dtype=dtype)
        latents = torch.zeros(1, channels, *grid, device=device, dtype=dtype)
        encode, decode = vae_flops(ltx["vae"], grid[0], height, width, frames)
        encoder, decoder = (sum(p.nbytes for p in part.parameters()) for part in (vae.encoder, vae.decoder))
        yield Row("VAE encode, in pieces", encode, encoder, lambda: vae.encode(video, CHUNK))
        yield Row("VAE decode, in pieces", decode, decoder, lambda: vae.decode(latents, CHUNK))
        yield Row("VAE decode, at once", decode, decoder, lambda: vae.decode(latents))

    if options.fp8 or options.offload:
        return
    set_recompute(model.train().requires_grad_(True), "all")
    window, start = min(4, grid[0]), min(1, grid[0] - 1)  # two latent frames, and one on either side as context
    length = window - start - 1 if window > 2 else 1
    _, decode = vae_flops(ltx["vae"], window, height, width)

    def training(faces: bool) -> None:
        model.zero_grad(set_to_none=False)
        v = forward(True)[:, :n]
        loss = flow_loss(v, torch.zeros_like(z), z).sum()
        if faces:
            z_0 = from_tokens(predict_x0(z, v, t), grid).to(dtype)
            loss = loss + decode_window(vae, z_0, start, length).square().mean()
        loss.backward()

    step = 3 * with_reference
    yield Row("training, forward and backward", step, 2 * weights, lambda: training(False))
    name = "the same with the decoder of the identity losses"
    yield Row(name, step + 2 * decode, 2 * weights, lambda: training(True))
    if dtype == torch.bfloat16:
        optimizer = AdamWBF16(model.parameters(), lr=1e-6)
        yield Row("optimizer step, adamw-bf16", 0, 7 * weights, optimizer.step)  # 4 read, 3 written


def latent_grid(size: tuple[int, int, int], scale: tuple[int, int, int]) -> tuple[int, int, int]:
    """T, h, w of a video of (height, width, frames)."""
    return (size[2] - 1) // scale[0] + 1, size[0] // scale[1], size[1] // scale[2]


def diffusers_row(ltx: dict[str, Any], size: tuple[int, int, int], options: argparse.Namespace) -> Iterator[Row]:
    """diffusers' transformer, text only. It always runs its audio branch, here with a single audio token."""
    try:
        from diffusers import LTX2VideoTransformer3DModel
    except ImportError:
        raise UserError("--against diffusers needs diffusers: pip install diffusers") from None
    dit, grid, s = ltx["transformer"], latent_grid(size, latent_scale(ltx["vae"])), options.text_tokens
    n, channels, dim = math.prod(grid), dit["in_channels"], dit["num_attention_heads"] * dit["attention_head_dim"]
    sizes = {key: dit[key] for key in ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels")}
    sizes |= {"out_channels": channels, "cross_attention_dim": dim}
    gates = dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True)
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(**sizes, **gates, rope_type="split", use_prompt_embeddings=False)
    model = draw_weights(model, options.device, options.dtype)
    audio_dim = model.config.audio_num_attention_heads * model.config.audio_attention_head_dim
    shapes = {"hidden_states": (n, channels), "audio_hidden_states": (1, 128)}
    shapes |= {"encoder_hidden_states": (s, dim), "audio_encoder_hidden_states": (s, audio_dim)}
    tensors = {key: torch.randn(1, *shape, device=options.device, dtype=options.dtype) for key, shape in shapes.items()}
    timestep = torch.full((1, n), 700.0, device=options.device)
    tensors |= {"timestep": timestep, "audio_timestep": timestep[:, :1], "sigma": timestep[:, 0]}
    video = {"num_frames": grid[0], "height": grid[1], "width": grid[2], "audio_num_frames": 1}

    @torch.no_grad()
    def run() -> Any:
        return model(**tensors, **video)

    weights = sum(p.nbytes for p in model.parameters())
    yield Row("diffusers' transformer, text only, one audio token", dit_flops(dit, n, 0, s), weights, run)


def table(ltx: dict[str, Any], size: tuple[int, int, int], options: argparse.Namespace, limits: tuple) -> list[str]:
    """The lines of Markdown for one size. `limits` are the two ceilings."""
    head = "| | ms | TFLOP | TFLOP/s | of the ceiling | floor, ms | peak GiB |\n|---|---:|---:|---:|---:|---:|---:|"
    lines, measured = [f"\n## {size[0]}x{size[1]}, {size[2]} frames\n", head], {}

    def add(row: Row, where: str = "") -> None:
        flops, floor = row.flops / 1e12, 1000 * max(row.flops / limits[0], row.weights / limits[1])
        long = "guided steps" in row.name
        warm = long and f"{where}guided step, three streams" in measured  # the same functions
        try:
            seconds, peak = measure(row.run, options.device, 1 if long else options.repeat, warm)
            speed = f"{flops / seconds:,.2f} | {row.flops / seconds / limits[0]:.0%}"
            memory = f"{peak / GIB:.1f}" if peak else ""
            measured[where + row.name] = seconds
            numbers = f"{1000 * seconds:,.1f} | {flops:,.2f} | {speed} | {floor:,.1f} | {memory} |"
        except torch.OutOfMemoryError:
            numbers = f"out of memory | {flops:,.2f} | | | {floor:,.1f} | |"
        lines.append(f"| {where}{row.name} | {numbers}")
        print(lines[-1], flush=True)

    def add_all(rows: Iterator[Row], only: str = "", where: str = "") -> None:
        try:
            for row in rows:
                if only in row.name:
                    add(row, where)
                del row  # it keeps the model alive
        except torch.OutOfMemoryError:
            lines.append(f"| {where}the other rows | out of memory | | | | | |")
        free(options.device)

    add_all(rows(ltx, size, options), options.only)
    if options.against == "diffusers":
        add_all(diffusers_row(ltx, size, options))
    if options.against == "bf16":
        in_bf16 = argparse.Namespace(**vars(options) | {"fp8": False})
        add_all(rows(ltx, size, in_bf16), options.only, "bf16: ")
        for name in [name for name in measured if f"bf16: {name}" in measured]:
            ratio = measured[f"bf16: {name}"] / measured[name]
            lines.append(f"\n{name}: with --fp8 {ratio:.2f} times as fast as in bf16.")
            print(lines[-1].strip(), flush=True)
    return lines


def device_name(device: torch.device) -> tuple[str, str]:
    """Names of the device and of its driver."""
    if device.type != "cuda":
        return platform.processor() or platform.machine() or "cpu", "none"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return torch.cuda.get_device_name(device), driver or "unknown"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="sizes of this checkpoint (default: of LTX-2.3); its weights are not read")
    parser.add_argument("--size", action="append", help=f"HEIGHTxWIDTHxFRAMES, may be repeated ({', '.join(SIZES)})")
    parser.add_argument("--text-tokens", type=whole(), default=MAX_TOKENS, help="length of the context (%(default)s)")
    parser.add_argument("--steps", type=whole(), default=30, help="steps of a whole sample (%(default)s)")
    parser.add_argument("--repeat", type=whole(), default=5, help="timed calls; their median counts (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--fp8", action="store_true", help="DiT weights and products in 8 bits, without training")
    parser.add_argument("--offload", action="store_true", help="DiT blocks in host memory, without training")
    parser.add_argument(
        "--against", choices=["diffusers", "bf16"], help="time diffusers' transformer too, or the weights in bf16"
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="rows with these words in their name (all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bfloat16 on a GPU, float32 on a CPU")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", help="file to write (default: out/bench/<device>-<how>.md)")
    where.add_argument("--publish", action="store_true", help="write bench/<device>-<how>.md")
    return parser.parse_args()


def resolve_sizes(texts: list[str], scale: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """(height, width, frames) of each --size. One that does not fill whole latent cells raises UserError."""
    rule = f"write HEIGHTxWIDTHxFRAMES, sides multiples of {scale[1]}, frames {scale[0]}k+1"
    form = re.compile(r"(\d{1,9}x){2}\d{1,9}")
    sizes = [tuple(map(int, text.split("x"))) if form.fullmatch(text) else (0, 0, 0) for text in texts]
    for text, (height, width, frames) in zip(texts, sizes):
        if not (height and width and frames) or height % scale[1] or width % scale[2] or (frames - 1) % scale[0]:
            raise UserError(f"--size {text}: {rule}")
    return sizes


def main() -> None:
    options = parse_arguments()
    ltx = open_checkpoint(options.ckpt).config if options.ckpt else json.loads(LTX.read_text())
    sizes = resolve_sizes(options.size or list(SIZES), latent_scale(ltx["vae"]))
    options.device, options.dtype = resolve_device(options)
    if options.against == "bf16" and not options.fp8:
        raise UserError("--against bf16 needs --fp8")
    if options.against == "diffusers":  # a missing diffusers shows before anything is measured
        next(diffusers_row(ltx, (32, 32, 1), argparse.Namespace(**vars(options) | {"device": torch.device("meta")})))
    name, driver = device_name(options.device)
    how = [word for word in ("compile", "fp8", "offload") if getattr(options, word)] or ["plain"]
    page = re.sub(r"[^a-z0-9]+", "-", f"{name} {' '.join(how)}".lower()).strip("-") + ".md"
    out = Path(options.out or (ROOT if options.publish else Path("out")) / "bench" / page)
    refuse_overwrite([out], [options.ckpt])
    refuse_folders(out)
    out.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written shows here too
    how_often = options.device, options.dtype, options.repeat
    limits, product = ceilings(*how_often), "matrix product"
    if options.fp8 and can_multiply(options.device, options.dtype):
        product += f"; {fp8_ceiling(*how_often) / 1e12:,.2f} with 8-bit factors"
    versions = f"driver {driver}, PyTorch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    dtype, file = str(options.dtype).removeprefix("torch."), Path(options.ckpt or LTX).name
    lines = [
        f"# {name}\n\n{date.today()}, {versions}, {dtype}, {' '.join(how)}; random weights of {file}, "
        f"{options.text_tokens:,} text tokens.\n\nMeasured ceilings: {limits[0] / 1e12:,.2f} TFLOP/s ({product}), "
        f"{limits[1] / 1e9:,.0f} GB/s (copy). Empty cells have not been measured."
    ]
    print(lines[0])
    for size in sizes:
        lines += table(ltx, size, options, limits)
    write_text(out, "\n".join(lines) + "\n")
    print(f"wrote {out}")

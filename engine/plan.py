"""What a training run costs: operations, memory by part, days. Arithmetic on the config; nothing is loaded.

A DiT step at width D over N tokens (video and reference) with S text tokens costs, per block and sample,

        self-attention      8 N D^2 (q, k, v, out)              + 4 N^2 D   (scores, values)
        text attention      4 N D^2 (q, out) + 4 S D^2 (k, v)   + 4 N S D
        feed-forward       16 N D^2

multiply-adds counted as two. The backward pass costs twice the forward. Recomputing blocks costs a forward more, which
is spent but not useful, so MFU does not count it. Frozen weights (LoRA) need no gradient of their own: the products
with D^2 above then cost twice their forward in all, not three times.
"""

import math
from copy import copy
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from config import Config
from engine.lora import find_targets
from losses import aux_weight, shifted_logit_normal
from model import LTXVideo
from objective import windows_at_once
from text import TextConnector
from vae import VideoVAE, latent_scale

GIB = 2**30
# Dense bf16 TFLOP/s and GB by the makers' data sheets.
CARDS = {"H20-96": (148, 96), "H20-141": (148, 141), "A100-80": (312, 80), "H100-80": (989, 80),
         "H200-141": (989, 141), "L40S-48": (362, 48)}  # fmt: skip


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def dit_flops(ltx: dict[str, Any], video_tokens: int, reference_tokens: int, text_tokens: int) -> int:
    """Operations of one forward pass of the DiT for one sample; `ltx` is the checkpoint's transformer config."""
    n, s = video_tokens + reference_tokens, text_tokens
    d = ltx["num_attention_heads"] * ltx["attention_head_dim"]
    return weight_flops(ltx, n, s) + ltx["num_layers"] * (4 * n * n * d + 4 * n * s * d)


def weight_flops(ltx: dict[str, Any], tokens: int, text_tokens: int) -> int:
    """The part of `dit_flops` that is products with weights."""
    n, s = tokens, text_tokens
    d = ltx["num_attention_heads"] * ltx["attention_head_dim"]
    block = 28 * n * d * d + 4 * s * d * d + 4 * n * d * ltx["num_attention_heads"]
    return ltx["num_layers"] * block + 2 * n * d * (ltx["in_channels"] + ltx["out_channels"])


def connector_flops(ltx: dict[str, Any], text_tokens: int) -> int:
    """Operations of one forward pass of the text connector for one sample."""
    heads, s = ltx["connector_num_attention_heads"], text_tokens
    d = heads * ltx["connector_attention_head_dim"]
    return ltx["connector_num_layers"] * (24 * s * d * d + 4 * s * s * d + 2 * s * d * heads)


def vae_flops(ltx: dict[str, Any], frames: int, height: int, width: int, encoded: int = 1) -> tuple[int, int]:
    """Operations of encoding `encoded` frames of height x width, and of decoding `frames` latent frames of that."""
    scale = latent_scale(ltx)
    with torch.device("meta"), torch.no_grad():
        vae = VideoVAE(ltx)
        with FlopCounterMode(display=False) as encoding:
            vae.encode(torch.empty(1, 3, encoded, height, width))
        with FlopCounterMode(display=False) as decoding:
            vae.decode(torch.empty(1, ltx["latent_channels"], frames, height // scale[1], width // scale[2]))
    return encoding.get_total_flops(), decoding.get_total_flops()


class Plan:
    """Sizes, operations and memory of one run: `config` as train.py reads it, `ltx` the checkpoint's config."""

    def __init__(self, config: Config, ltx: dict[str, Any], size: tuple[int, int, int], text_tokens: int):
        frames, self.height, self.width = size
        scale = latent_scale(ltx["vae"])
        self.config, self.ltx, self.text_tokens = config, ltx, text_tokens
        self.grid = ((frames - 1) // scale[0] + 1, self.height // scale[1], self.width // scale[2])
        self.tokens = math.prod(self.grid)
        self.window = min(config.faces.window + 2 * config.faces.context, self.grid[0])  # latent frames decoded
        self.reference_tokens = self.grid[1] * self.grid[2] if config.reference.use else 0
        with torch.device("meta"):
            self.dit = LTXVideo(ltx["transformer"])
            self.connector = TextConnector(ltx["transformer"], 1).connector
            self.vae = VideoVAE(ltx["vae"])
        self.rank = config.lora.rank
        adapted = find_targets(self.dit, config.lora.targets).values() if self.rank else []
        self.trained = sum(self.rank * sum(weight.shape) for weight in adapted) or parameters(self.dit)
        self.buckets = [(self, 1.0)]  # the plan of each bucket of the cache, and its part of the samples

    def mean_flops(self) -> float:
        """`flops_per_sample`, averaged over the clips of all buckets."""
        return sum(plan.flops_per_sample() * part for plan, part in self.buckets)

    def flops_per_sample(self) -> float:
        """Useful operations of one training sample, all parts: what MFU is counted with."""
        transformer, keep = self.ltx["transformer"], 1 - self.config.dropout.reference
        with_reference = dit_flops(transformer, self.tokens, self.reference_tokens, self.text_tokens)
        without = dit_flops(transformer, self.tokens, 0, self.text_tokens)
        total = 3 * (keep * with_reference + (1 - keep) * without)
        if self.rank:
            tokens = self.tokens + keep * self.reference_tokens
            # No gradients of the frozen weights; the adapters' own operations, the text's k and v counted as the rest.
            total += 6 * self.trained * tokens - weight_flops(transformer, tokens, self.text_tokens)
        encode, decode = vae_flops(self.ltx["vae"], self.window, self.height, self.width)
        total += connector_flops(transformer, self.text_tokens) + keep * encode * (self.reference_tokens > 0)
        # The decoder's weights are frozen: forward, and the gradient of its input.
        return total + 2 * decode * self.decoded_share()

    def decoded_share(self) -> float:
        """Share of samples whose w_aux is high enough for the identity losses (Eq. 12)."""
        faces = self.config.faces
        if not faces.pack:
            return 0.0
        tokens = self.config.optim.noise_tokens or self.tokens
        t = shifted_logit_normal(100_000, tokens, torch.Generator().manual_seed(0))
        return (aux_weight(t, faces.gamma) >= faces.min_weight).float().mean().item()

    def memory(self, gpus: int) -> dict[str, float]:
        """Bytes per GPU by part, each at its largest moment of a step; not all are that large at once."""
        run = self.config.parallel
        if gpus < 1 or (run.mode == "fsdp" and gpus % run.replicas):
            raise UserError(f"parallel.replicas = {run.replicas} does not divide {gpus} GPUs")
        blocks, weights = self.dit.transformer_blocks, parameters(self.dit)
        block = parameters(blocks[0])
        rest = weights - block * len(blocks)
        low = 2 if run.precision == "bf16" else 4  # bytes of what is computed in
        n, s, d = self.tokens + self.reference_tokens, self.text_tokens, self.dit.dim

        parts = {"frozen: DiT": low * weights} if self.rank else {}
        if self.rank and self.config.lora.fp8:
            layers = [m.weight for m in blocks.modules() if isinstance(m, nn.Linear)]
            rows, largest = sum(len(weight) for weight in layers), max(weight.numel() for weight in layers)
            bytes_saved = (low - 1) * sum(weight.numel() for weight in layers) - 4 * rows
            parts = {"frozen: DiT, in fp8": low * weights - bytes_saved, "the weight in use": low * largest}
        in_bf16 = self.config.optim.kind == "adamw-bf16"
        size, name = (2, "bf16") if in_bf16 else (4, "fp32")
        trained = self.trained / (gpus // run.replicas if run.mode == "fsdp" else 1)  # numbers on one GPU
        parts[f"{'adapters' if self.rank else 'DiT weights'}, {name}"] = size * trained
        parts |= {f"gradients, {name}": size * trained, f"AdamW moments, {name}": 2 * size * trained}
        if self.config.optim.ema:
            parts["average of the weights, fp32"] = 4 * trained
        if run.mode == "fsdp":
            # The root's weights, and a block in use beside the one that is fetched; a block's gradient on its way out.
            parts["gathered weights and gradients"] = low * (rest + 2 * block) + (low + 4) * block
        elif low == 2 and not self.rank and not in_bf16:
            parts["bf16 copies of weights"] = 2 * weights
        # What autograd keeps of one block for its backward pass, counted (tests/test_plan.py) in rows of the model's
        # width. Autocast (bf16 under ddp) keeps all but the matrix products in float32, and their inputs twice.
        autocast = run.mode == "ddp" and low == 2 and not self.rank and not in_bf16
        row, wide = run.micro_batch * d, 4 if autocast else low
        inside = row * (2 * (62 * n + 8 * s) if autocast else low * (40 * n + 5 * s))
        if run.recompute:
            parts["activations, blocks recomputed"] = wide * row * n * len(blocks) + inside
        else:
            parts["activations"] = inside * len(blocks)
        # In the backward pass of a block, gradients of the feed-forward's width; counted as well.
        parts["gradients in flight, rotary tables"] = wide * row * 8 * n
        parts["frozen: connector, VAE"] = low * (parameters(self.connector) + parameters(self.vae))
        if self.config.faces.pack:
            parts["frozen: ArcFace, fp32"] = 4 * 65e6
            parts["decoder under the identity losses"] = low * self.decoder_activations()
        return parts

    def decoder_activations(self) -> float:
        """Numbers kept by the recomputed decoder: the outputs of its blocks, of a window per sample of the micro-batch,
        and the inside of the largest block, of all windows that are decoded together."""
        between, inside, decoder = 0, [0], self.vae.decoder

        def count(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            nonlocal between
            if module is decoder.conv_out.conv:
                between += 2 * inputs[0].numel()  # outside the blocks, hence not recomputed
            elif isinstance(module, nn.Conv3d):
                # A convolution of a residual block keeps its padded input; SiLU and PixelNorm before it keep theirs.
                inside[-1] += inputs[0].numel() + 2 * output.numel()
            else:  # the end of a block
                between += output.numel()
                inside.append(0)

        convolutions = [module for module in decoder.up_blocks.modules() if isinstance(module, nn.Conv3d)]
        counted = (*decoder.up_blocks, *convolutions, decoder.conv_out.conv)
        hooks = [module.register_forward_hook(count) for module in counted]
        with torch.device("meta"), torch.no_grad():
            self.vae.decode(torch.empty(1, self.ltx["vae"]["latent_channels"], self.window, *self.grid[1:]))
        for hook in hooks:
            hook.remove()
        samples = self.config.parallel.micro_batch
        together = min(samples, windows_at_once(self.vae.scale, self.grid, self.window))
        return samples * between + together * max(inside)

    def report(self, gpus: int, mfu: float) -> str:
        """The plan as Markdown: memory per GPU by part, which cards hold it, and days for the whole run."""
        optim, run, parts = self.config.optim, self.config.parallel, self.memory(gpus)
        ways = f"{run.mode}, {gpus} GPUs" + (f", {run.replicas} replicas" if run.replicas > 1 else "")
        adapters = f", adapters of rank {self.rank} with {self.trained / 1e6:,.1f} M" if self.rank else ""
        total = sum(parts.values())
        per_step = self.mean_flops() * optim.batch
        lines = [
            f"{self.width}x{self.height}, latent grid {'x'.join(map(str, self.grid))}: {self.tokens:,} video and "
            f"{self.reference_tokens:,} reference tokens, {self.text_tokens:,} text tokens",
            f"DiT {parameters(self.dit) / 1e9:.2f} B parameters{adapters}; {ways}; micro-batch {run.micro_batch}, "
            f"global batch {optim.batch}, {optim.steps:,} steps",
            "\n| per GPU | GiB |\n|---|---:|",
            *(f"| {name} | {size / GIB:.1f} |" for name, size in parts.items()),
            f"| **sum, without fragmentation** | **{total / GIB:.1f}** |\n",
            f"{per_step / optim.batch / 1e12:,.1f} TFLOP a sample, {per_step / 1e15:,.2f} PFLOP a step "
            f"(identity losses on {self.decoded_share():.0%} of samples)",
            f"\n| card | memory | at {mfu:.0%} MFU, {optim.steps:,} steps |\n|---|---|---:|",
        ]
        if len(self.buckets) > 1:
            lines.insert(1, f"the largest of {len(self.buckets)} buckets; operations and days are of the mean clip")
        holding = cards_that_hold(total)
        for name, (tflops, _) in CARDS.items():
            verdict = "fits" if name in holding else f"needs {total / GIB:.0f} GiB"
            seconds = per_step * optim.steps / (gpus * tflops * 1e12 * mfu)
            lines.append(f"| {gpus} x {name} | {verdict} | {seconds / 86400:,.1f} days |")
        return "\n".join(lines + self.ways(gpus))

    def ways(self, gpus: int) -> list[str]:
        """A table of the ways to hold the weights, gradients and moments of the whole model."""
        if self.rank:
            return []
        lines, other = ["\n| all weights, as | per GPU | cards that hold it |\n|---|---:|---|"], copy(self)
        for mode, kind in product(("ddp", "fsdp"), ("adamw", "adamw-bf16")):
            parallel = replace(self.config.parallel, mode=mode, precision="bf16")
            other.config = replace(self.config, optim=replace(self.config.optim, kind=kind), parallel=parallel)
            total = sum(other.memory(gpus).values())
            cards = ", ".join(cards_that_hold(total)) or "none"
            lines.append(f"| {mode}, {kind} | {total / GIB:.0f} GiB | {cards} |")
        return lines


def plan_of(config: Config, ltx: dict[str, Any], settings: dict[str, Any]) -> Plan:
    """The plan of a run on a cache: of its largest bucket, with the plans of all of them in `buckets`."""
    sizes, clips = settings.get("buckets", [settings]), settings.get("clips", {0: 1})
    plans = []
    for number, count in clips.items():
        size = tuple(sizes[number][key] for key in ("frames", "height", "width"))
        plans.append((Plan(config, ltx, size, settings["max_tokens"]), count / sum(clips.values())))
    largest, _ = max(plans, key=lambda part: part[0].tokens + part[0].reference_tokens)
    largest.buckets = plans
    return largest


def cards_that_hold(size: float) -> list[str]:
    """Cards with room for `size` bytes beside the driver's and the allocator's share."""
    return [card for card, (_, gigabytes) in CARDS.items() if size < 0.9 * gigabytes * 1e9]

"""What a training run costs: operations, memory by part, days. Arithmetic on the config; nothing is loaded.

A DiT step at width D over N tokens (video and reference) with S text tokens costs, per block and sample,

        self-attention      8 N D^2 (q, k, v, out)              + 4 N^2 D   (scores, values)
        text attention      4 N D^2 (q, out) + 4 S D^2 (k, v)   + 4 N S D
        feed-forward       16 N D^2

multiply-adds counted as two. The backward pass costs twice the forward. Recomputing all blocks costs one more
forward pass, all but their products a tenth of one. MFU counts useful operations only, so less recomputation gives a
higher MFU. Frozen weights (LoRA) need no gradient of their own: the products with D^2 above
then cost twice their forward in all, not three times.
"""

import math
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clips.cache import TYPICAL_IMAGE, TYPICAL_TOKENS, clip_bytes
from common.errors import UserError
from common.sizes import amount, duration
from config import LEVELS, Config
from engine.lora import find_targets
from losses import aux_weight, shifted_logit_normal
from model import LTXVideo
from objective import windows_at_once
from text import TextConnector
from vae import VideoVAE, latent_scale

GIB, MIB = 2**30, 2**20
RELEASED = 46e9  # bytes of ltx-2.3-22b-dev.safetensors, about
USABLE = 0.9  # of a card's memory, beside the driver's and the allocator's share
AGAIN = {"all": 1.0, "products": 0.1, "none": 0.0}  # part of the time of a forward pass that is spent again
# Dense bf16 TFLOP/s and GB by the makers' data sheets. A run takes the memory that its card has, some percent more.
CARDS = {"H20-96": (148, 96), "H20-141": (148, 141), "A100-80": (312, 80), "H100-80": (989, 80),
         "H200-141": (989, 141), "L40S-48": (362, 48)}  # fmt: skip


def whole_blocks(how: str | int, layers: int) -> int:
    """The number of blocks of which parallel.recompute = `how` computes everything again."""
    return min(layers, {"all": layers, "products": 0, "none": 0}.get(how, how))


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
        self.config, self.ltx, self.size, self.text_tokens = config, ltx, size, text_tokens
        self.grid = ((frames - 1) // scale[0] + 1, self.height // scale[1], self.width // scale[2])
        self.tokens = math.prod(self.grid)
        self.window = min(config.faces.window + 2 * config.faces.margin, self.grid[0])  # latent frames decoded
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

    @property
    def low(self) -> int:
        """Bytes of a number in products."""
        return 2 if self.config.parallel.precision == "bf16" else 4

    @property
    def autocast(self) -> bool:
        run = self.config.parallel
        return run.mode == "ddp" and self.low == 2 and not self.rank and self.config.optim.kind == "adamw"

    @property
    def wide(self) -> int:
        """Bytes of a number between products."""
        return 4 if self.autocast else self.low

    def flops_per_sample(self) -> float:
        """Useful operations of one training sample, all parts: what MFU is counted with."""
        transformer, keep = self.ltx["transformer"], 1 - self.config.dropout.reference
        total = 3 * self.forward_flops()
        if self.rank:
            tokens = self.tokens + keep * self.reference_tokens
            # No gradients of the frozen weights; the adapters' own operations, the text's k and v counted as the rest.
            total += 6 * self.trained * tokens - weight_flops(transformer, tokens, self.text_tokens)
        encode, decode = self.vae_flops
        total += connector_flops(transformer, self.text_tokens) + keep * encode * (self.reference_tokens > 0)
        # The decoder's weights are frozen: forward, and the gradient of its input.
        return total + 2 * decode * self.decoded_share()

    @cached_property
    def vae_flops(self) -> tuple[int, int]:
        """Operations of encoding a reference, and of decoding a window."""
        return vae_flops(self.ltx["vae"], self.window, self.height, self.width)

    def forward_flops(self) -> float:
        """Operations of the DiT's forward pass for a sample, of which some drop the reference."""
        with_reference, without = (
            dit_flops(self.ltx["transformer"], self.tokens, tokens, self.text_tokens)
            for tokens in (self.reference_tokens, 0)
        )
        keep = 1 - self.config.dropout.reference
        return keep * with_reference + (1 - keep) * without

    def decoded_share(self) -> float:
        """Share of samples whose w_aux is high enough for the identity losses (Eq. 12)."""
        faces = self.config.faces
        if not faces.pack:
            return 0.0
        tokens = self.config.optim.noise_tokens or self.tokens
        t = shifted_logit_normal(100_000, tokens, torch.Generator().manual_seed(0))
        return (aux_weight(t, faces.gamma) >= faces.min_weight).float().mean().item()

    def recompute(self, gpus: int, room: float) -> str | int:
        """parallel.recompute, or for "auto" the way that computes least again of those that need at most `room` bytes
        per GPU, "all" if none does."""
        if (how := self.config.parallel.recompute) != "auto":
            return how
        ways = ("none", "products", *range(1, len(self.dit.transformer_blocks)))
        rest = sum(self.memory(gpus, "all").values()) - self.activations("all")
        return next((how for how in ways if rest + self.activations(how) <= room), "all")

    def activations(self, how: str | int) -> float:
        """Bytes that autograd keeps of the blocks. A block keeps 40 vectors of the model's width per token and 5 per
        text token (counted in tests/engine/test_plan.py). 13 and 2 of them are outputs of products and attention.
        Autocast (bf16 under ddp) keeps all but the products in float32, and their inputs twice."""
        run, n, s = self.config.parallel, self.tokens + self.reference_tokens, self.text_tokens
        row, layers = run.micro_batch * self.dit.dim, len(self.dit.transformer_blocks)
        everything = row * (2 * (62 * n + 8 * s) if self.autocast else self.low * (40 * n + 5 * s))
        if how == "none":
            return everything * layers
        whole = whole_blocks(how, layers)
        products = row * self.low * (13 * n + 2 * s)
        # Everything of the block that the backward pass begins with, less what it kept.
        return row * self.wide * n * layers + products * max(0, layers - whole - 1) + everything

    def memory(self, gpus: int, how: str | int = "") -> dict[str, float]:
        """Bytes per GPU by part, each at its largest moment of a step; not all are that large at once. `how`: another
        parallel.recompute."""
        run = self.config.parallel
        if gpus < 1 or (run.mode == "fsdp" and gpus % run.replicas):
            raise UserError(f"parallel.replicas = {run.replicas} does not divide {gpus} GPUs")
        blocks, weights = self.dit.transformer_blocks, parameters(self.dit)
        block = parameters(blocks[0])
        rest = weights - block * len(blocks)
        low, how = self.low, how or ("all" if run.recompute == "auto" else run.recompute)

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
        elif self.autocast:
            parts["bf16 copies of weights"] = 2 * weights
        kept = {"all": "blocks recomputed", "products": "products kept", "none": "all kept"}
        parts[f"activations, {kept.get(how, f'{how} blocks recomputed')}"] = self.activations(how)
        # In the backward pass of a block, gradients of the feed-forward's width; counted as well.
        tokens = run.micro_batch * (self.tokens + self.reference_tokens)
        parts["gradients in flight, rotary tables"] = self.wide * tokens * 8 * self.dit.dim
        parts["frozen: connector, VAE"] = low * (parameters(self.connector) + parameters(self.vae))
        if self.config.faces.pack:
            parts["frozen: ArcFace, fp32"] = 4 * 65e6
            parts["decoder under the identity losses"] = low * self.decoder_activations()
        return parts

    def decoder_activations(self) -> float:
        """Numbers kept by the recomputed decoder: the outputs of its blocks, of a window per sample of the micro-batch,
        and the inside of the largest block, of all windows that are decoded together."""
        samples, (between, inside) = self.config.parallel.micro_batch, self.window_activations
        return samples * between + min(samples, windows_at_once(self.vae.scale, self.grid, self.window)) * inside

    @cached_property
    def window_activations(self) -> tuple[int, int]:
        """Numbers that the decoder keeps of one window between its blocks, and inside the largest block."""
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
        return between, max(inside)

    def disk(self, file_size: float) -> str:
        """A line about bytes on disk; a full fine-tune is exported as a file of `file_size`, that of its base."""
        optim, log = self.config.optim, self.config.log
        shape = [self.ltx["vae"]["latent_channels"], *self.grid]
        tokens, image = min(TYPICAL_TOKENS, self.text_tokens), min(TYPICAL_IMAGE, 2 * self.height * self.width)
        clip = clip_bytes(shape, self.connector.dim, tokens, image)
        # Weights, two moments and the average. One checkpoint more is there while it is written, and the best.
        checkpoint = self.trained * (2 if optim.kind == "adamw-bf16" else 4) * (3 + bool(optim.ema))
        count = log.keep + 1 + bool(self.config.data.holdout)
        return (
            f"on disk: cache about {amount(1000 * clip)} per 1,000 clips; {count} checkpoints of {amount(checkpoint)}, "
            f"{amount(count * checkpoint)} in all; export {amount(2 * self.trained if self.rank else file_size)}"
        )

    def held_out_share(self, per_sample: float) -> float:
        """Operations on held-out clips over those of the training, which takes `per_sample`."""
        data, optim, transformer = self.config.data, self.config.optim, self.ltx["transformer"]
        forward = dit_flops(transformer, self.tokens, 0, self.text_tokens)
        if self.reference_tokens:
            forward += dit_flops(transformer, self.tokens, self.reference_tokens, self.text_tokens)
        decode = self.vae_flops[1] * bool(self.config.faces.pack)
        evaluations = 1 + math.ceil(optim.steps / self.config.log.eval_every)
        passes = evaluations * data.holdout * len(LEVELS)
        return passes * (forward + decode) / (optim.steps * optim.batch * per_sample)

    def report(self, gpus: int, mfu: float, file_size: float = RELEASED) -> str:
        """The plan as Markdown: memory per GPU by part, which cards hold it, bytes on disk, days for the whole run."""
        optim, run, parts = self.config.optim, self.config.parallel, self.memory(gpus)
        ways = f"{run.mode}, {gpus} GPUs" + (f", {run.replicas} replicas" if run.replicas > 1 else "")
        adapters = f", adapters of rank {self.rank} with {self.trained / 1e6:,.1f} M" if self.rank else ""
        total = sum(parts.values())
        unit, size_of = ("GiB", GIB) if total >= GIB else ("MiB", MIB)
        per_step, weights = self.mean_flops() * optim.batch, parameters(self.dit)
        looks = ""
        if self.config.data.holdout:
            looks = f"; the held-out clips add {self.held_out_share(per_step / optim.batch):.1%}"
        weights = f"{weights / 1e9:.2f} B" if weights >= 1e9 else f"{weights / 1e6:.2f} M"
        lines = [
            f"{self.width}x{self.height}, latent grid {'x'.join(map(str, self.grid))}: {self.tokens:,} video and "
            f"{self.reference_tokens:,} reference tokens, {self.text_tokens:,} text tokens",
            f"DiT {weights} parameters{adapters}; {ways}; micro-batch {run.micro_batch}, "
            f"global batch {optim.batch}, {optim.steps:,} steps",
            f"\n| per GPU | {unit} |\n|---|---:|",
            *(f"| {name} | {size / size_of:.1f} |" for name, size in parts.items()),
            f"| **sum, without fragmentation** | **{total / size_of:.1f}** |\n",
            f"{operations(per_step / optim.batch)} a sample, {operations(per_step)} a step "
            f"(identity losses on {self.decoded_share():.0%} of samples){looks}",
            self.disk(file_size),
            f"\n| card | memory | {optim.steps:,} steps | recompute | MFU |\n|---|---|---:|---|---:|",
        ]
        if len(self.buckets) > 1:
            lines.insert(1, f"the largest of {len(self.buckets)} buckets; operations and days are of the mean clip")
        for name, (tflops, gigabytes) in CARDS.items():
            how = self.recompute(gpus, room := USABLE * gigabytes * 1e9)
            needed = sum(self.memory(gpus, how).values())
            verdict = "" if needed <= room else "needs "
            verdict += f"{needed / GIB:.0f} GiB" if needed >= GIB else amount(needed)
            reached = self.mfu(mfu, how)
            seconds = per_step * optim.steps / (gpus * tflops * 1e12 * reached)
            days = f"{seconds / 86400:,.1f} days" if seconds > 8640 else duration(seconds)
            lines.append(f"| {gpus} x {name} | {verdict} | {days} | {how} | {reached:.0%} |")
        return "\n".join(lines + self.ways(gpus))

    def mfu(self, mfu: float, how: str | int) -> float:
        """The MFU where `how` blocks are recomputed and `mfu` is reached with all of them: the same time for an
        operation, fewer operations."""
        useful, forward, layers = self.flops_per_sample(), self.forward_flops(), len(self.dit.transformer_blocks)
        again = AGAIN[how] if how in AGAIN else AGAIN["products"] + (1 - AGAIN["products"]) * min(1, how / layers)
        return mfu * (useful + forward) / (useful + again * forward)

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
            lines.append(f"| {mode}, {kind} | {amount(total)} | {cards} |")
        return lines


def operations(number: float) -> str:
    """A number of operations in the largest unit that leaves a number above 1."""
    power = min(int(math.log10(max(1, number))) // 3, 6)
    return f"{number / 1000**power:,.4g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}FLOP"


def plan_of(config: Config, ltx: dict[str, Any], settings: dict[str, Any]) -> Plan:
    """The plan of a run on a cache: of its largest bucket, with the plans of all of them in `buckets`."""
    sizes, clips = settings.get("buckets") or [settings], settings.get("clips", {0: 1})
    plans = []
    for number, count in clips.items():
        size = tuple(sizes[number][key] for key in ("frames", "height", "width"))
        plans.append((Plan(config, ltx, size, settings["max_tokens"]), count / sum(clips.values())))
    largest, _ = max(plans, key=lambda part: part[0].tokens + part[0].reference_tokens)
    largest.buckets = plans
    return largest


def cards_that_hold(size: float) -> list[str]:
    """Cards with room for `size` bytes."""
    return [card for card, (_, gigabytes) in CARDS.items() if size < USABLE * gigabytes * 1e9]

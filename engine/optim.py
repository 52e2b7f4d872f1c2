"""The optimizer of a run: AdamW in float32, or with weights and moments in bf16, 8 bytes a parameter with the gradient,
where float32 takes 16.

        weights, gradient, two moments                13.1 B parameters
        float32     4 + 4 + 4 + 4 bytes               210 GB: shards only (FSDP2)
        bf16        2 + 2 + 2 + 2                     105 GB: whole on one card of 141 GB

bf16 has 8 significant bits, so rounding to nearest would always lose an update of 1e-5 of a weight. Stochastic rounding
keeps it on average: a number between two bf16 neighbours becomes the upper one the more often the nearer it is, and the
mean equals the float32 number. The moments, whose decay of 1 - 0.999 a step is below half a bf16 digit, need it too.

A step reads and writes 14 bytes a parameter. On a GPU it is compiled into one kernel that does no more than that, so
the bits for the rounding are a hash of the number's place rather than drawn into memory. Nothing in a step waits for
the GPU, so its kernels are queued while the backward pass runs.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.device import upload
from config import Config
from engine.average import local_parts

PIECE = 2**24  # numbers of a weight that are in float32 at a time, where the step is not one kernel
MOMENTS = ("exp_avg", "exp_avg_sq")
MIX_1, MIX_2 = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32  # MurmurHash3's, as int32


def hash_bits(x: Tensor) -> Tensor:
    """32 bits that look random for each int32: MurmurHash3's last mixing, a bijection. `>>` alone would copy signs."""
    x = (x ^ (x >> 16 & 0xFFFF)) * MIX_1
    x = (x ^ (x >> 13 & 0x7FFFF)) * MIX_2
    return x ^ (x >> 16 & 0xFFFF)


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bf16 with mean x: the 16 bits that are cut off carry into the rest as often as they are large. Of each
    int32 in `bits` the lower 16 are used."""
    rounded = ((x.view(torch.int32) + (bits & 0xFFFF)) & -(2**16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()  # the carry would make another number of NaN


def adamw(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, seed: Tensor, factors: Tensor, betas: tuple[float, float], eps: float
) -> None:
    """One step of AdamW for flat pieces of a weight, its gradient and its moments, in place. `seed` () is an int32, a
    new one for each piece and step. `factors` (3,) are 1 - lr decay, lr / (1 - beta_1^step), 1 / (1 - beta_2^step),
    in a tensor, because other numbers would compile the function again."""
    if w.numel() % 16 == 0:  # tells the compiler that it may load 16 bytes at a time
        w, g, m, v = (t.view(-1, 16) for t in (w, g, m, v))
    bits = hash_bits(torch.arange(w.numel(), dtype=torch.int32, device=w.device).view_as(w) + seed)
    keep, rate, correction = factors.unbind()
    g = g.float()
    m_new = betas[0] * m.float() + (1 - betas[0]) * g
    v_new = betas[1] * v.float() + (1 - betas[1]) * g * g
    w_new = w.float() * keep - rate * m_new / ((v_new * correction).sqrt() + eps)
    w.copy_(round_stochastically(w_new, bits))
    m.copy_(round_stochastically(m_new, bits >> 16))
    v.copy_(round_stochastically(v_new, hash_bits(bits)))


def first_number(weight: Tensor) -> int:
    """The place, in the whole weight, of the first number of this rank's shard: a number's bits then follow from its
    place in the weight, on any number of ranks."""
    if not isinstance(weight, DTensor):
        return 0
    # FSDP2 cuts along the first side, among the ranks of the mesh's last dimension.
    mesh, rows = weight.device_mesh, weight.shape[0]
    return mesh.get_coordinate()[-1] * math.ceil(rows / mesh.shape[-1]) * (weight.numel() // rows)


class AdamWBF16(torch.optim.Optimizer):
    """torch.optim.AdamW's formula in float32, between bf16 weights and moments. Shards of FSDP2 are taken as they are.
    The bits follow from `seed` and the step, so that the replicas of DDP stay alike and a continued run is the same.
    `compiled`: one kernel for each weight; None: on GPUs alone, where it helps. `options` are AdamW's."""

    def __init__(self, params: Iterable[Tensor], seed: int = 0, compiled: bool | None = None, **options: Any):
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-8} | options)
        self.seed = seed
        on_gpu = self.param_groups[0]["params"][0].device.type == "cuda"
        self.compiled = on_gpu if compiled is None else compiled
        self.update = torch.compile(adamw, dynamic=True) if self.compiled else adamw

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for number, group in enumerate(self.param_groups):
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                state = self.state[weight]
                if not state:
                    state |= {"step": torch.zeros(()), **{key: torch.zeros_like(weight) for key in MOMENTS}}
                state["step"] += 1
                step, device = int(state["step"].item()), weight.device  # the same for all
            if not weights:
                continue
            (beta_1, beta_2), lr = group["betas"], group["lr"]
            factors = [1 - lr * group["weight_decay"], lr / (1 - beta_1**step), 1 / (1 - beta_2**step)]
            factors = upload(torch.tensor(factors), device)
            seeds = np.random.SeedSequence([self.seed, step, number]).generate_state(len(weights))
            seeds = (seeds + np.array([first_number(weight) for weight in weights])).astype(np.uint32).astype(np.int32)
            for weight, seed in zip(weights, upload(torch.from_numpy(seeds), device).unbind()):
                whole = (weight, weight.grad, *(self.state[weight][key] for key in MOMENTS))
                flat = [part.view(-1) for part in local_parts(whole)]
                size = len(flat[0]) if self.compiled else PIECE
                for k, pieces in enumerate(zip(*(t.split(max(1, size)) for t in flat))):
                    self.update(*pieces, seed + k * size if k else seed, factors, group["betas"], group["eps"])


def build_optimizer(config: Config, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the trained parameters, in float32 or in bf16 with stochastic rounding."""
    optim = config.optim
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shared = {"lr": optim.lr, "betas": optim.betas, "weight_decay": optim.weight_decay}
    if optim.kind == "adamw-bf16":
        return AdamWBF16(parameters, **shared, seed=config.run.seed)
    return torch.optim.AdamW(parameters, **shared, fused=device.type == "cuda")


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step `step`, counted from 0: a linear rise, then constant or a linear fall."""
    optim = config.optim
    fall = (optim.steps - step) / max(1, optim.steps - optim.warmup) if optim.decay == "linear" else 1.0
    return optim.lr * min(1.0, (step + 1) / max(1, optim.warmup), fall)

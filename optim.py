"""AdamW whose weights and moments are bf16: 8 bytes a parameter with the gradient, where float32 takes 16.

        weights, gradient, two moments                13.1 B parameters
        float32     4 + 4 + 4 + 4 bytes               210 GB: shards only (FSDP2)
        bf16        2 + 2 + 2 + 2                     105 GB: whole on one card of 141 GB

bf16 has 8 significant bits, and an update of 1e-5 of a weight would be rounded away, always. Stochastic rounding
keeps it on average: a number between two bf16 neighbours becomes the upper one as often as it is near it, so the mean
of what is stored is what float32 would have stored. The same holds for the moments, whose decay of 1 - 0.999 a step is
below half a bf16 digit too.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

PIECE = 2**24  # numbers of a weight that are in float32 at a time


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bf16 with mean x: the 16 bits that are cut off carry into the rest as often as they are large."""
    noise = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()


class AdamWBF16(torch.optim.Optimizer):
    """torch.optim.AdamW's formula in float32, between bf16 weights and moments. Shards of FSDP2 are taken as they are.

    The draws follow from `seed` and the step, so that the replicas of DDP stay alike and a continued run is the same.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        eps: float = 1e-8,
        seed: int = 0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            for k, weight in enumerate(group["params"]):
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                state["step"] += 1
                step = int(state["step"].item())
                draw = np.random.SeedSequence([self.seed, step, k]).generate_state(1, np.uint64)[0]
                generator = torch.Generator(weight.device).manual_seed(int(draw) >> 1)
                whole = (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])
                local = (t.to_local() if isinstance(t, DTensor) else t for t in whole)
                for pieces in zip(*(t.view(-1).split(PIECE) for t in local)):
                    adamw(*pieces, step, group, generator)


def adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, group: dict, generator: torch.Generator) -> None:
    """One step for flat pieces of a weight, its gradient and moments, in place."""
    (beta_1, beta_2), lr, decay, eps = group["betas"], group["lr"], group["weight_decay"], group["eps"]
    g = g.float()
    m_new = m.float().lerp_(g, 1 - beta_1)
    v_new = v.float().mul_(beta_2).addcmul_(g, g, value=1 - beta_2)
    m.copy_(round_stochastically(m_new, generator))
    v.copy_(round_stochastically(v_new, generator))
    scale = v_new.div_(1 - beta_2**step).sqrt_().add_(eps)
    w_new = w.float().mul_(1 - lr * decay).addcdiv_(m_new, scale, value=-lr / (1 - beta_1**step))
    w.copy_(round_stochastically(w_new, generator))

"""The video DiT of LTX-2.3: 48 blocks of self-attention, text attention and feed-forward over latent tokens.

It predicts the velocity v = eps - z_0 of z_t = (1 - t) z_0 + t eps. Every token carries its own timestep, which is
how a clean reference image (t = 0) sits in the same sequence as noisy video tokens (Sec. 3.1, Eq. 2):

        tokens   [ video: T*H*W at t = sigma | reference: H*W at t = 0 ]      places from rope.py
                       |
          x -> rms, AdaLN(t) -> self-attention + rotary -> gate -> +
            -> rms, AdaLN(t) -> text attention             -> gate -> +      context modulated by sigma
            -> rms, AdaLN(t) -> feed-forward               -> gate -> +
                       |  x 48
          LayerNorm, AdaLN(t), linear -> velocity; the reference's part is dropped

The released checkpoint also holds an audio branch. Without audio input the full model computes exactly this.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from checkpoint import Checkpoint, open_checkpoint
from rope import apply_rope, rope_cos_sin


@dataclass(frozen=True)
class Reference:
    """How the reference image is given to the model. The defaults are the paper's, and LTX's own where it is silent."""

    placement: str = "tass"  # Eq. 4, or one of rope.PLACEMENTS that Sec. 3.2 argues against
    source_id: int = 2  # of placement "phase", and its scale
    phase_scale: float = 1.0
    fit: str = "letterbox"  # Sec. 3.1; "cover": scaled to cover the video's shape and cut around the centre
    timestep: str = "clean"  # the reference tokens carry t = 0; "shared": they carry the video's t


def rms(x: Tensor) -> Tensor:
    """Divide each token (..., D) by its root mean square; no weight."""
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: x (1 + scale) + shift."""
    return x * (1 + scale) + shift


class RMSNorm(nn.RMSNorm):
    """RMS norm whose weight follows its input: under autocast a float32 weight would rule out the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention with RMS-normed q and k, and a gate per head, 2 sigmoid(.), on what each head returns."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.q_norm = RMSNorm(dim, eps=1e-6)  # over all heads together
        self.k_norm = RMSNorm(dim, eps=1e-6)
        self.to_gate_logits = nn.Linear(dim, heads)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, D) asks, context (B, S, D) answers (x itself if None).

        `rotary` turns both q and k; `mask` (B, S) is false where nobody may look, None if all may.
        """
        context = x if context is None else context
        q, k = self.q_norm(self.to_q(x)), self.k_norm(self.to_k(context))
        v = self.to_v(context)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, N|S, head_dim)
        if rotary is not None:
            q, k = apply_rope(q, *rotary), apply_rope(k, *rotary)
        mask = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, S)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, N, head_dim)
        gate = 2 * torch.sigmoid(self.to_gate_logits(x))  # (B, N, heads)
        out = out * gate.transpose(1, 2).unsqueeze(-1)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, N, D)


class GELU(nn.Module):
    """Linear and GELU (tanh form), the first half of a feed-forward."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GELU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TimestepEmbedder(nn.Module):
    """A scalar as 256 cosines and sines, then two linear layers."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(256, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t (U,) in [0, 1] -> (U, D). The sinusoid is made in float32: bf16 could not tell 999 from 1000."""
        frequencies = torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))
        angles = 1000 * t.float()[:, None] * frequencies  # (U, 128)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


class AdaLN(nn.Module):
    """Timestep to modulation: `rows` vectors of width D, to which every block adds a table of its own."""

    def __init__(self, dim: int, rows: int):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(dim)})
        self.linear = nn.Linear(dim, rows * dim)
        self.rows = rows

    def forward(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """t (U,) -> modulation (U, rows, D) and the embedding (U, D) it came from."""
        embedded = self.emb["timestep_embedder"](t, dtype)
        return self.linear(F.silu(embedded)).unflatten(-1, (self.rows, -1)), embedded


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(9, dim))
        self.prompt_scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.attn1 = Attention(dim, heads)
        self.attn2 = Attention(dim, heads)
        self.ff = FeedForward(dim)
        self.recompute = False  # in training: keep only the block's input and run it again in the backward pass

    def forward(self, *inputs: Tensor | tuple[Tensor, Tensor] | None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return recompute(self.run, *inputs, use_reentrant=False)
        return self.run(*inputs)

    def run(
        self,
        x: Tensor,
        context: Tensor,
        modulation: Tensor,
        prompt_modulation: Tensor,
        token_row: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """x (B, N, D), context (B, S, D); modulation (U, 9, D) by distinct timestep, token_row (B, N) says whose."""
        rows = (self.scale_shift_table + modulation).unbind(1)  # 9 x (U, D)
        # `embedding` is a gather whose backward sums many tokens per row without a serial scatter.
        shift_sa, scale_sa, gate_sa = (F.embedding(token_row, row) for row in rows[0:3])  # (B, N, D)
        x = x + gate_sa * self.attn1(modulate(rms(x), shift_sa, scale_sa), rotary=rotary, mask=mask)

        shift_ca, scale_ca, gate_ca = (F.embedding(token_row, row) for row in rows[6:9])
        shift_kv, scale_kv = (self.prompt_scale_shift_table + prompt_modulation).unsqueeze(2).unbind(1)  # (B, 1, D)
        context = modulate(context, shift_kv, scale_kv)
        x = x + gate_ca * self.attn2(modulate(rms(x), shift_ca, scale_ca), context)

        shift_ff, scale_ff, gate_ff = (F.embedding(token_row, row) for row in rows[3:6])
        return x + gate_ff * self.ff(modulate(rms(x), shift_ff, scale_ff))


def first_weight(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A weight of an LTXVideo to train from nothing, the same wherever and in whatever order it is drawn.

    Linear layers are drawn by Glorot's rule, norms are 1. Zero are the biases, the tables, and the layers behind the
    modulation, the head gates and the output: so each block begins as the identity, and the velocity as 0.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    ends_zero = ("bias", "table", "to_gate_logits.weight", "single.linear.weight")
    if name.endswith(ends_zero) or name == "proj_out.weight":
        return torch.zeros(shape)
    state = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0]
    generator = torch.Generator("cpu").manual_seed(int(state))  # of a seed it takes the lower 32 bits only
    return torch.randn(shape, generator=generator) * (2 / sum(shape)) ** 0.5


class Constants(NamedTuple):
    """What follows from the tokens' places and from which of them share a timestep: the same in all steps."""

    rotary: tuple[Tensor, Tensor]  # tables in the dtype of the latents
    token_row: Tensor  # (B, N) which of the distinct timesteps a token has
    examples: Tensor  # (U,) one token of each, as an index into the flattened timesteps


class LTXVideo(nn.Module):
    """The DiT. All sizes come from the checkpoint's config."""

    PREFIXES = {"": "model.diffusion_model."}

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.heads = config["num_attention_heads"]
        self.dim = self.heads * config["attention_head_dim"]
        self.theta = config["positional_embedding_theta"]
        self.max_pos = config["positional_embedding_max_pos"]
        self.patchify_proj = nn.Linear(config["in_channels"], self.dim)
        self.adaln_single = AdaLN(self.dim, rows=9)
        self.prompt_adaln_single = AdaLN(self.dim, rows=2)
        self.transformer_blocks = nn.ModuleList([Block(self.dim, self.heads) for _ in range(config["num_layers"])])
        self.scale_shift_table = nn.Parameter(torch.zeros(2, self.dim))
        self.proj_out = nn.Linear(self.dim, config["out_channels"])

    @classmethod
    def from_checkpoint(
        cls, path: str | Path | Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "LTXVideo":
        checkpoint = open_checkpoint(path)
        with torch.device("meta"):
            model = cls(checkpoint.config["transformer"])
        return checkpoint.load(model, cls.PREFIXES, device, dtype)

    def rotary(self, positions: Tensor, phase: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotary tables (B, heads, N, head_dim/2) for positions (B, 3, N, 2) in seconds and pixels."""
        return rope_cos_sin(positions, self.dim, self.heads, self.theta, self.max_pos, phase)

    def constants(
        self, timesteps: Tensor, positions: Tensor, phase: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Constants:
        """What `forward` makes of these arguments, to be made once; `dtype` is that of the latents."""
        rotary = tuple(table.to(dtype) for table in self.rotary(positions, phase))
        # A sequence has few distinct timesteps (the video's and 0), so AdaLN runs on those and tokens look theirs up.
        distinct, token_row = torch.unique(timesteps, return_inverse=True)  # (U,), (B, N)
        everyone = torch.arange(timesteps.numel(), device=timesteps.device)
        examples = torch.empty_like(distinct, dtype=torch.long).scatter_(0, token_row.flatten(), everyone)
        return Constants(rotary, token_row, examples)

    def compile_blocks(self, backend: str | Callable = "inductor") -> "LTXVideo":
        """torch.compile of one block, whose code all blocks run: one graph per shape of a stream, none per step.

        Under DDP too: left to itself, PyTorch would cut the graph where a bucket of gradients is full, and a block's
        gradients are on their way as soon as its backward pass is done anyhow.
        """
        torch._dynamo.config.optimize_ddp = False
        for block in self.transformer_blocks.children():
            block.run = torch.compile(block.run, dynamic=False, backend=backend)
        return self

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        sigma: Tensor,
        context: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        phase: Tensor | None = None,
        constants: Constants | None = None,
    ) -> Tensor:
        """Velocity v = eps - z_0 of every token.

        latents    (B, N, C)     noisy video tokens, then the reference's
        timesteps  (B, N)        noise level of each token in [0, 1]; 0 marks a clean one
        sigma      (B,)          noise level of the video, which modulates the text
        context    (B, S, D)     from text.py
        positions  (B, 3, N, 2)  from rope.py
        mask       (B, N)        false for tokens that this sample does not have (a dropped reference); None if it
                                 has all, which lets attention use its fastest kernel
        phase      (B, N)        what a token's rotary angles get beside its place (placement "phase"), None for nothing
        constants                of `self.constants`, which are then not made again; positions and phase are in them
        returns    (B, N, C)     the reference's rows mean nothing
        """
        dtype = latents.dtype
        rotary, token_row, examples = constants or self.constants(timesteps, positions, phase, dtype)
        modulation, embedded = self.adaln_single(timesteps.flatten()[examples], dtype)
        prompt_modulation, _ = self.prompt_adaln_single(sigma, dtype)  # (B, 2, D)

        x = self.patchify_proj(latents)
        for block in self.transformer_blocks:
            x = block(x, context, modulation, prompt_modulation, token_row, rotary, mask)

        shift, scale = (self.scale_shift_table + embedded.unsqueeze(1)).unbind(1)  # (U, D)
        x = F.layer_norm(x, (self.dim,), eps=1e-6)
        x = modulate(x, F.embedding(token_row, shift), F.embedding(token_row, scale))
        return self.proj_out(x)

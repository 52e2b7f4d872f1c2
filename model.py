"""The video DiT of LTX-2.3: 48 blocks of self-attention, text attention and feed-forward over latent tokens.

It predicts the velocity v = eps - z_0 of z_t = (1 - t) z_0 + t eps. Every token carries its own timestep. So a clean
reference image (t = 0) can sit in the same sequence as noisy video tokens (Sec. 3.1, Eq. 2):

        tokens   [ video: N at t | reference: R at t = 0 ]       positions from rope.py
                       |
          x -> rms, AdaLN(t) -> self-attention + rotary -> gate -> +
            -> rms, AdaLN(t) -> text attention          -> gate -> +      context modulated by sigma
            -> rms, AdaLN(t) -> feed-forward            -> gate -> +
                       |  x 48
          LayerNorm, AdaLN(t), linear -> velocity; the rows of the reference are dropped

The released checkpoint also has an audio branch. Without audio input the full model computes exactly this.

Letters, the same in every file:
        B batch            F H W pixel frames, height, width       T h w latent grid (frames, rows, columns)
        C latent channels  N = T h w video tokens                  R = h w reference tokens
        D model width      S text tokens                           U distinct timesteps in a batch
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from checkpoint import Checkpoint, open_checkpoint
from rope import Place, Reference, apply_rope, rope_cos_sin  # noqa: F401


class Tokens(NamedTuple):
    """One sequence for the DiT: the first N tokens are the video's, the rest the reference's."""

    latents: Tensor  # (B, N [+ R], C)
    timesteps: Tensor  # (B, N [+ R]) noise level of each token
    positions: Tensor  # (B, 3, N [+ R], 2) seconds, pixels, pixels
    mask: Tensor | None = None  # (B, N + R) false where a sample's reference is dropped; None: nothing is masked
    phase: Tensor | None = None  # (B, N + R) extra rotary phase; None: 0 for all tokens


def video_tokens(z_t: Tensor, t: Tensor, positions: Tensor) -> Tokens:
    """The video alone: z_t (B, N, C), t (B,), positions (B, 3, N, 2)."""
    return Tokens(z_t, t[:, None].expand(-1, z_t.shape[1]), positions)


def append_reference(
    z_t: Tensor,
    z_ref: Tensor,
    t: Tensor,
    positions: Tensor,
    place: Place,
    timestep: str = "clean",
    has_reference: Tensor | None = None,
) -> Tokens:
    """Eq. 2: z~_t = [z_t, z_ref], with the timestep, position and phase of every token.

    z_t (B, N, C) noisy video latents, z_ref (B, R, C) reference latents, t (B,) noise level of the video, positions
    (B, 3, N, 2) of the video's tokens, `place` of the reference's. The paper leaves the reference's timestep open:
    "clean" is t = 0, LTX's own mark of a clean token, "shared" is the video's t. has_reference (B,) is false for
    samples whose reference is dropped (Sec. 3.4); their R tokens are masked out of attention.
    """
    (batch, video, _), count = z_t.shape, z_ref.shape[1]
    t_ref = torch.zeros_like(t) if timestep == "clean" else t
    is_ref = torch.arange(video + count, device=z_t.device) >= video  # (N + R,)
    mask = None
    if has_reference is not None and not has_reference.all():
        mask = ~is_ref | has_reference[:, None]  # (B, N + R)
    return Tokens(
        torch.cat([z_t, z_ref.to(z_t)], dim=1),
        torch.cat([t[:, None].expand(-1, video), t_ref[:, None].expand(-1, count)], dim=1),
        torch.cat([positions, place.positions.expand(batch, -1, -1, -1)], dim=2),
        mask,
        place.phase * is_ref.float().expand(batch, -1) if place.phase else None,
    )


# ---------------------------------------------------------------------------------------------------------------------


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
    """Multi-head attention with RMS norm on q and k, and a gate 2 sigmoid(.) on the output of each head."""

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
        """Queries from x (B, N, D), keys and values from context (B, S, D), or from x itself if that is None.

        `rotary` rotates q and k. `mask` (B, S) is false for keys that no query attends to.
        """
        context = x if context is None else context
        q = self.q_norm(self.to_q(x))  # (B, N, D)
        k = self.k_norm(self.to_k(context))  # (B, S, D)
        v = self.to_v(context)  # (B, S, D)
        q, k, v = (rearrange(a, "b n (heads d) -> b heads n d", heads=self.heads) for a in (q, k, v))
        if rotary is not None:
            q, k = apply_rope(q, *rotary), apply_rope(k, *rotary)
        mask = None if mask is None else rearrange(mask, "b s -> b 1 1 s")
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, N, head_dim)
        gate = 2 * torch.sigmoid(self.to_gate_logits(x))  # (B, N, heads)
        out = out * rearrange(gate, "b n heads -> b heads n 1")
        return self.to_out(rearrange(out, "b heads n d -> b n (heads d)"))  # (B, N, D)


class GELU(nn.Module):
    """Linear layer and GELU (tanh form): the first half of a feed-forward."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear D -> 4D, GELU, linear 4D -> D. The identity in between keeps the released names net.0 and net.2."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GELU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TimestepEmbedder(nn.Module):
    """A noise level as 128 cosines and 128 sines, then two linear layers."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(256, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t (U,) in [0, 1] -> (U, D). The sinusoid is made in float32: bf16 could not tell 999 from 1000."""
        frequencies = torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))
        angles = 1000 * t.float()[:, None] * frequencies  # (U, 128)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)  # (U, 256)
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


class AdaLN(nn.Module):
    """Noise level to modulation: `rows` vectors of width D, to which every block adds a table of its own."""

    def __init__(self, dim: int, rows: int):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(dim)})
        self.linear = nn.Linear(dim, rows * dim)
        self.rows = rows

    def forward(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """t (U,) -> modulation (U, rows, D), and the embedding (U, D) that it is computed from."""
        embedded = self.emb["timestep_embedder"](t, dtype)  # (U, D)
        modulation = self.linear(F.silu(embedded))  # (U, rows D)
        return rearrange(modulation, "u (rows d) -> u rows d", rows=self.rows), embedded


class Block(nn.Module):
    """Self-attention, text attention and feed-forward, each behind rms, shift and scale, each with a gate."""

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
        """x (B, N, D), context (B, S, D), modulation (U, 9, D), prompt_modulation (B, 2, D) -> (B, N, D).

        token_row (B, N) is the row of `modulation` that belongs to each token.
        """
        rows = (self.scale_shift_table + modulation).unbind(1)  # 9 x (U, D)
        # `embedding` is a gather. Its backward pass sums the gradients of many tokens per row in parallel, where that
        # of plain indexing would add them one after the other.
        shift_sa, scale_sa, gate_sa = (F.embedding(token_row, row) for row in rows[0:3])  # (B, N, D)
        x = x + gate_sa * self.attn1(modulate(rms(x), shift_sa, scale_sa), rotary=rotary, mask=mask)

        # The context depends on the noise level too, by the sample's sigma: text tokens carry no timestep.
        shift_ca, scale_ca, gate_ca = (F.embedding(token_row, row) for row in rows[6:9])  # (B, N, D)
        shift_kv, scale_kv = (self.prompt_scale_shift_table + prompt_modulation).unsqueeze(2).unbind(1)  # (B, 1, D)
        context = modulate(context, shift_kv, scale_kv)  # (B, S, D)
        x = x + gate_ca * self.attn2(modulate(rms(x), shift_ca, scale_ca), context)

        shift_ff, scale_ff, gate_ff = (F.embedding(token_row, row) for row in rows[3:6])  # (B, N, D)
        return x + gate_ff * self.ff(modulate(rms(x), shift_ff, scale_ff))


# ---------------------------------------------------------------------------------------------------------------------


class Constants(NamedTuple):
    """What stays the same in all steps of a stream: functions of the positions, and of which tokens share a t."""

    rotary: tuple[Tensor, Tensor]  # tables (B, heads, N, head_dim/2) in the dtype of the latents
    token_row: Tensor  # (B, N) index of each token's timestep among the distinct ones
    examples: Tensor  # (U,) one token of each distinct timestep, as an index into the flattened timesteps


class LTXVideo(nn.Module):
    """The DiT. All sizes come from the checkpoint's config (`ltx["transformer"]`)."""

    PREFIXES = {"": "model.diffusion_model."}

    def __init__(self, ltx: dict[str, Any]):
        super().__init__()
        self.heads = ltx["num_attention_heads"]
        self.dim = self.heads * ltx["attention_head_dim"]
        self.theta = ltx["positional_embedding_theta"]
        self.max_pos = ltx["positional_embedding_max_pos"]
        self.patchify_proj = nn.Linear(ltx["in_channels"], self.dim)
        self.adaln_single = AdaLN(self.dim, rows=9)
        self.prompt_adaln_single = AdaLN(self.dim, rows=2)
        self.transformer_blocks = nn.ModuleList([Block(self.dim, self.heads) for _ in range(ltx["num_layers"])])
        self.scale_shift_table = nn.Parameter(torch.zeros(2, self.dim))
        self.proj_out = nn.Linear(self.dim, ltx["out_channels"])

    @classmethod
    def from_checkpoint(
        cls, path: str | Path | Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "LTXVideo":
        """The model of an LTX-2.3 file. UserError that names the first tensor that is missing or does not fit."""
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
        """Computed once for a stream and passed to every `forward` of it; `dtype` is that of the latents."""
        rotary = tuple(table.to(dtype) for table in self.rotary(positions, phase))
        # A sequence has few distinct timesteps (t and 0). AdaLN runs on those, and each token looks up its row.
        distinct, token_row = torch.unique(timesteps, return_inverse=True)  # (U,), (B, N)
        index = torch.arange(timesteps.numel(), device=timesteps.device)
        examples = torch.empty_like(distinct, dtype=torch.long).scatter_(0, token_row.flatten(), index)
        return Constants(rotary, token_row, examples)

    def compile_blocks(self, backend: str | Callable = "inductor") -> "LTXVideo":
        """torch.compile of one block, whose code all blocks run: one graph per shape of a stream, none per step."""
        torch._dynamo.config.optimize_ddp = False  # it would cut the graph at every bucket of gradients
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
        """Velocity v = eps - z_0 of every token; here N counts all tokens, the reference's included.

        latents    (B, N, C)     noisy video tokens, then the reference's (`append_reference`)
        timesteps  (B, N)        noise level of each token in [0, 1]; 0 marks a clean one
        sigma      (B,)          noise level of the video, which modulates the text
        context    (B, S, D)     from text.py
        positions  (B, 3, N, 2)  from rope.py
        mask       (B, N)        false for tokens masked out of attention (a dropped reference); None for no mask, with
                                 which attention can use its fastest kernel
        phase      (B, N)        added to a token's rotary angles (placement "phase"); None for 0
        constants                of `self.constants`, made from the same timesteps, positions and phase; None: made here
        returns    (B, N, C)     the rows of the reference have no meaning
        """
        dtype = latents.dtype
        rotary, token_row, examples = constants or self.constants(timesteps, positions, phase, dtype)
        modulation, embedded = self.adaln_single(timesteps.flatten()[examples], dtype)  # (U, 9, D), (U, D)
        prompt_modulation, _ = self.prompt_adaln_single(sigma, dtype)  # (B, 2, D)

        x = self.patchify_proj(latents)  # (B, N, D)
        for block in self.transformer_blocks:
            x = block(x, context, modulation, prompt_modulation, token_row, rotary, mask)

        shift, scale = (self.scale_shift_table + embedded.unsqueeze(1)).unbind(1)  # (U, D)
        x = F.layer_norm(x, (self.dim,), eps=1e-6)
        x = modulate(x, F.embedding(token_row, shift), F.embedding(token_row, scale))
        return self.proj_out(x)  # (B, N, C)

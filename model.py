"""The video DiT of LTX-2.3: 48 blocks of self-attention, text attention and feed-forward over latent tokens.

It predicts the velocity v = eps - z_0 of z_t = (1 - t) z_0 + t eps. Every token carries its own noise level, so a
clean reference image (t = 0) can sit in the same sequence as noisy video tokens (Sec. 3.1, Eq. 2):

        tokens   [ video: N at t | reference: R at t = 0 ]       positions from rope.py
                       |
          x -> rms norm, AdaLN(t) -> self-attention + rotary -> gate -> +
            -> rms norm, AdaLN(t) -> text attention          -> gate -> +      context modulated by sigma
            -> rms norm, AdaLN(t) -> feed-forward            -> gate -> +
                       |  x 48
          LayerNorm, AdaLN(t), linear -> velocity of all tokens; the caller drops the reference's

The released checkpoint also has an audio branch. Without audio input the full model computes exactly this.

Letters, unless the top of a file says otherwise:
        B batch            F H W pixel frames, height, width       T h w latent grid (the paper's T, H, W)
        C latent channels  N = T h w video tokens                  R = h w reference tokens, L = N [+ R] all tokens
        D model width      S text tokens                           U distinct noise levels in a batch
        E embedding size   t noise level, 0 clean to 1 noise       sigma: LTX's t of the video; timesteps: of tokens
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from checkpoint import Checkpoint, open_checkpoint
from rope import RefPositions, apply_rope, rope_cos_sin

# --- Tokens ----------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """One sequence for the DiT: the first N tokens are the video's, the rest the reference's."""

    latents: Tensor  # (B, L, C)
    timesteps: Tensor  # (B, L) noise level of each token
    positions: Tensor  # (B, 3, L, 2) start and end of each token in seconds, pixels, pixels
    mask: Tensor | None = None  # (B, L) false at the reference of a sample that drops it; None: all true
    phase: Tensor | None = None  # (B, L) of placement "phase"; None: 0 for all tokens


def video_tokens(z_t: Tensor, t: Tensor, positions: Tensor) -> Tokens:
    """The video alone: z_t (B, N, C), t (B,), positions (B, 3, N, 2)."""
    return Tokens(z_t, t[:, None].expand(-1, z_t.shape[1]), positions)


def append_reference(
    z_t: Tensor,
    z_ref: Tensor,
    t: Tensor,
    positions: Tensor,
    ref_positions: RefPositions,
    ref_timestep: str = "clean",
    has_reference: Tensor | None = None,
) -> Tokens:
    """Eq. 2: z~_t = [z_t, z_ref], with the noise level, position and phase of every token.

    z_t (B, N, C) noisy video latents, z_ref (B, R, C) reference latents, t (B,) noise level of the video, positions
    (B, 3, N, 2) of the video, ref_positions of the reference. The paper leaves the reference's noise level open:
    "clean" is t = 0, LTX's own mark of a clean token, "shared" is the video's t. has_reference (B,) is false for
    samples whose reference is dropped (Sec. 3.4); their R tokens are masked out of attention.
    """
    (batch, n_video, _), n_ref = z_t.shape, z_ref.shape[1]
    if ref_timestep not in ("clean", "shared"):
        raise ValueError(f"ref_timestep {ref_timestep!r} is neither 'clean' nor 'shared'")
    t_ref = torch.zeros_like(t) if ref_timestep == "clean" else t
    is_ref = torch.arange(n_video + n_ref, device=z_t.device) >= n_video  # (L,)
    mask = None
    if has_reference is not None and not has_reference.all():
        mask = ~is_ref | has_reference[:, None]  # (B, L)
    return Tokens(
        torch.cat([z_t, z_ref.to(z_t)], dim=1),  # (B, N + R, C)
        torch.cat([t[:, None].expand(-1, n_video), t_ref[:, None].expand(-1, n_ref)], dim=1),  # (B, N + R)
        torch.cat([positions, ref_positions.positions.to(positions).expand(batch, -1, -1, -1)], dim=2),  # (B, 3, L, 2)
        mask,
        (ref_positions.phase * is_ref.float()).expand(batch, -1) if ref_positions.phase else None,  # (B, N + R)
    )


# --- Layers ----------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    """Divide each token (..., D) by its root mean square; no weight."""
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: x (1 + scale) + shift."""
    return x * (1 + scale) + shift


class RMSNorm(nn.RMSNorm):
    """RMS norm that casts its weight to the input's dtype: a float32 weight would rule out the fused kernel in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention with RMS norm on q and k, and a gate 2 sigmoid(.) on the output of each head."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.q_norm, self.k_norm = (RMSNorm(dim, eps=1e-6) for _ in range(2))  # over all heads together
        self.to_gate_logits = nn.Linear(dim, heads)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))  # a list of one keeps the released name to_out.0

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Queries come from x (B, L, D). Keys and values come from context (B, S, D), or from x if context is None;
        then S = L. `rotary` rotates q and k. `mask` (B, S) is false for masked keys."""
        context = x if context is None else context
        q = self.q_norm(self.to_q(x))  # (B, L, D)
        k = self.k_norm(self.to_k(context))  # (B, S, D)
        v = self.to_v(context)  # (B, S, D)
        split = "b n (heads d) -> b heads n d"
        q, k, v = (rearrange(a, split, heads=self.heads) for a in (q, k, v))  # (B, heads, L or S, head_dim)
        if rotary is not None:
            q, k = apply_rope(q, *rotary), apply_rope(k, *rotary)
        mask = None if mask is None else rearrange(mask, "b s -> b 1 1 s")  # (B, 1, 1, S), for all heads and queries
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, L, head_dim)
        gate = 2 * torch.sigmoid(self.to_gate_logits(x))  # (B, L, heads)
        out = out * rearrange(gate, "b n heads -> b heads n 1")
        return self.to_out(rearrange(out, "b heads n d -> b n (heads d)"))  # (B, L, D)


class LinearGELU(nn.Module):
    """Linear layer and GELU (tanh form): the first half of a feed-forward."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")  # (..., 4D)


class FeedForward(nn.Module):
    """Linear D -> 4D, GELU, linear 4D -> D. The identity in between keeps the released names net.0 and net.2."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(LinearGELU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TimestepEmbedder(nn.Module):
    """A noise level as 128 cosines and 128 sines, then linear, SiLU, linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(256, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t (U,) in [0, 1] -> (U, D). The sinusoid is of 1000 t, in float32: bf16 could not tell 999 from 1000."""
        frequencies = torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))  # (128,)
        angles = 1000 * t.float()[:, None] * frequencies  # (U, 128)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)  # (U, 256)
        return self.linear_2(F.silu(self.linear_1(sinusoid)))  # (U, D)


class AdaLN(nn.Module):
    """Noise level to shifts, scales and gates: `rows` vectors of width D. Every block adds a table of its own."""

    def __init__(self, dim: int, rows: int):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(dim)})  # the released name
        self.linear = nn.Linear(dim, rows * dim)
        self.rows = rows

    def forward(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """t (U,), or (B,) for the prompt -> modulation (U, rows, D), and the embedding (U, D) that it is made from."""
        embedding = self.emb["timestep_embedder"](t, dtype)  # (U, D)
        return rearrange(self.linear(F.silu(embedding)), "u (rows d) -> u rows d", rows=self.rows), embedding


class Block(nn.Module):
    """Self-attention, text attention, feed-forward: each after rms norm, shift and scale, each before a gate."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(9, dim))
        self.prompt_scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.attn1 = Attention(dim, heads)
        self.attn2 = Attention(dim, heads)
        self.ff = FeedForward(dim)
        self.recompute: Callable | None = None  # runs `run`, keeping less for the backward pass (engine/parallel.py)

    def forward(self, *inputs: Tensor | tuple[Tensor, Tensor] | None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return self.recompute(self.run, *inputs)
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
        """x (B, L, D), context (B, S, D), modulation (U, 9, D), prompt_modulation (B, 2, D) -> (B, L, D). For each
        token token_row (B, L) holds the index of its row among the U of `modulation`."""
        # Shift, scale and gate of self-attention (0-2), of the feed-forward (3-5), of text attention (6-8).
        rows = (self.scale_shift_table + modulation).unbind(1)  # 9 x (U, D)
        # F.embedding, not indexing: many tokens share a row, and F.embedding sums their gradients in parallel.
        shift_sa, scale_sa, gate_sa = (F.embedding(token_row, row) for row in rows[0:3])  # (B, L, D)
        x = x + gate_sa * self.attn1(modulate(rms_norm(x), shift_sa, scale_sa), rotary=rotary, mask=mask)

        # The noise level modulates the context too. Text tokens have none of their own; they use the sample's sigma.
        shift_ca, scale_ca, gate_ca = (F.embedding(token_row, row) for row in rows[6:9])  # (B, L, D)
        shift_kv, scale_kv = (self.prompt_scale_shift_table + prompt_modulation).unsqueeze(2).unbind(1)  # 2 x (B, 1, D)
        context = modulate(context, shift_kv, scale_kv)  # (B, S, D)
        x = x + gate_ca * self.attn2(modulate(rms_norm(x), shift_ca, scale_ca), context)

        shift_ff, scale_ff, gate_ff = (F.embedding(token_row, row) for row in rows[3:6])  # (B, L, D)
        return x + gate_ff * self.ff(modulate(rms_norm(x), shift_ff, scale_ff))


# --- The model -------------------------------------------------------------------------------------------------------


class Constants(NamedTuple):
    """What stays the same in all steps of a stream (guidance.py). Levels change; the tokens that share one do not."""

    rotary: tuple[Tensor, Tensor]  # tables (B, heads, L, head_dim/2) in the dtype of the latents
    token_row: Tensor  # (B, L) index of each token's noise level among the distinct ones
    examples: Tensor  # (U,) for each level, the flat index of one token that has it; a step reads its levels there


class LTXVideo(nn.Module):
    """The DiT. All sizes come from `transformer`, the section of that name in the checkpoint's config."""

    PREFIXES = {"": "model.diffusion_model."}  # of tensor names: here -> in the file

    def __init__(self, transformer: dict[str, Any]):
        super().__init__()
        self.heads = transformer["num_attention_heads"]
        self.dim = self.heads * transformer["attention_head_dim"]
        self.theta = transformer["positional_embedding_theta"]
        self.max_pos = transformer["positional_embedding_max_pos"]
        self.patchify_proj = nn.Linear(transformer["in_channels"], self.dim)
        self.adaln_single = AdaLN(self.dim, rows=9)
        self.prompt_adaln_single = AdaLN(self.dim, rows=2)
        layers = range(transformer["num_layers"])
        self.transformer_blocks = nn.ModuleList([Block(self.dim, self.heads) for _ in layers])
        self.scale_shift_table = nn.Parameter(torch.zeros(2, self.dim))
        self.proj_out = nn.Linear(self.dim, transformer["out_channels"])

    @classmethod
    def from_checkpoint(
        cls, path: str | Path | Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "LTXVideo":
        """The model of an LTX-2.3 file. UserError with the name of the first missing or misfitting tensor."""
        checkpoint = open_checkpoint(path)
        with torch.device("meta"):
            model = cls(checkpoint.config["transformer"])
        return checkpoint.load(model, cls.PREFIXES, device, dtype)

    def constants(
        self, timesteps: Tensor, positions: Tensor, phase: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Constants:
        """The constants of a stream: compute them once, pass them to every `forward`. `dtype` is the latents'."""
        tables = rope_cos_sin(positions, self.dim, self.heads, self.theta, self.max_pos, phase)
        rotary = tuple(table.to(dtype) for table in tables)  # (B, heads, L, head_dim/2)
        # A batch has few distinct noise levels: one t per sample, and 0. AdaLN runs on those; tokens look up their row.
        distinct, token_row = torch.unique(timesteps, return_inverse=True)  # (U,), (B, L)
        index = torch.arange(timesteps.numel(), device=timesteps.device)  # (B L,)
        examples = torch.empty_like(distinct, dtype=torch.long).scatter_(0, token_row.flatten(), index)  # (U,)
        return Constants(rotary, token_row, examples)

    def compile_blocks(self, backend: str | Callable = "inductor") -> "LTXVideo":
        """Compile every block. They share one code object: one graph for each input shape, for all blocks and steps."""
        torch._dynamo.config.optimize_ddp = False  # DDP's own mode would cut the graph at every bucket of gradients
        for block in self.transformer_blocks.children():  # iterating over StreamedBlocks would copy weights
            block.forward = torch.compile(block.forward, dynamic=False, backend=backend)
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
        cache: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Velocity v = eps - z_0 of every token.

        latents    (B, L, C)     noisy video tokens, then the reference's (`append_reference`)
        timesteps  (B, L)        noise level of each token in [0, 1]; 0 marks a clean one
        sigma      (B,)          the t of the video, which modulates the text
        context    (B, S, D)     from text.py
        positions  (B, 3, L, 2)  from rope.py
        mask       (B, L)        false for tokens masked out of attention; None: no mask, the fastest kernel
        phase      (B, L)        of placement "phase", see `rope_cos_sin`; None for 0
        constants                of `self.constants`, computed for these tokens at any step; None: computed here
        cache                    runs the blocks and may leave some out (engine/step_cache.py); None: all run
        returns    (B, L, C)     the rows of the reference have no meaning
        """
        dtype = latents.dtype
        rotary, token_row, examples = constants or self.constants(timesteps, positions, phase, dtype)
        modulation, embedding = self.adaln_single(timesteps.flatten()[examples], dtype)  # (U, 9, D), (U, D)
        prompt_modulation, _ = self.prompt_adaln_single(sigma, dtype)  # (B, 2, D)

        def run_blocks(x: Tensor, blocks: Iterable[nn.Module]) -> Tensor:
            for block in blocks:
                x = block(x, context, modulation, prompt_modulation, token_row, rotary, mask)
            return x

        x = self.patchify_proj(latents)  # (B, L, D)
        x = cache(run_blocks, x, self.transformer_blocks) if cache else run_blocks(x, self.transformer_blocks)

        shift, scale = (self.scale_shift_table + embedding.unsqueeze(1)).unbind(1)  # 2 x (U, D)
        x = F.layer_norm(x, (self.dim,), eps=1e-6)
        x = modulate(x, F.embedding(token_row, shift), F.embedding(token_row, scale))  # (B, L, D)
        return self.proj_out(x)  # (B, L, C)

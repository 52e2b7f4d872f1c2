"""Positions of tokens: the latent grid in seconds and pixels, TASS-RoPE for the reference, the rotary embedding.

Self-attention knows the position of a token only by its rotary embedding. In LTX-2.3 the position of a latent cell is
the interval that it covers, in seconds on the time axis and in pixels on the other two. The paper appends the tokens
of the reference image to those of the video (Sec. 3.1) and has to place them (Sec. 3.2). Its answer is TASS
(Temporal-Adjacent, Spatial-Shifted): the reference takes the first latent frame after the video, its rows start at h
and its columns at w. So no reference token shares a coordinate with a video token:

        width ->  0          w          2w
    height  0     +----------+ - - - - - +      video tokens: (t, i, j),       t = 0 .. T-1     (Eq. 3)
      |           |  video   |           |
      v     h     +----------+-----------+      reference:    (T, h+i, w+j)                     (Eq. 4)
                  |          | reference |
            2h    + - - - - -+-----------+      near in time, so attention finds it; apart in space, so no copying

`python docs/figures.py` draws this, and the placements that the paper argues against.
The letters are those of model.py, but here t is the index of a latent frame. The paper's T, H, W are the latent grid,
here T, h, w.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Origin (time, height, width) of the reference's cells, in latent cells; (T, h, w) is the grid of the video.
# Only "tass" is the paper's method. The next four are the placements that Sec. 3.2 rejects, here to test its argument.
# "phase" is the placement of LTX-Best-Face-ID: the reference lies as in "overlap", and a phase marks its tokens.
PLACEMENTS = {
    "tass": lambda T, h, w: (T, h, w),
    "overlap": lambda T, h, w: (0, 0, 0),
    "temporal": lambda T, h, w: (T, 0, 0),
    "fixed": lambda T, h, w: (100, h, w),
    "remote": lambda T, h, w: (T + 100, h, w),
    "phase": lambda T, h, w: (0, 0, 0),
}


@dataclass(frozen=True)
class ReferenceSettings:
    """How the reference image enters the model. Defaults are the paper's, or LTX's where the paper is silent; those of
    source_id and phase_scale are LTX-Best-Face-ID's."""

    placement: str = "tass"  # Eq. 4, or another of PLACEMENTS
    source_id: int = 2  # placement "phase": number of the source
    phase_scale: float = 1.0  # placement "phase": phase = source_id * phase_scale
    fit: str = "letterbox"  # Sec. 3.1; "cover": scaled to cover the video's shape and cut around the center
    timestep: str = "clean"  # reference tokens carry t = 0; "shared": they carry the t of the video


class RefPositions(NamedTuple):
    """Positions of the reference's tokens, and the phase that marks them."""

    positions: Tensor  # (1 or B, 3, R, 2) intervals [start, end) in seconds, pixels, pixels
    phase: float = 0.0  # see `rope_cos_sin`; 0 for every placement but "phase"


def cell_grid(T: int, h: int, w: int, origin: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """Latent cells (t, i, j) of a grid that starts at `origin`, in the order t, i, j with j fastest. (3, T*h*w)"""
    axes = [torch.arange(start, start + size) for start, size in zip(origin, (T, h, w))]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)  # (3, T, h, w) -> (3, n)


def to_seconds_and_pixels(cells: Tensor, fps: float, scale: tuple[int, int, int]) -> Tensor:
    """Intervals [start, end) that latent cells (3, n) cover, in seconds, pixels and pixels. (3, n, 2)

    `scale` = (s, p, p) frames and pixels per cell. Cell 0 holds a single pixel frame, frame 0; cell k >= 1 holds the s
    frames from s (k - 1) + 1 to s k. Cell k < 0 lies before the video and holds frames s k to s (k + 1) - 1.
    """
    edges = torch.stack([cells, cells + 1], dim=-1).float()  # (3, n, 2) boundaries, in cells
    time, space = edges[0], edges[1:]  # (n, 2), (2, n, 2)
    time = torch.where(time > 0, scale[0] * (time - 1) + 1, scale[0] * time) / fps
    space = space * torch.tensor(scale[1:], dtype=torch.float32)[:, None, None]
    return torch.cat([time[None], space])  # (3, n, 2)


def video_positions(T: int, h: int, w: int, fps: float, scale: tuple[int, int, int] = (8, 32, 32)) -> Tensor:
    """Eq. 3 in LTX's units: p_v(t, i, j) = (t, i, j) for a grid of (T, h, w) latent cells, as the cells' intervals in
    seconds and pixels. (3, T*h*w, 2)"""
    return to_seconds_and_pixels(cell_grid(T, h, w), fps, scale)


def reference_positions(
    T: int, h: int, w: int, fps: float, scale: tuple[int, int, int] = (8, 32, 32), placement: str = "tass"
) -> Tensor:
    """Eq. 4: p_r(i, j) = TASS(i, j) = (T, h + i, w + j), for a video grid of (T, h, w) latent cells. (3, h*w, 2)

    The paper gives the coordinates in latent cells. They are mapped to seconds and pixels like those of video tokens,
    so with TASS the reference fills the latent frame right after the video. `placement`: a name in PLACEMENTS.

    The paper does not speak of LTX's range, max_pos = 20 seconds and 2,048 pixels. Beyond it lie TASS in videos above
    1,024 pixels a side or of about 20 seconds, and, at 24 fps, "fixed" and "remote".
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement {placement!r} is not one of {', '.join(PLACEMENTS)}")
    origin = PLACEMENTS[placement](T, h, w)
    return to_seconds_and_pixels(cell_grid(1, h, w, origin), fps, scale)


def place_reference(
    grid: tuple[int, int, int], fps: float, scale: tuple[int, int, int], reference: ReferenceSettings
) -> RefPositions:
    """Positions (1, 3, R, 2) and phase of the reference's tokens beside a video of grid (T, h, w)."""
    positions = reference_positions(*grid, fps, scale, reference.placement)[None]
    phase = reference.source_id * reference.phase_scale if reference.placement == "phase" else 0.0
    return RefPositions(positions, phase)


def rope_cos_sin(
    positions: Tensor,
    dim: int,
    heads: int,
    theta: float,
    max_pos: list[float] | tuple[float, ...],
    phase: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary tables of LTX-2.3 for positions (B, axes, L, 2): cos and sin, float32. (B, heads, L, dim/heads/2)

    The middle of each interval, as a fraction f of `max_pos`, gives the angle (2f - 1) * frequency. There are
    K = dim // (2 axes) frequencies pi/2 * theta^x, with x from 0 to 1 in equal steps, for the whole width `dim`. The
    layout goes frequency by frequency with the axes side by side, and the heads take consecutive slices: early heads
    turn slowly, late heads fast. The dim/2 - K * axes remaining slots come first, with angle 0.

    `phase` (B, L) adds phase * theta^(-d/P) to slot d = 0..P-1 of every head, P = dim/heads/2. It is the mark that
    LTX-Best-Face-ID gives the reference's tokens instead of positions of their own; it is not in the paper.
    """
    axes = positions.shape[1]
    K = dim // (2 * axes)
    # Computed in float64, as the frequencies of the released model were ("frequencies_precision").
    ladder = theta ** torch.linspace(0, 1, K, dtype=torch.float64) * (math.pi / 2)
    ladder = ladder.to(device=positions.device, dtype=torch.float32)  # (K,)
    max_pos = torch.tensor(max_pos, dtype=torch.float32, device=positions.device)
    fraction = positions.float().mean(-1) / max_pos[:, None]  # (B, axes, L)
    angles = rearrange(2 * fraction - 1, "b axes n -> b n 1 axes") * ladder[:, None]  # (B, L, K, axes)
    angles = rearrange(angles, "b n k axes -> b n (k axes)")
    angles = F.pad(angles, (dim // 2 - K * axes, 0))  # angle 0: cos 1, sin 0. (B, L, dim/2)
    angles = rearrange(angles, "b n (heads p) -> b heads n p", heads=heads)  # (B, heads, L, P)
    if phase is not None:
        P = angles.shape[-1]
        falling = theta ** (-torch.arange(P, dtype=torch.float64, device=positions.device) / P)  # (P,)
        angles = angles + phase[:, None, :, None] * falling.float()
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, L, head_dim): the halves (a, b) of each head become (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, dim=-1)  # (B, heads, L, head_dim/2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

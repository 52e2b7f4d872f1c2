"""Where a token sits: the latent grid in seconds and pixels, TASS-RoPE for the reference, and the rotary embedding.

Self-attention knows a token's place only by its rotary embedding. LTX-2.3 takes the place of a latent cell as the
interval it covers, in seconds on the time axis and in pixels on the other two. The paper appends the reference
image's tokens to the video's and asks where *they* should sit (Sec. 3.2). Its answer, TASS, is the first time slot
after the video and the square diagonally past it, so that nothing coincides with a video token:

        width ->  0          W          2W
    height  0     +----------+ - - - - - +      video tokens: (t, i, j),       t = 0 .. T-1     (Eq. 3)
      |           |  video   |           |
      v     H     +----------+-----------+      reference:    (T, H+i, W+j)                     (Eq. 4)
                  |          | reference |
            2H    + - - - - -+-----------+      near in time, apart in space: looked up, not copied

`python rope.py` draws this to scale, and the placements that the paper argues against.
"""

import argparse
import math

import torch
from torch import Tensor

from common.errors import one_line_errors

# Where the reference's cell (i, j) goes, as (time, height, width) in latent cells; T, H, W is the video's grid.
# Only "tass" is the paper's method; the next four are what Sec. 3.2 rejects, kept so that its argument can be run.
# "phase" is another answer, that of the LoRA LTX-Best-Face-ID: overlap, told apart by `reference_phase`.
PLACEMENTS = {
    "tass": lambda T, H, W: (T, H, W),
    "overlap": lambda T, H, W: (0, 0, 0),
    "temporal": lambda T, H, W: (T, 0, 0),
    "fixed": lambda T, H, W: (100, H, W),
    "remote": lambda T, H, W: (T + 100, H, W),
    "phase": lambda T, H, W: (0, 0, 0),
}


def cell_grid(frames: int, height: int, width: int, origin: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """Latent cells (t, i, j) of a grid that starts at `origin`, ordered t, h, w with w fastest. (3, T*H*W)"""
    axes = [torch.arange(start, start + size) for start, size in zip(origin, (frames, height, width))]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


def to_seconds_and_pixels(cells: Tensor, fps: float, scale: tuple[int, int, int]) -> Tensor:
    """What latent cells (3, N) cover, as intervals [start, end): seconds, pixels, pixels. (3, N, 2)

    The first latent frame holds a single pixel frame, so cell k of the time axis starts at pixel frame
    max(0, s k + 1 - s) and ends at s (k + 1) + 1 - s.
    """
    edges = torch.stack([cells, cells + 1], dim=-1).float()  # (3, N, 2)
    edges = edges * torch.tensor(scale, dtype=torch.float32)[:, None, None]
    edges[0] = (edges[0] + 1 - scale[0]).clamp(min=0) / fps
    return edges


def video_positions(
    frames: int, height: int, width: int, fps: float, scale: tuple[int, int, int] = (8, 32, 32)
) -> Tensor:
    """Eq. 3: p_v(t, i, j) = (t, i, j), mapped to seconds and pixels. Sizes in latent cells. (3, T*H*W, 2)"""
    return to_seconds_and_pixels(cell_grid(frames, height, width), fps, scale)


def reference_positions(
    frames: int,
    height: int,
    width: int,
    fps: float,
    scale: tuple[int, int, int] = (8, 32, 32),
    placement: str = "tass",
) -> Tensor:
    """Eq. 4: p_r(i, j) = TASS(i, j) = (T, H + i, W + j), for a video grid of (T, H, W) latent cells. (3, H*W, 2)

    The paper gives the coordinates in latent cells only; here they go through the same mapping to seconds and pixels
    as every video token, so "adjacent" keeps meaning one latent frame. `placement` also names the rejected variants.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement {placement!r} is none of {', '.join(PLACEMENTS)}")
    origin = PLACEMENTS[placement](frames, height, width)
    return to_seconds_and_pixels(cell_grid(1, height, width, origin), fps, scale)


def reference_phase(placement: str = "tass", source_id: int = 2, phase_scale: float = 1.0) -> float:
    """What `rope_cos_sin` adds to the angles of the reference's tokens; 0 for every placement but "phase"."""
    return source_id * phase_scale if placement == "phase" else 0.0


def rope_cos_sin(
    positions: Tensor,
    dim: int,
    heads: int,
    theta: float,
    max_pos: list[float] | tuple[float, ...],
    phase: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary tables of LTX-2.3 for positions (B, axes, N, 2); cos and sin, float32. (B, heads, N, dim/heads/2)

    The middle of each interval, as a fraction f of `max_pos`, gives the angle (2f - 1) * frequency. The model's whole
    width `dim` shares one ladder of frequencies pi/2 * theta^[0..1], dim / (2 axes) of them, laid out frequency by
    frequency with the axes side by side, and the heads take consecutive slices of it: early heads turn slowly, late
    heads fast. Slots that the division leaves over are put in front and do not rotate.

    `phase` (B, N) turns a token further by phase * theta^(-d/L) in slot d = 0..L-1 of every head, L = dim/heads/2: a
    mark of the source a token comes from, which no shift of place could make (LTX-Best-Face-ID; not in the paper).
    """
    axes = positions.shape[1]
    count = dim // (2 * axes)
    # The ladder is made in float64, as the released model's was ("frequencies_precision").
    ladder = theta ** torch.linspace(0, 1, count, dtype=torch.float64) * (math.pi / 2)
    ladder = ladder.to(device=positions.device, dtype=torch.float32)
    max_pos = torch.tensor(max_pos, dtype=torch.float32, device=positions.device)
    fraction = positions.float().mean(-1) / max_pos[:, None]  # (B, axes, N)
    angles = (2 * fraction - 1).transpose(1, 2).unsqueeze(2) * ladder[:, None]  # (B, N, count, axes)
    angles = angles.flatten(2)  # (B, N, count*axes)
    angles = torch.nn.functional.pad(angles, (dim // 2 - count * axes, 0))  # angle 0: cos 1, sin 0
    angles = angles.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, N, dim/heads/2)
    if phase is not None:
        slots = angles.shape[-1]
        falling = theta ** (-torch.arange(slots, dtype=torch.float64, device=positions.device) / slots)  # (L,)
        angles = angles + phase[:, None, :, None] * falling.float()
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, N, head_dim): the halves (a, b) of each head become (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def draw(path: str, frames: int = 16, height: int = 15, width: int = 26) -> None:
    """Draw video and reference tokens in the same axes, for TASS and for the rejected placements."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def box(ax, origin: tuple[int, int, int], size: tuple[int, int, int], color: str) -> None:
        """A block of latent cells as a shaded box; matplotlib's axes are (time, width, height)."""
        (t, h, w), (dt, dh, dw) = origin, size
        grid = torch.ones(1, 1, 1).numpy().astype(bool)
        corner = torch.meshgrid(*(torch.tensor([0.0, 1.0]),) * 3, indexing="ij")
        x, y, z = (start + c.numpy() * length for start, c, length in zip((t, w, h), corner, (dt, dw, dh)))
        ax.voxels(x, y, z, grid, facecolors=color, edgecolors="#00000060", linewidth=0.6)

    figure = plt.figure(figsize=(13, 6.2))
    layout = figure.add_gridspec(2, 4, width_ratios=[1.25, 1.25, 1, 1], wspace=0.12, hspace=0.22)
    titles = {
        "tass": "TASS-RoPE (the paper's): reference at (T, H+i, W+j)\n"
        f"T, H, W = {frames}, {height}, {width} latent cells",
        "overlap": "overlap: (0, i, j)\ncollides with frame 0",
        "temporal": "temporal: (T, i, j)\nsame place in space: copy-paste",
        "fixed": "fixed: (100, H+i, W+j)\ngap depends on the length",
        "remote": "remote: (T+100, H+i, W+j)\ntoo far to pass on detail",
    }
    places = {"tass": layout[:, :2], "overlap": layout[0, 2], "temporal": layout[0, 3]}
    places |= {"fixed": layout[1, 2], "remote": layout[1, 3]}
    for name, place in places.items():
        ax = figure.add_subplot(place, projection="3d", proj_type="ortho")
        origin = PLACEMENTS[name](frames, height, width)
        if name == "tass":
            for t in range(frames):
                box(ax, (t, 0, 0), (1, height, width), "#4c78a838")
        else:
            start = 1 if name == "overlap" else 0  # the two would hide each other
            box(ax, (start, 0, 0), (frames - start, height, width), "#4c78a870")
        box(ax, origin, (1, height, width), "#f58518d0")
        ax.set_xlim(0, max(frames, origin[0]) + 2)
        ax.set_ylim(0, 2 * width)
        ax.set_zlim(2 * height, 0)
        ax.view_init(elev=18, azim=-58)
        ax.set_box_aspect((1.5, 1.25, 1.0), zoom=1.0)
        ax.set_title(titles[name], fontsize=12 if name == "tass" else 9)
        if name == "tass":
            ax.set_xlabel("time t (latent frames)")
            ax.set_ylabel("width j")
            ax.set_zlabel("height i")
            ax.set_xticks([0, frames], ["0", "T"])
        else:
            ax.set_xticks([0, frames, origin[0]] if origin[0] > frames else [0, frames])
        ax.set_yticks([0, width, 2 * width], ["0", "W", "2W"])
        ax.set_zticks([0, height, 2 * height], ["0", "H", "2H"])
        ax.tick_params(labelsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in ("#4c78a8", "#f58518")]
    names = ["video tokens", "reference tokens"]
    figure.legend(handles, names, loc="lower left", bbox_to_anchor=(0.2, 0.1), ncols=2, frameon=False, fontsize=11)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the rotary coordinates of video and reference tokens.")
    parser.add_argument("--out", default="assets/tass.png", help="the picture to write")
    arguments = parser.parse_args()
    with one_line_errors():
        draw(arguments.out)
    print(f"wrote {arguments.out}")

"""From noise to a video: the sigma schedule, decoupled text-reference guidance (Eq. 13), Euler steps.

Each step asks the same DiT for three velocities and combines them (Sec. 3.4):

        v_0    no prompt, no reference          guided = v_0 + s_y (v_y  - v_0)      towards the prompt
        v_y    prompt,    no reference                       + s_r (v_yr - v_y)      towards the face
        v_yr   prompt and reference             z <- z + guided (sigma_next - sigma)

Streams without the reference do not carry its tokens at all. Several processes may share the streams of a step.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rope import reference_phase, reference_positions, video_positions
from vae import from_tokens, to_tokens

DENSE_TOKENS = ((1024, 0.95), (4096, 2.05))  # the released schedule's shift at two sequence lengths
DECODED_AT_ONCE = 2  # latent frames; a longer video goes through the decoder in pieces, with the same result
LAST_SIGMA = 0.1  # the last sigma before 0
# What the distilled checkpoints know: eight steps, one stream. Any other schedule looks like bad training.
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)


def schedule_shift(tokens: int) -> float:
    """mu(tokens): more tokens, more noise. The line through (1024, 0.95) and (4096, 2.05), not clamped."""
    (x0, y0), (x1, y1) = DENSE_TOKENS
    return y0 + (tokens - x0) * (y1 - y0) / (x1 - x0)


def sigma_schedule(steps: int, tokens: int) -> Tensor:
    """Noise levels from 1 to 0 of LTX-2.3: (steps + 1,). `tokens` is T*H*W of the video, the reference not counted.

    linspace(1, 0) shifted by sigma = e^mu / (e^mu + 1/s - 1), then stretched so that the last one before 0 is 0.1.
    """
    # In float64 and by 1 - sigma: for long videos every sigma is 1 to float32, and stretching would divide 0 by 0.
    odds = 1 / torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1] - 1
    rest = odds / (math.exp(schedule_shift(tokens)) + odds)  # 1 - sigma
    if steps > 1:  # a single step starts at 1 and has nothing to stretch
        rest = rest * (1 - LAST_SIGMA) / rest[-1]
    return torch.cat([1 - rest, torch.zeros(1)]).float()


def three_stream_cfg(v_0: Tensor, v_y: Tensor, v_yr: Tensor, s_y: float = 5.0, s_r: float = 7.5) -> Tensor:
    """Eq. 13: v_0 + s_y (v_y - v_0) + s_r (v_yr - v_y), velocities of equal shape (B, N, C)."""
    return v_0 + s_y * (v_y - v_0) + s_r * (v_yr - v_y)


def needed_streams(s_y: float, s_r: float, with_reference: bool) -> tuple[bool, bool, bool]:
    """Whether v_0, v_y and v_yr have a weight other than zero in Eq. 13."""
    need_yr = with_reference and s_r != 0
    return s_y != 1, s_y != (s_r if need_yr else 0), need_yr


@torch.no_grad()
def sample_latents(
    model: Callable[..., Tensor],
    noise: Tensor,
    sigmas: Tensor,
    positions: Tensor,
    context: Tensor,
    null_context: Tensor,
    reference: Tensor | None = None,
    ref_positions: Tensor | None = None,
    s_y: float = 5.0,
    s_r: float = 7.5,
    ref_timestep: str = "clean",
    ref_phase: float = 0.0,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[Iterable], Iterable] = iter,
    ranks: tuple[int, int] = (0, 1),
) -> Tensor:
    """Euler integration of Eq. 13 from noise (B, N, C) to latents (B, N, C), accumulated in float32.

    positions (B, 3, N, 2) and context, null_context (B, S, D) belong to the video; reference (B, R, C) and
    ref_positions (B, 3, R, 2) to the reference image, None for plain text-to-video. `model` is an LTXVideo or
    anything called like it, run in `dtype`. `ref_timestep` is "clean" (the reference's tokens say t = 0) or "shared"
    (they say the video's t); the paper leaves that open. `ref_phase` is what rope.reference_phase says. `progress`
    wraps the loop over steps. `ranks` is this process's number and how many share the streams, of the default process
    group; all get the result.

    A stream whose weight in Eq. 13 is zero is not computed: v_0 at s_y = 1, v_y at s_y = s_r, v_yr at s_r = 0.
    """
    if ref_timestep not in ("clean", "shared"):
        raise ValueError(f"ref_timestep {ref_timestep!r} is neither 'clean' nor 'shared'")
    batch, tokens, _ = noise.shape
    need_0, need_y, need_yr = needed_streams(s_y, s_r, reference is not None)
    z = noise.float()

    def streams(contexts: list[Tensor], with_reference: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """Streams of equal length as one batch: a function of z and sigma, which returns velocities (n, B, N, C)."""
        n, places, phase, extra = len(contexts), positions.repeat(len(contexts), 1, 1, 1), None, {}
        asked = torch.cat(contexts).to(dtype)
        if with_reference:
            places = torch.cat([positions, ref_positions], dim=2)
            if ref_phase:
                phase = torch.zeros(places.shape[0], places.shape[2], device=z.device)  # (B, N + R)
                phase[:, tokens:] = ref_phase
                extra["phase"] = phase

        def velocity(z: Tensor, sigma: Tensor) -> Tensor:
            level = sigma.expand(n * batch)
            x, timesteps = z.to(dtype).repeat(n, 1, 1), level[:, None].expand(-1, tokens)
            if with_reference:
                x = torch.cat([x, reference.to(dtype)], dim=1)  # Eq. 2
                ref_level = level if ref_timestep == "shared" else torch.zeros_like(level)
                timesteps = torch.cat([timesteps, ref_level[:, None].expand(-1, reference.shape[1])], dim=1)
            if hasattr(model, "constants") and "constants" not in extra:
                extra["constants"] = model.constants(timesteps, places, phase, dtype)
            v = model(x, timesteps, level, asked, places, **extra)[:, :tokens]  # the reference's output is dropped
            return v.float().unflatten(0, (n, batch))

        return velocity

    # Streams without reference are one batch, unless there are processes enough to take one each.
    rank, world = ranks
    without = [0] * need_0 + [1] * need_y  # in order: v_0, v_y, v_yr
    groups = [without] * bool(without) + [[2]] * need_yr
    groups = [[k] for group in groups for k in group] if world > len(groups) else groups
    mine = [(g, streams([(null_context, context, context)[k] for k in g], g == [2])) for g in groups[rank::world]]

    for step in progress(range(len(sigmas) - 1)):
        sigma, sigma_next = sigmas[step].to(z.device), sigmas[step + 1].to(z.device)
        v = z.new_zeros(3, *z.shape)
        for group, velocity in mine:
            v[group] = velocity(z, sigma)
        if world > 1:
            dist.all_reduce(v)  # each stream is zero on all processes but one, so the sum is exact
        v_0, v_y, v_yr = v
        v_yr = v_yr if need_yr else v_y if need_y else v_0
        v_y = v_y if need_y else v_yr
        v_0 = v_0 if need_0 else v_y
        z = z + three_stream_cfg(v_0, v_y, v_yr, s_y, s_r) * (sigma_next - sigma)
    return z


def generate(
    model: nn.Module,
    vae: nn.Module,
    context: Tensor,
    null_context: Tensor,
    image: Tensor | None,
    *,
    seed: int = 0,
    **options,
) -> Tensor | None:
    """One video (3, frames, height, width): `generate_batch` of one image (3, height, width), or None, and one seed."""
    images = None if image is None else image[None]
    videos = generate_batch(model, vae, context, null_context, images, seeds=[seed], **options)
    return None if videos is None else videos[0]


@torch.no_grad()
def generate_batch(
    model: nn.Module,
    vae: nn.Module,
    context: Tensor,
    null_context: Tensor,
    images: Tensor | None,
    *,
    seeds: Sequence[int],
    frames: int,
    height: int,
    width: int,
    fps: float,
    steps: int = 30,
    placement: str = "tass",
    source_id: int = 2,
    phase_scale: float = 1.0,
    sigmas: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    ranks: tuple[int, int] = (0, 1),
    **options,
) -> Tensor | None:
    """B videos (B, 3, frames, height, width), about in [-1, 1], of the faces in `images` doing what `context` says.

    images (B, 3, height, width) in [-1, 1], letterboxed, or None for plain text-to-video; context (B, S, D),
    null_context (1, S, D). Sizes in pixels. source_id and phase_scale matter to placement "phase" alone. `sigmas`
    replace the schedule of `steps`. `dtype` is what the DiT runs in, None for its weights' own. `options` go to
    `sample_latents`. The noise is drawn on the CPU, each video's from its own seed: one seed, one video, any device.
    Of processes that share the streams (`ranks`), only the first decodes; the others return None.
    """
    device, vae_dtype = vae.decoder.conv_in.conv.weight.device, vae.decoder.conv_in.conv.weight.dtype
    dtype, batch = dtype or next(model.parameters()).dtype, len(seeds)
    time, rows, columns = vae.scale
    grid = ((frames - 1) // time + 1, height // rows, width // columns)
    positions = video_positions(*grid, fps, vae.scale).expand(batch, -1, -1, -1).to(device)

    reference = ref_positions = None
    if images is not None:
        latents = vae.encode(images[:, :, None].to(device, vae_dtype))  # Eq. 1: an image is a video of one frame
        reference = to_tokens(latents)  # (B, H*W, C)
        ref_positions = reference_positions(*grid, fps, vae.scale, placement).expand(batch, -1, -1, -1).to(device)

    shape = math.prod(grid), model.proj_out.out_features
    noise = [torch.randn(1, *shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    levels = sigma_schedule(steps, math.prod(grid)) if sigmas is None else torch.tensor(sigmas)
    z_0 = sample_latents(
        model,
        torch.cat(noise).to(device),
        levels,
        positions,
        context,
        null_context.expand(batch, -1, -1),
        reference,
        ref_positions,
        ref_phase=reference_phase(placement, source_id, phase_scale),
        dtype=dtype,
        ranks=ranks,
        **options,
    )
    if ranks[0]:
        return None
    return vae.decode(from_tokens(z_0, grid).to(vae_dtype), DECODED_AT_ONCE).float()

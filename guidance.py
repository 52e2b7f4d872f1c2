"""From noise to a video: the sigma schedule, decoupled text-reference guidance (Eq. 13), Euler steps.

Each step calls the same DiT for three velocities and adds them up with weights that sum to 1 (Sec. 3.4):

        stream      prompt      reference    weight in Eq. 13
        v_0         negative    no           1 - s_y
        v_y         yes         no           s_y - s_r
        v_yr        yes         yes          s_r

        Euler step:     z <- z + v_cfg (sigma_next - sigma)

A stream of weight zero is not computed. Streams without the reference do not carry its tokens at all. Several
processes can share the streams of a step. The letters are those of model.py; sigma is the noise level t of a step.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import Constants, append_reference, video_tokens
from rope import ReferenceSettings, RefPositions, place_reference, video_positions
from vae import CHUNK, from_tokens, to_tokens

S_Y, S_R = 5.0, 7.5  # the paper's scales of text and reference guidance
STEPS = 30  # default number of Euler steps, LTX-2.3's
SHIFT_POINTS = ((1024, 0.95), (4096, 2.05))  # (tokens, shift) of the released schedule
LAST_SIGMA = 0.1  # the last sigma before 0
# Schedule of the distilled checkpoints: eight steps, one stream. With another schedule, their samples look like those
# of a badly trained model.
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)


def schedule_shift(tokens: int) -> float:
    """mu(N): more tokens, more noise. The line through (1024, 0.95) and (4096, 2.05), not clamped."""
    (x0, y0), (x1, y1) = SHIFT_POINTS
    return y0 + (tokens - x0) * (y1 - y0) / (x1 - x0)


def sigma_schedule(steps: int, tokens: int) -> Tensor:
    """Noise levels of LTX-2.3, from 1 down to 0: (steps + 1,). `tokens` is N of the video; the reference does not
    count.

    s = linspace(1, 0), shifted to sigma = e^mu / (e^mu + 1/s - 1), then stretched so that the last sigma before 0 is
    0.1.
    """
    # In float64, and in terms of 1 - sigma: for long videos every sigma rounds to 1 in float32, and stretching would
    # divide 0 by 0.
    odds = 1 / torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1] - 1  # (steps,)
    signal = odds / (1 + odds * math.exp(-schedule_shift(tokens)))  # (1 - sigma) e^mu; stretching removes the factor
    if steps > 1:  # a single step starts at 1 and has nothing to stretch
        signal = signal * (1 - LAST_SIGMA) / signal[-1]
    return torch.cat([1 - signal, torch.zeros(1)]).float()


def stream_weights(s_y: float, s_r: float, with_reference: bool = True) -> tuple[float, float, float]:
    """Weights of v_0, v_y and v_yr in Eq. 13. Without a reference, s_r counts as 0."""
    s_r = s_r if with_reference else 0.0
    return 1 - s_y, s_y - s_r, s_r


def three_stream_cfg(v_0: Tensor, v_y: Tensor, v_yr: Tensor, s_y: float = S_Y, s_r: float = S_R) -> Tensor:
    """Eq. 13: v_cfg = v_0 + s_y (v_y - v_0) + s_r (v_yr - v_y)
                    = (1 - s_y) v_0 + (s_y - s_r) v_y + s_r v_yr

    v_0 has the negative prompt (the paper says "unconditional"; ours is empty by default), v_y the prompt, v_yr prompt
    and reference, each (B, N, C). s_y is the strength of the text, s_r that of the reference. A stream of weight zero
    cancels, so its tensor may be zeros.
    """
    return v_0 + s_y * (v_y - v_0) + s_r * (v_yr - v_y)


@torch.no_grad()
def sample_latents(
    model: Callable[..., Tensor],
    noise: Tensor,
    sigmas: Tensor,
    positions: Tensor,
    context: Tensor,
    null_context: Tensor,
    z_ref: Tensor | None = None,
    ref_positions: RefPositions | None = None,
    s_y: float = S_Y,
    s_r: float = S_R,
    ref_timestep: str = "clean",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[Iterable], Iterable] = iter,
    ranks: tuple[int, int] = (0, 1),
    guidance_interval: Sequence[float] | None = None,
    new_cache: Callable[[], Callable[..., Tensor]] | None = None,
) -> Tensor:
    """Euler steps along v_cfg (Eq. 13) from noise (B, N, C) to z_0 (B, N, C); sums are float32.

    model              an LTXVideo, or a function with its signature, run in `dtype`
    sigmas             (steps + 1,); positions (B, 3, N, 2) of the video
    context            (B, S, D) of the prompt; null_context (B, S, D) of the negative prompt
    z_ref              (B, R, C) with ref_positions; None: plain text-to-video
    progress           wraps the loop over steps
    ranks              (rank, world) of this process in the default group, whose processes share the streams; every
                       process returns z_0
    guidance_interval  (low, high): at noise levels outside it a step computes one stream, v_yr, or v_y where s_r is 0
    new_cache          makes the `cache` of a stream (LTXVideo.forward); each stream then runs by itself
    """
    batch, n_video, _ = noise.shape
    rank, world = ranks
    s_r = s_r if z_ref is not None else 0.0

    # --- streams 0, 1, 2 (v_0, v_y, v_yr) in groups [[0, 1], [2]]. The two without reference have equal lengths, so
    # they run as one batch. With a step cache, or more processes than groups, each stream is a group: [[0], [1], [2]].
    inside, outside = (s_y, s_r), (1.0, float(s_r != 0))  # scales where guidance is on and off
    used = [k for k in range(3) if stream_weights(*inside)[k] or stream_weights(*outside)[k]]
    groups = [group for group in ([k for k in used if k < 2], [k for k in used if k == 2]) if group]
    if world > len(groups) or new_cache:
        groups = [[k] for k in used]
    contexts = null_context, context, context
    constants_of: dict[tuple[int, ...], Constants] = {}  # by the streams of a group, such as (0, 1)
    cache_of = defaultdict(new_cache)  # by the stream, such as (2,)

    def velocities(z: Tensor, sigma: Tensor, group: list[int]) -> Tensor:
        """The velocities of a group of n streams: z (B, N, C) -> (n, B, N, C)."""
        n = len(group)
        t = sigma.expand(n * batch)  # (n B,)
        tokens = video_tokens(z.to(dtype).repeat(n, 1, 1), t, positions.repeat(n, 1, 1, 1))  # latents (n B, N, C)
        if group == [2]:
            tokens = append_reference(tokens.latents, z_ref, t, tokens.positions, ref_positions, ref_timestep)
        stream_context = torch.cat([contexts[k] for k in group]).to(dtype)  # (n B, S, D)
        key, extra = tuple(group), {}
        if tokens.phase is not None:
            extra["phase"] = tokens.phase
        if hasattr(model, "constants"):  # a plain function has none; in an LTXVideo they are the same in all steps
            if key not in constants_of:
                constants_of[key] = model.constants(tokens.timesteps, tokens.positions, tokens.phase, dtype)
            extra["constants"] = constants_of[key]
        if new_cache:
            extra["cache"] = cache_of[key]
        v = model(tokens.latents, tokens.timesteps, t, stream_context, tokens.positions, **extra)  # (n B, L, C)
        return v[:, :n_video].float().unflatten(0, (n, batch))  # the output for the reference is dropped (Sec. 3.1)

    # --- Euler steps
    z = noise.float()
    low, high = guidance_interval or (0, 1)
    for step in progress(range(len(sigmas) - 1)):
        sigma, sigma_next = sigmas[step].to(z.device), sigmas[step + 1].to(z.device)
        scales = inside if low <= sigmas[step] <= high else outside
        v = z.new_zeros(3, *z.shape)  # (3, B, N, C); a stream of weight zero stays zero
        for group in groups[rank::world]:
            active = [k for k in group if stream_weights(*scales)[k]]
            if active:
                v[active] = velocities(z, sigma, active)
        if world > 1:
            dist.all_reduce(v)  # each stream is zero on all processes but one, so the sum is exact
        z = z + three_stream_cfg(*v, *scales) * (sigma_next - sigma)
    return z


def generate(
    model: nn.Module,
    vae: nn.Module,
    context: Tensor,
    null_context: Tensor,
    ref_image: Tensor | None,
    *,
    seed: int = 0,
    **options,
) -> Tensor | None:
    """`generate_batch` for one seed -> (3, F, H, W), or None on ranks above 0. ref_image (3, H, W), or None for
    text-to-video."""
    ref_images = None if ref_image is None else ref_image[None]
    videos = generate_batch(model, vae, context, null_context, ref_images, seeds=[seed], **options)
    return None if videos is None else videos[0]


@torch.no_grad()
def generate_batch(
    model: nn.Module,
    vae: nn.Module,
    context: Tensor,
    null_context: Tensor,
    ref_images: Tensor | None,
    *,
    seeds: Sequence[int],
    frames: int,
    height: int,
    width: int,
    fps: float,
    steps: int = STEPS,
    reference: ReferenceSettings | None = None,
    sigmas: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    ranks: tuple[int, int] = (0, 1),
    **options,
) -> Tensor | None:
    """B videos (B, 3, F, H, W), roughly in [-1, 1]. Each shows the face of its reference and follows its context.

    ref_images (B, 3, H, W) in [-1, 1], fitted to the video's size, or None for text-to-video; context (B, S, D),
    null_context (1, S, D); sizes in pixels. `reference` sets placement and timestep (None: the defaults); its `fit`
    is the caller's work. `sigmas` replace the schedule of `steps`. `dtype` is that of the DiT's computation (None: of
    its weights). `options` go to `sample_latents`. Noise is drawn on the CPU, for each video from its own seed: one
    seed gives the same noise on any device. Rank 0 decodes and returns the videos; other ranks return None.
    """
    # --- positions and reference
    reference = reference or ReferenceSettings()
    like = vae.decoder.conv_in.conv.weight  # any weight of the VAE: device and dtype
    cell_frames, cell_height, cell_width = vae.scale
    if (frames - 1) % cell_frames or height % cell_height or width % cell_width:
        raise ValueError(f"{frames} frames of {width}x{height} do not fill cells of {vae.scale} frames and pixels")
    dtype, batch = dtype or next(model.parameters()).dtype, len(seeds)
    grid = ((frames - 1) // cell_frames + 1, height // cell_height, width // cell_width)  # (T, h, w)
    positions = video_positions(*grid, fps, vae.scale).expand(batch, -1, -1, -1).to(like.device)  # (B, 3, N, 2)
    z_ref = ref_positions = None
    if ref_images is not None:
        z_ref = to_tokens(vae.encode(ref_images[:, :, None].to(like)))  # Eq. 1 of a video of one frame: (B, R, C)
        ref_positions = place_reference(grid, fps, vae.scale, reference)
        ref_positions = ref_positions._replace(positions=ref_positions.positions.to(like.device))  # once, not each step

    # --- noise, steps
    shape = 1, math.prod(grid), model.proj_out.out_features  # (1, N, C)
    noise = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    z_0 = sample_latents(
        model,
        torch.cat(noise).to(like.device),
        sigma_schedule(steps, math.prod(grid)) if sigmas is None else torch.tensor(sigmas),
        positions,
        context,
        null_context.expand(batch, -1, -1),
        z_ref,
        ref_positions,
        ref_timestep=reference.timestep,
        dtype=dtype,
        ranks=ranks,
        **options,
    )

    # --- decode
    if ranks[0]:
        return None
    return vae.decode(from_tokens(z_0, grid).to(like), CHUNK).float()  # D_vae, as in Eq. 7: (B, 3, F, H, W)

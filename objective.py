"""One training step's loss: Sec. 3.1 to 3.4 put together, for a batch whose samples each roll their own dice.

        cache     latents z_0, text features, reference photo, e_ref
        dice      t, eps, text dropped?, reference dropped?, which frames to look at         one seed per sample
                    |
        z_t = (1-t) z_0 + t eps  -- [z_t | z_ref] --> DiT --> v            L_flow             every sample
                    |                                          |
                  z_0^ = z_t - t v   (Eq. 6)  <----------------+
                    |  two latent frames and their neighbours
                  decode (7) -> detect -> align -> ArcFace (8)             L_id, L_tic        where w_aux(t) >= 1e-3

A sample's dice depend on the seed and on how many samples came before it, not on the rank or the batch it lands in.
So one process and many compute the same thing, and a resumed run continues as if it had not stopped.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from face import ArcFace, FaceDetector, embed
from losses import (
    add_noise,
    aux_weight,
    flow_loss,
    identity_loss,
    predict_x0,
    shifted_logit_normal,
    temporal_identity_loss,
    total_loss,
)
from rope import reference_phase, reference_positions, video_positions
from text import TextConnector, pad_features
from vae import VideoVAE, from_tokens, to_tokens


@dataclass(frozen=True)
class Dice:
    """What chance decides for one sample."""

    t: float  # noise level
    eps: Tensor  # (N, C) noise
    drop_text: bool
    drop_reference: bool
    window: int  # first latent frame that the identity losses look at


def roll(
    seed: int,
    count: int,
    tokens: int,
    channels: int,
    windows: int,
    p_text: float,
    p_reference: float,
    noise_tokens: int = 0,
) -> Dice:
    """The dice of the `count`-th sample of a run (Sec. 3.4: text and reference are dropped independently).

    `windows` is how many window positions there are. With noise_tokens above 0, t is drawn as for a video of so many
    tokens, whatever this one has. Every draw is made whatever its use, so that switching one component off in an
    ablation leaves the others' chances as they were.
    """
    state = np.random.SeedSequence([seed, count]).generate_state(1, np.uint64)
    generator = torch.Generator("cpu").manual_seed(int(state[0]) >> 1)
    t = shifted_logit_normal(1, noise_tokens or tokens, generator).item()
    drop_text, drop_reference, where = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    eps = torch.randn(tokens, channels, generator=generator)
    return Dice(t, eps, drop_text < p_text, drop_reference < p_reference, min(int(where * windows), windows - 1))


def decode_window(vae: VideoVAE, z_0: Tensor, start: int, length: int, context: int = 1) -> Tensor:
    """Eq. 7 for the pixel frames of latent frames [start, start + length): z_0 (B, C, T, h, w) -> (B, 3, F, H, W).

    The paper decodes a set of frames and does not say which. Here a window is decoded with `context` latent frames
    on either side where there are any, whose pixels are then cut off: the decoder looks both ways, and treats what
    it is given first as the clip's single-pixel-frame beginning.
    """
    assert context >= 1 or start == 0, "without context the window's first latent frame would give one pixel frame"
    frames, time = z_0.shape[2], vae.scale[0]
    low, high = max(0, start - context), min(frames, start + length + context)
    video = vae.decode(z_0[:, :, low:high])

    def first_pixel_frame(latent_frame: int) -> int:
        return max(0, time * (latent_frame - 1) + 1)

    return video[:, :, first_pixel_frame(start - low) : first_pixel_frame(start + length - low)]


def windows_at_once(
    scale: tuple[int, int, int], grid: tuple[int, int, int], length: int, device: torch.device | None = None
) -> int:
    """How many samples' windows of so many latent frames are decoded together: as many as have four million pixels
    between them, but one at least. So small videos do not go one by one, and large ones need no more memory than one.

    On a CPU it is one: its sums then come in the same order, to the bit, whichever samples a process has beside.
    """
    if device is not None and device.type == "cpu":
        return 1
    pixels = math.prod(scale) * min(length, grid[0]) * grid[1] * grid[2]
    return max(1, 2**22 // pixels)


def same_window(dice: list[Dice], numbers: list[int], most: int) -> Iterator[tuple[int, list[int]]]:
    """The samples of these numbers in groups of at most `most` that look at the same window, and which that is."""
    for window in sorted({dice[k].window for k in numbers}):
        alike = [k for k in numbers if dice[k].window == window]
        yield from ((window, alike[at : at + most]) for at in range(0, len(alike), most))


@dataclass
class Objective:
    """Eq. 11 over frozen parts. Call it with the DiT, a batch of data.collate, and one `Dice` per sample."""

    vae: VideoVAE
    connector: TextConnector
    null_features: Tensor  # (tokens, D) of the empty prompt, which stands for a dropped text
    slots: int  # length of the context
    fps: float
    detector: FaceDetector | None = None  # None: no identity losses
    arcface: ArcFace | None = None
    use_reference: bool = True
    placement: str = "tass"
    source_id: int = 2  # of placement "phase", and its scale
    phase_scale: float = 1.0
    ref_timestep: str = "clean"
    lambda_id: float = 0.1
    lambda_tic: float = 0.05
    gamma: float = 1.0
    window: int = 2  # latent frames that the identity losses look at
    window_context: int = 1  # latent frames decoded with them on either side
    min_weight: float = 1e-3  # below this w_aux the decode is not worth its time
    dtype: torch.dtype = torch.float32  # what the DiT is fed
    autocast: bool = False  # run a float32 DiT's matrix products in bf16

    def __call__(self, model: nn.Module, batch: dict[str, Any], dice: list[Dice]) -> dict[str, Tensor]:
        """Per sample, each (B,): loss, flow, id, tic, w_aux, t, faces (found), looked (frames looked at)."""
        device = self.vae.decoder.conv_in.conv.weight.device
        latents = batch["latents"].to(device)
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))  # (B, C, T, h, w)
        grid = tuple(latents.shape[2:])
        z_0 = to_tokens(latents)  # (B, N, C)
        t = torch.tensor([d.t for d in dice], device=device, dtype=torch.float32)
        eps = torch.stack([d.eps for d in dice]).to(z_0)
        z_t = add_noise(z_0, eps, t)

        has_reference = torch.tensor([self.use_reference and not d.drop_reference for d in dice], device=device)
        v = self.velocity(model, z_t, t, self.context(batch, dice), batch["references"], has_reference, grid)
        flow = flow_loss(v, z_0, eps)

        out = {"flow": flow, "w_aux": aux_weight(t, self.gamma), "t": t}
        out |= {key: torch.zeros_like(flow) for key in ("id", "tic", "faces", "looked")}
        if self.detector is not None:
            z_0_hat = from_tokens(predict_x0(z_t, v, t), grid)  # (B, C, T, h, w)
            looked_at = torch.nonzero(out["w_aux"] >= self.min_weight).flatten().tolist()
            most = windows_at_once(self.vae.scale, grid, self.window + 2 * self.window_context, device)
            for window, some in same_window(dice, looked_at, most):
                e_ref, at = torch.stack([batch["e_ref"][k] for k in some]), torch.tensor(some, device=device)
                for key, value in self.face_losses(z_0_hat[at], window, e_ref, has_reference[at]).items():
                    out[key] = out[key].index_put((at,), value.to(flow))
        out["loss"] = total_loss(flow, out["id"], out["tic"], t, self.lambda_id, self.lambda_tic, self.gamma)
        return out

    @torch.no_grad()
    def context(self, batch: dict[str, Any], dice: list[Dice]) -> Tensor:
        """Text features through the frozen connector, the empty prompt's where the text is dropped: (B, slots, D)"""
        weight = self.connector.connector.learnable_registers  # the projection is only for making a cache
        features = [self.null_features if d.drop_text else f for f, d in zip(batch["features"], dice)]
        padded, mask = pad_features(features, self.slots)
        padded, mask = padded.to(weight.device, weight.dtype), mask.to(weight.device)
        return self.connector.connector(padded, mask).to(self.dtype)

    def velocity(
        self,
        model: nn.Module,
        z_t: Tensor,
        t: Tensor,
        context: Tensor,
        references: Tensor,
        has_reference: Tensor,
        grid: tuple[int, int, int],
    ) -> Tensor:
        """The DiT's velocity of the video tokens (B, N, C), in one call for samples with and without reference.

        A dropped reference removes its tokens. In a batch that mixes both, nobody may look at the removed ones, which
        is the same thing; a single call matters because FSDP wants every rank to make as many.
        """
        batch, tokens, _ = z_t.shape
        positions = video_positions(*grid, self.fps, self.vae.scale).to(z_t.device)
        timesteps = t[:, None].expand(-1, tokens)
        mask, extra = None, {}
        if has_reference.any():
            with torch.no_grad():
                images = references.to(z_t.device, self.vae.decoder.conv_in.conv.weight.dtype)
                z_ref = to_tokens(self.vae.encode(images.unsqueeze(2)))  # Eq. 1, Eq. 5: (B, R, C)
            placed = reference_positions(*grid, self.fps, self.vae.scale, self.placement).to(z_t.device)
            source = reference_phase(self.placement, self.source_id, self.phase_scale)
            level = torch.zeros_like(t) if self.ref_timestep == "clean" else t
            z_t = torch.cat([z_t, z_ref.to(z_t)], dim=1)  # Eq. 2
            timesteps = torch.cat([timesteps, level[:, None].expand(-1, z_ref.shape[1])], dim=1)
            positions = torch.cat([positions, placed], dim=1)
            is_video = torch.arange(z_t.shape[1], device=z_t.device) < tokens  # (N + R,)
            if not has_reference.all():
                mask = is_video | has_reference[:, None]  # (B, N + R)
            if source:
                extra = {"phase": source * (~is_video).float().expand(batch, -1)}  # (B, N + R)
        positions = positions.expand(batch, -1, -1, -1)
        with torch.autocast(z_t.device.type, torch.bfloat16, enabled=self.autocast):
            return model(z_t.to(self.dtype), timesteps, t, context, positions, mask, **extra)[:, :tokens]

    def face_losses(self, z_0_hat: Tensor, window: int, e_ref: Tensor, has_reference: Tensor) -> dict[str, Tensor]:
        """Eq. 7 to 10 for clean estimates (n, C, T, h, w) looked at in the same window, each (n,): id is L_id, tic
        L_tic, faces how many frames had one, looked how many there were. e_ref (n, E), has_reference (n,).

        Where the reference was dropped, nothing says whose face it should be: L_id is left out, L_tic stays.
        """
        length = min(self.window, z_0_hat.shape[2])
        weight = self.vae.decoder.conv_in.conv.weight
        video = decode_window(self.vae, z_0_hat.to(weight.dtype), window, length, self.window_context)
        size = (video.shape[0], video.shape[2])  # (n, F)
        frames = video.transpose(1, 2).flatten(0, 1)  # (n F, 3, H, W)
        landmarks, _, valid = self.detector.detect(frames)
        e = embed(frames, landmarks, self.arcface).unflatten(0, size)  # (n, F, E)
        valid = valid.to(e.device).unflatten(0, size)
        return {
            "id": identity_loss(e, e_ref.to(e.device), valid & has_reference[:, None]),
            "tic": temporal_identity_loss(e, valid),
            "faces": valid.sum(1),
            "looked": torch.full_like(valid.sum(1), size[1]),
        }

"""One training step of ST-DRC: Sec. 3 put together, in six steps.

        Step 1   z_ref = E(A(I_ref))                                    the reference as latents     Eq. 1, 5
        Step 2   z_t = (1 - t) z_0 + t eps,  z~_t = [z_t, z_ref]        one sequence, placed         Eq. 2-4
        Step 3   v = DiT(z~_t, t, y)  ->  L_flow                        the velocity                 Sec. 3.3
        Step 4   z_0^ = z_t - t v                                       the clean estimate           Eq. 6
        Step 5   decode, detect, align, ArcFace  ->  L_id, L_tic        the faces in it              Eq. 7-10
        Step 6   L = L_flow + w_aux (lambda_id L_id + lambda_tic L_tic)                              Eq. 11-12

The frozen parts (VAE, text connector, detector, ArcFace) belong to the objective; the DiT is passed in, because DDP
and FSDP wrap it. The randomness of each sample comes from outside (`data.draw_sample`). It depends on the seed and the
number of the sample, not on the rank or the batch, so one process and many compute the same thing, and a resumed run
continues as if it had not stopped. The letters are those of model.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from config import Faces, ReferenceOptions
from data import Draws
from face import ArcFace, FaceDetector, embed
from losses import (
    add_noise,
    aux_weight,
    flow_loss,
    identity_loss,
    predict_x0,
    temporal_identity_loss,
    total_loss,
)
from model import Tokens, append_reference, video_tokens
from rope import place_reference, video_positions
from text import TextConnector, pad_features
from vae import VideoVAE, from_tokens, to_tokens

PIXELS_AT_ONCE = 2**22  # that the decoder works on at a time


@dataclass
class Objective:
    """The loss of a batch, over frozen parts. `detector` is None where the identity losses are off."""

    vae: VideoVAE
    connector: TextConnector
    null_features: Tensor  # (tokens, D) of the empty prompt, which replaces a dropped text
    slots: int  # S, the length of the context
    fps: float
    detector: FaceDetector | None = None
    arcface: ArcFace | None = None
    reference: ReferenceOptions = field(default_factory=ReferenceOptions)
    faces: Faces = field(default_factory=Faces)
    dtype: torch.dtype = torch.float32  # of the DiT's inputs
    autocast: bool = False  # matrix products of a float32 DiT in bf16

    def __call__(self, model: nn.Module, batch: dict[str, Any], draws: list[Draws]) -> dict[str, Tensor]:
        """Losses of a batch (`data.training_batches`), each (B,): loss, flow, id, tic, w_aux, t, and how many frames
        were decoded (frames) and showed a face (faces)."""
        weight, reference, faces = self.vae.decoder.conv_in.conv.weight, self.reference, self.faces
        device = weight.device

        # Step 1: the reference as latents. A, the augmentation, has been applied to ref_images by the data workers.
        has_reference = torch.tensor([reference.use and not draw.drop_ref for draw in draws], device=device)  # (B,)
        z_ref = self.encode(batch["ref_images"].to(weight)) if has_reference.any() else None  # E(A(I_ref)) (B, R, C)

        # Step 2: noise on the video, and one sequence of both. The reference stays clean.
        latents = batch["latents"].to(device)
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))  # (B, C, T, h, w)
        grid = tuple(latents.shape[2:])
        z_0 = to_tokens(latents)  # (B, N, C)
        t = torch.tensor([draw.t for draw in draws], device=device, dtype=torch.float32)  # (B,)
        eps = torch.stack([draw.eps for draw in draws]).to(z_0)  # (B, N, C)
        z_t = add_noise(z_0, eps, t)
        tokens = self.sequence(z_t, z_ref, t, has_reference, grid)

        # Step 3: the velocity of the video's tokens, in one call for samples with and without reference. FSDP needs
        # it so: every rank has to call the model equally often.
        context = self.context(batch["features"], draws)  # (B, S, D)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            v = model(tokens.latents.to(self.dtype), tokens.timesteps, t, context, *tokens[2:])
        v = v[:, : z_0.shape[1]]  # the output for the reference is dropped (Sec. 3.1)
        out = {"flow": flow_loss(v, z_0, eps), "t": t, "w_aux": aux_weight(t, faces.gamma)}
        out |= {key: torch.zeros_like(out["flow"]) for key in ("id", "tic", "faces", "frames")}

        if self.detector is not None:
            # Step 4: the clean estimate. At high noise it is a blur, so samples of small w_aux stop here.
            z_0_hat = from_tokens(predict_x0(z_t, v, t), grid)  # (B, C, T, h, w)
            reliable = torch.nonzero(out["w_aux"] >= faces.min_weight).flatten().tolist()

            # Step 5: the faces in a window of it. Samples with the same window are decoded together.
            most = windows_at_once(self.vae.scale, grid, faces.window + 2 * faces.context, device)
            for window, samples in same_window(draws, reliable, most):
                rows = torch.tensor(samples, device=device)
                e_ref = torch.stack([batch["e_ref"][k] for k in samples])  # (n, E)
                losses = self.face_losses(z_0_hat[rows], window, e_ref, has_reference[rows])
                for key, value in losses.items():
                    out[key] = out[key].index_put((rows,), value.to(out[key]))

        # Step 6: the sum.
        out["loss"] = total_loss(out["flow"], out["id"], out["tic"], t, faces.lambda_id, faces.lambda_tic, faces.gamma)
        return out

    @torch.no_grad()
    def encode(self, ref_images: Tensor) -> Tensor:
        """Eq. 1 without gradient: (B, 3, H, W) -> z_ref (B, R, C). An image is a video of one frame."""
        return to_tokens(self.vae.encode(ref_images.unsqueeze(2)))

    def sequence(
        self, z_t: Tensor, z_ref: Tensor | None, t: Tensor, has_reference: Tensor, grid: tuple[int, int, int]
    ) -> Tokens:
        """Eq. 2 to 4. Without a reference in the whole batch (z_ref None) the sequence is the video alone."""
        positions = video_positions(*grid, self.fps, self.vae.scale).to(z_t.device).expand(len(z_t), -1, -1, -1)
        if z_ref is None:
            return video_tokens(z_t, t, positions)
        place = place_reference(grid, self.fps, self.vae.scale, self.reference)
        place = place._replace(positions=place.positions.to(z_t.device))
        return append_reference(z_t, z_ref, t, positions, place, self.reference.timestep, has_reference)

    @torch.no_grad()
    def context(self, features: list[Tensor], draws: list[Draws]) -> Tensor:
        """Text features (tokens, D) of each sample through the frozen connector -> (B, S, D). A dropped text is the
        empty prompt."""
        weight = self.connector.connector.learnable_registers
        features = [self.null_features if draw.drop_text else row for row, draw in zip(features, draws)]
        padded, mask = pad_features(features, self.slots)
        padded, mask = padded.to(weight.device, weight.dtype), mask.to(weight.device)
        return self.connector.connector(padded, mask).to(self.dtype)

    def face_losses(self, z_0_hat: Tensor, window: int, e_ref: Tensor, has_reference: Tensor) -> dict[str, Tensor]:
        """Eq. 7 to 10 for clean estimates (n, C, T, h, w) with the same window, e_ref (n, E) -> each (n,).

        L_id ("id"), L_tic ("tic"), frames with a face ("faces"), frames decoded ("frames"). Where the reference is
        dropped (has_reference false), no identity is asked for: L_id is left out, L_tic stays.
        """
        weight, length = self.vae.decoder.conv_in.conv.weight, min(self.faces.window, z_0_hat.shape[2])
        video = decode_window(self.vae, z_0_hat.to(weight.dtype), window, length, self.faces.context)  # (n, 3, F, H, W)
        size = video.shape[0], video.shape[2]  # (n, F)
        frames = video.transpose(1, 2).flatten(0, 1)  # (n F, 3, H, W)
        landmarks, _, valid = self.detector.detect(frames)  # no gradient
        e = embed(frames, landmarks, self.arcface).unflatten(0, size)  # Eq. 8, with gradient: (n, F, E)
        valid = valid.to(e.device).unflatten(0, size)  # m_f of Eq. 9: (n, F)
        return {
            "id": identity_loss(e, e_ref.to(e.device), valid & has_reference[:, None]),
            "tic": temporal_identity_loss(e, valid),
            "faces": valid.sum(1),
            "frames": torch.full_like(valid.sum(1), size[1]),
        }


def decode_window(vae: VideoVAE, z_0: Tensor, start: int, length: int, context: int = 1) -> Tensor:
    """Eq. 7 for the pixel frames of latent frames [start, start + length): z_0 (B, C, T, h, w) -> (B, 3, F, H, W).

    The paper decodes a set of frames and does not say which. Here a window is decoded together with `context` latent
    frames on either side, whose pixels are then cut off: the decoder looks both ways, and it takes the first latent
    frame of its input for the single-pixel-frame beginning of a clip.
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
    """Number of samples whose windows of `length` latent frames are decoded together: within PIXELS_AT_ONCE, but at
    least one. So small videos share a call, and large ones need the memory of one sample.

    On a CPU it is one: the order of the sums is then the same, to the bit, whatever other samples a process has.
    """
    if device is not None and device.type == "cpu":
        return 1
    pixels = math.prod(scale) * min(length, grid[0]) * grid[1] * grid[2]
    return max(1, PIXELS_AT_ONCE // pixels)


def same_window(draws: list[Draws], samples: list[int], most: int) -> Iterator[tuple[int, list[int]]]:
    """Groups of at most `most` samples that share a window, as (window, samples)."""
    for window in sorted({draws[k].window for k in samples}):
        alike = [k for k in samples if draws[k].window == window]
        yield from ((window, alike[k : k + most]) for k in range(0, len(alike), most))

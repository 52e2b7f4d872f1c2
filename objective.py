"""One training step of ST-DRC: the loss of Sec. 3, in six steps.

        Step 1   z_ref = E_vae(A(I_ref))                                the reference as latents      Eq. 1, 5
        Step 2   z_t = (1 - t) z_0 + t eps,  z~_t = [z_t, z_ref]        one sequence, with positions  Eq. 2-4
        Step 3   v = DiT(z~_t, t, y)  ->  L_flow                        the velocity                  Sec. 3.3
        Step 4   z_0_hat = z_t - t v                                    the clean estimate            Eq. 6
        Step 5   decode, detect, align, ArcFace  ->  L_id, L_tic        the faces in it               Eq. 7-10
        Step 6   L = L_flow + w_aux (lambda_id L_id + lambda_tic L_tic)                               Eq. 11-12

The frozen parts (VAE, text connector, detector, ArcFace) belong to the objective. The caller passes the DiT, which DDP
or FSDP may wrap. `data.draw_sample` draws t, eps, drops and window from the seed and the number of the sample,
`data.sample_rng` the augmentation, so one process and many draw the same, and a resumed run draws what the unbroken run
draws. The letters are those of model.py.
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
from losses import add_noise, aux_weight, flow_loss, identity_loss, predict_x0, temporal_identity_loss, total_loss
from model import Tokens, append_reference, video_tokens
from rope import place_reference, video_positions
from text import TextConnector, pad_features
from vae import VideoVAE, from_tokens, to_tokens

PIXELS_AT_ONCE = 2**22  # of one call of the decoder, over all its samples; a larger window is decoded alone


@dataclass
class Objective:
    """Computes the loss of each sample; train.py averages. `detector` is None where the identity losses are off."""

    vae: VideoVAE
    connector: TextConnector
    null_features: Tensor  # (tokens, D) of the empty prompt; they replace those of a dropped prompt
    slots: int  # S, the length of the context
    fps: float
    detector: FaceDetector | None = None
    arcface: ArcFace | None = None
    reference: ReferenceOptions = field(default_factory=ReferenceOptions)
    faces: Faces = field(default_factory=Faces)
    dtype: torch.dtype = torch.float32  # of the DiT's inputs
    autocast: bool = False  # matrix products of a float32 DiT in bf16

    def __call__(self, model: nn.Module, batch: dict[str, Any], draws: list[Draws]) -> dict[str, Tensor]:
        """The values of a batch (`data.training_batches`), each (B,): loss, flow, id, tic, w_aux, t, reference (1
        where it is used), frames (number of frames in the window) and faces (number of those with a face)."""
        like, options = self.vae.decoder.conv_in.conv.weight, self.faces
        device = like.device  # `like` is any weight of the VAE and gives device and dtype

        # Step 1: the reference as latents. The data workers have applied A (data.augment_reference) and the fit.
        # If any sample of the batch has a reference, all photos are encoded. Step 2 masks those that are dropped.
        with_ref = [self.reference.use and not draw.drop_ref for draw in draws]
        has_reference = torch.tensor(with_ref, device=device)  # (B,)
        z_ref = self.encode(batch["ref_images"].to(like)) if any(with_ref) else None  # E_vae(A(I_ref)) (B, R, C)

        # Step 2: add noise to the video, then append the reference. The reference gets no noise.
        latents = batch["latents"].to(device)
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))  # bf16 would round eps. (B, C, T, h, w)
        grid = tuple(latents.shape[2:])  # (T, h, w)
        z_0 = to_tokens(latents)  # (B, N, C)
        t = torch.tensor([draw.t for draw in draws], device=device, dtype=torch.float32)  # (B,)
        eps = torch.stack([draw.eps for draw in draws]).to(z_0)  # (B, N, C)
        z_t = add_noise(z_0, eps, t)  # (B, N, C)
        mask = None if all(with_ref) else has_reference
        tokens = self.sequence(z_t, z_ref, t, mask, grid)  # L = N [+ R] tokens

        # Step 3: the velocity of the video's tokens. Under FSDP every rank must call the model equally often, so
        # samples with and without reference share one call.
        context = self.encode_text(batch["features"], draws)  # (B, S, D)
        inputs = (tokens.latents.to(self.dtype), tokens.timesteps, t, context, tokens.positions)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            v = model(*inputs, tokens.mask, tokens.phase)  # (B, L, C)
        v = v[:, : z_0.shape[1]]  # the output for the reference is dropped (Sec. 3.1): (B, N, C)
        out = {"flow": flow_loss(v, z_0, eps), "t": t, "w_aux": aux_weight(t, options.gamma)}
        out["reference"] = has_reference.float()
        zeros = torch.zeros_like(out["flow"])
        out |= dict.fromkeys(("id", "tic", "faces", "frames"), zeros)

        if self.detector is not None:
            # Step 4: the clean estimate. At high noise it is a blur: samples with w_aux below faces.min_weight skip
            # Step 5.
            z_0_hat = from_tokens(predict_x0(z_t, v, t), grid)  # (B, N, C) -> (B, C, T, h, w)
            reliable = torch.nonzero(out["w_aux"] >= options.min_weight).flatten().tolist()

            # Step 5: the faces in a window of the estimate. Samples with the same window are decoded together.
            most = windows_at_once(self.vae.scale, grid, options.window + 2 * options.margin, device)
            for start, samples in same_window(draws, reliable, most):
                index = torch.tensor(samples, device=device)
                e_ref = batch["e_ref"][samples]  # of the unaugmented photo: (n, E)
                values = self.face_losses(z_0_hat[index], start, e_ref, has_reference[index])
                for key, value in values.items():
                    out[key] = out[key].index_put((index,), value.to(zeros))

        # Step 6: the sum.
        losses = out["flow"], out["id"], out["tic"]
        out["loss"] = total_loss(*losses, t, options.lambda_id, options.lambda_tic, options.gamma)
        return out

    @torch.no_grad()
    def encode(self, ref_images: Tensor) -> Tensor:
        """Eq. 1 without gradient: (B, 3, H, W) -> z_ref (B, R, C). An image is a video of one frame."""
        return to_tokens(self.vae.encode(ref_images.unsqueeze(2)))

    def sequence(
        self, z_t: Tensor, z_ref: Tensor | None, t: Tensor, has_reference: Tensor | None, grid: tuple[int, int, int]
    ) -> Tokens:
        """Eq. 2 to 4. If no sample has a reference (z_ref is None), the sequence is the video alone."""
        positions = video_positions(*grid, self.fps, self.vae.scale).to(z_t.device)  # Eq. 3
        positions = positions.expand(len(z_t), -1, -1, -1)  # (B, 3, N, 2)
        if z_ref is None:
            return video_tokens(z_t, t, positions)
        ref_positions = place_reference(grid, self.fps, self.vae.scale, self.reference)  # Eq. 4
        return append_reference(z_t, z_ref, t, positions, ref_positions, self.reference.timestep, has_reference)

    @torch.no_grad()
    def encode_text(self, features: list[Tensor], draws: list[Draws]) -> Tensor:
        """Text features (tokens, D) of each sample through the frozen connector -> context (B, S, D). A dropped prompt
        is replaced by the empty prompt."""
        like = self.connector.connector.learnable_registers  # any weight of it: device and dtype
        features = [self.null_features if draw.drop_text else prompt for prompt, draw in zip(features, draws)]
        padded, mask = pad_features(features, self.slots)  # (B, S, D), (B, S)
        padded, mask = padded.to(like.device, like.dtype), mask.to(like.device)
        return self.connector.connector(padded, mask).to(self.dtype)

    def face_losses(self, z_0_hat: Tensor, start: int, e_ref: Tensor, has_reference: Tensor) -> dict[str, Tensor]:
        """Eq. 7 to 10 for n clean estimates (n, C, T, h, w) with the same window, which begins at latent frame `start`.

        e_ref (n, E). Returns four tensors (n,): L_id ("id"), L_tic ("tic"), frames of the window ("frames"), those with
        a face ("faces"). For a sample without reference L_id is 0; L_tic is computed as usual.
        """
        like, length = self.vae.decoder.conv_in.conv.weight, min(self.faces.window, z_0_hat.shape[2])
        video = decode_window(self.vae, z_0_hat.to(like.dtype), start, length, self.faces.margin)  # (n, 3, F, H, W)
        size = video.shape[0], video.shape[2]  # (n, F)
        images = video.transpose(1, 2).flatten(0, 1)  # (n F, 3, H, W)
        landmarks, _, valid = self.detector.detect(images)  # no gradient: (n F, 5, 2), (n F,)
        e = embed(images, landmarks, self.arcface).unflatten(0, size)  # Eq. 8, with gradient: (n, F, E)
        valid = valid.to(e.device).unflatten(0, size)  # m_f of Eq. 9: (n, F)
        return {
            "id": identity_loss(e, e_ref.to(e.device), valid & has_reference[:, None]),
            "tic": temporal_identity_loss(e, valid),
            "faces": valid.sum(1),
            "frames": torch.full_like(valid.sum(1), size[1]),
        }


def decode_window(vae: VideoVAE, z_0_hat: Tensor, start: int, length: int, margin: int = 1) -> Tensor:
    """Eq. 7 for the pixel frames of latent frames [start, start + length): (B, C, T, h, w) -> (B, 3, F, H, W).

    The VAE is frozen, and the gradient passes through it to z_0_hat. The paper decodes a set of frames and does not say
    which. Here a window is decoded with `margin` latent frames on each side, and their pixels are cut off. There are
    two reasons. The decoder looks both ways. And it decodes its first latent frame to one pixel frame, as at the start
    of a clip. A margin of one frame is an approximation: the released decoder sees 14 on each side (vae.py).
    """
    assert margin >= 1 or start == 0, "without a margin the window's first latent frame would give one pixel frame"
    frames, time = z_0_hat.shape[2], vae.scale[0]
    low, high = max(0, start - margin), min(frames, start + length + margin)
    video = vae.decode(z_0_hat[:, :, low:high])

    def first_pixel_frame(latent_frame: int) -> int:
        return max(0, time * (latent_frame - 1) + 1)

    return video[:, :, first_pixel_frame(start - low) : first_pixel_frame(start + length - low)]


def windows_at_once(
    scale: tuple[int, int, int], grid: tuple[int, int, int], length: int, device: torch.device | None = None
) -> int:
    """The number of windows of `length` latent frames decoded in one call: as many as fit into PIXELS_AT_ONCE, at least
    one. On a CPU always one, so the order of the sums does not depend on the other samples."""
    if device is not None and device.type == "cpu":
        return 1
    pixels = math.prod(scale) * min(length, grid[0]) * grid[1] * grid[2]
    return max(1, PIXELS_AT_ONCE // pixels)


def same_window(draws: list[Draws], samples: list[int], most: int) -> Iterator[tuple[int, list[int]]]:
    """Groups of at most `most` samples whose windows start at the same latent frame, as (start, samples)."""
    for start in sorted({draws[k].window_start for k in samples}):
        group = [k for k in samples if draws[k].window_start == start]
        yield from ((start, group[k : k + most]) for k in range(0, len(group), most))

"""The tiny VAE: pixels of the drawn world to 128 channels per cell of 4 frames x 16 x 16 pixels, and back.

Layout and code are those of the released VAE. The training is simpler, so that a CPU needs less than an hour: the best
*linear* code is known in closed form, the network is initialized with it, and only the decoder is trained.

    1. principal components of small and large cells of many clips        (covariances)
    2. encoder: the components of the large cells                         (its layers set one after the other, linear)
    3. decoder: the best linear inverse                                   (least squares, layer by layer)
    4. training of the decoder                                            latents + noise --> clip (L1)

The spread of a principal component says how much it matters for the picture. With every component divided by its own
spread, the DiT would spend most of its capacity on components that matter least. With none divided, the strongest is a
hundred times the weakest, and noise hides the eyes of a face. So each is divided by the root of its spread. The
statistics in the checkpoint have one spread for all channels, which keeps these proportions.

    python -m toy.vae --out runs/toy/vae.safetensors
"""

import argparse
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import write_modules
from common.errors import Parser, one_line_errors, whole_file
from common.media import from_bytes, to_uint8
from toy.world import toy_clip
from vae import Conv3d, ResStack, VideoVAE, pixel_norm, space_to_depth

CHANNELS = 128
CONFIG = {
    "patch_size": 8,
    "latent_channels": CHANNELS,
    "encoder_base_channels": 40,
    "decoder_base_channels": 64,
    "encoder_blocks": [
        ["compress_space_res", {"multiplier": 4}],
        ["compress_time_res", {"multiplier": 1}],
        ["compress_time_res", {"multiplier": 1}],
    ],
    "decoder_blocks": [  # from the pixels to the latents, as in the released config
        ["res_x", {"num_layers": 3}],
        ["compress_time", {"multiplier": 1}],
        ["compress_space", {"multiplier": 2}],
        ["compress_time", {"multiplier": 1}],
    ],
}
SIZE, FPS, FRAMES = 64, 12.0, 17
CELL = 4, 16  # frames and pixels to a side
OFFSET = 6.0, 3.0  # encoder, decoder: added to the input of the last PixelNorm and SiLU, in units of its spread.
# Far from zero both are nearly linear. Decoded from the encoder's: 24.6 dB with 3, 25.3 with 6, 25.7 without them.
FACE = 4.0  # extra weight of a pixel at an eye, the nose or the mouth
SPREAD = 4.0  # pixels from a landmark at which the extra weight is 0.6 of FACE
NOISE = 0.1  # in the latents of step 4, because a DiT's latents are inexact


def face_weight(points: np.ndarray, size: int) -> np.ndarray:
    """Weight of each pixel: landmarks (F, 5, 2) -> (F, size, size), 1 far from all landmarks."""
    y, x = np.mgrid[:size, :size]
    distance = (x - points[..., 0, None, None]) ** 2 + (y - points[..., 1, None, None]) ** 2  # (F, 5, size, size)
    return 1 + FACE * np.exp(-distance / (2 * SPREAD**2)).max(1)


def draw_clips(seed: int, count: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """Clips as bytes (count, 3, F, H, W), and the weights of their pixels in half precision (count, 1, F, H, W)."""
    video = torch.empty(count, 3, FRAMES, SIZE, SIZE, dtype=torch.uint8)
    weight = torch.empty(count, 1, FRAMES, SIZE, SIZE, dtype=torch.float16)
    for k in tqdm(range(count), "drawing", unit="clip", leave=False):
        clip = toy_clip(seed, k, FRAMES, SIZE, FPS, split)
        video[k] = torch.from_numpy(clip["frames"]).permute(3, 0, 1, 2)
        weight[k, 0] = torch.from_numpy(face_weight(clip["landmarks"], SIZE))
    return video, weight


def to_float(video: Tensor, device: torch.device) -> Tensor:
    return from_bytes(video.to(device))


def first_repeated(x: Tensor, time: int) -> Tensor:
    """(B, C, F, H, W) -> (B, C, F + time - 1, H, W): the first frame alone fills a cell."""
    return torch.cat([x[:, :, :1].expand(-1, -1, time - 1, -1, -1), x], 2)


def cells(video: Tensor, time: int, side: int) -> Tensor:
    """(B, C, F, H, W) -> (B, f, h, w, C * time * side * side)"""
    return space_to_depth(first_repeated(video, time), (time, side, side)).permute(0, 2, 3, 4, 1)


def mean_and_covariance(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weighted mean (P,) and covariance (P, P) of vectors (n, P) with weights (n, 1)."""
    total, mean, square = 0.0, 0.0, 0.0
    for x, count in parts:
        total, mean, square = total + count.sum(), mean + (count * x).sum(0), square + (count * x).T @ x
    mean = mean / total
    return mean, square / total - mean[:, None] * mean


class Components:
    """The `count` strongest principal components of cells of time x side x side pixels, weighted by pixel."""

    def __init__(self, video: Tensor, weight: Tensor, time: int, side: int, count: int, device: torch.device):
        def parts() -> Iterable[tuple[Tensor, Tensor]]:
            for part, counts in zip(video.split(50), weight.split(50)):
                yield (
                    cells(to_float(part, device), time, side).flatten(0, 3),
                    cells(counts.to(device).float(), time, side).flatten(0, 3).mean(1, keepdim=True),
                )

        self.time, self.side = time, side
        self.mean, covariance = mean_and_covariance(parts())
        self.basis = torch.linalg.eigh(covariance)[1][:, -count:].flip(1)  # (P, count)

    def of(self, video: Tensor) -> Tensor:
        """(B, 3, F, H, W) -> (B, count, f, h, w)"""
        return ((cells(video, self.time, self.side) - self.mean) @ self.basis).permute(0, 4, 1, 2, 3)


@torch.no_grad()
def fit(conv: Conv3d, inputs: Tensor, targets: Tensor, ridge: float = 1e-4) -> None:
    """Set the kernel by least squares, from `inputs` (B, C, F, H, W) and `targets` (B, C', F, H, W)."""
    gram, product = 0.0, 0.0
    for x, y in zip(inputs.split(20), targets.split(20)):
        first, last = x[:, :, :1], x[:, :, -1:]
        x = torch.cat([first, first, x] if conv.causal else [first, x, last], 2)
        x = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)  # (B, C, F, H, W, 3, 3, 3)
        x = x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3)  # (n, C * 27)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        gram, product = gram + x.T @ x, product + x.T @ y.permute(0, 2, 3, 4, 1).flatten(0, 3)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, product)
    conv.conv.weight.copy_(solution[:-1].T.view_as(conv.conv.weight))
    conv.conv.bias.copy_(solution[-1])


def halve_time(x: Tensor, weight: Tensor) -> Tensor:
    """`compress_time_res` on (..., frames, C), with a kernel that is `weight` (C / 2, C) at one frame and else zero."""
    pairs = x.unflatten(-2, (-1, 2))  # (..., pairs, 2, C)
    skip = pairs.transpose(-1, -2).flatten(-2).unflatten(-1, (x.shape[-1], 2)).mean(-1)
    return (pairs @ weight.T).transpose(-1, -2).flatten(-2) + skip


def keep_most(covariance: Tensor, frames: int, steps: int = 300) -> list[Tensor]:
    """Kernels of two `compress_time_res` that lose the least of `frames` frames with this covariance.

    Descent on the variance that no linear map can recover. It needs the covariance, not the clips.
    """
    channels = len(covariance) // frames
    everything = torch.eye(len(covariance)).to(covariance).unflatten(1, (frames, channels))
    single = covariance.unflatten(0, (frames, -1)).unflatten(2, (frames, -1)).diagonal(0, 0, 2).sum(-1)
    start = torch.linalg.eigh(single)[1].flip(1)[:, : channels // 2].T
    kernels = [nn.Parameter(start.clone()), nn.Parameter(torch.randn_like(start) / channels**0.5)]
    optimizer = torch.optim.Adam(kernels, 0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        kept = halve_time(halve_time(everything, kernels[0]), kernels[1]).flatten(1)  # (frames * C, C)
        inner, product = kept.T @ covariance @ kept, covariance @ kept
        inner = inner + 1e-4 * inner.diagonal().mean() * torch.eye(channels).to(inner)
        lost = covariance.trace() - (torch.linalg.solve(inner, product.T) * product.T).sum()
        optimizer.zero_grad()
        lost.backward()
        optimizer.step()
        schedule.step()
    return [kernel.detach() for kernel in kernels]


def cosines(count: int) -> Tensor:
    """(count - 1, count): orthonormal rows that sum to zero; the squares of each column have about equal sums."""
    place = (torch.arange(count) + 0.5) / count
    return (torch.arange(1, count)[:, None] * math.pi * place).cos() * (2 / count) ** 0.5


def batched(function, video: Tensor, device: torch.device) -> Tensor:
    """`function` of all clips, in batches."""
    return torch.cat([function(to_float(part, device)) for part in video.split(20)])


@torch.no_grad()
def set_encoder(vae: VideoVAE, video: Tensor, weight: Tensor) -> None:
    """Steps 1 and 2: the encoder as a nearly linear map to the principal components."""
    device, encoder = vae.encoder.conv_in.conv.weight.device, vae.encoder
    for module in encoder.modules():
        if isinstance(module, Conv3d):
            nn.init.zeros_(module.conv.weight)
            nn.init.zeros_(module.conv.bias)
    small = Components(video, weight, 1, encoder.patch, len(encoder.conv_in.conv.weight), device)
    across = small.basis.view(3, encoder.patch, encoder.patch, -1).transpose(1, 2).flatten(0, 2)  # a patch's layout
    encoder.conv_in.conv.weight[:, :, 2, 1, 1] = across.T
    encoder.conv_in.conv.bias.copy_(-small.mean @ small.basis)
    space, *times = encoder.down_blocks

    def parts() -> Iterable[tuple[Tensor, Tensor]]:
        for part, counts in zip(video.split(50), weight.split(50)):
            frames = first_repeated(space(encoder.conv_in(encoder.patches(to_float(part, device)))), CELL[0])
            yield (
                frames.unflatten(2, (-1, CELL[0])).permute(0, 2, 4, 5, 3, 1).flatten(4).flatten(0, 3),
                cells(counts.to(device).float(), *CELL).flatten(0, 3).mean(1, keepdim=True),
            )

    covariance = mean_and_covariance(parts())[1]
    with torch.enable_grad():
        kernels = keep_most(covariance, CELL[0])
    for block, kernel in zip(times, kernels):
        block.conv.conv.weight[:, :, 2, 1, 1] = kernel

    def before_out(clip: Tensor) -> Tensor:
        x = encoder.conv_in(encoder.patches(clip))
        for block in encoder.down_blocks:
            x = block(x)
        return x

    times[-1].conv.conv.bias.fill_(OFFSET[0] * batched(before_out, video[:100], device).std())
    large = Components(video, weight, *CELL, CHANNELS, device)
    target = batched(large.of, video, device)
    target = target / target.square().mean((0, 2, 3, 4), keepdim=True) ** 0.25
    target = F.pad(
        target / target.square().mean().sqrt(), (0, 0, 0, 0, 0, 0, 0, 1)
    )  # the last channel is the unused log-variance
    fit(encoder.conv_out, F.silu(pixel_norm(batched(before_out, video, device))), target)
    for parameter in encoder.parameters():  # as stored, since statistics and decoder depend on it
        parameter.copy_(parameter.bfloat16())


@torch.no_grad()
def set_decoder(vae: VideoVAE, video: Tensor, weight: Tensor) -> None:
    """Step 3: residual blocks add zero, and every other layer is the best linear map at its place."""
    device, decoder = vae.encoder.conv_in.conv.weight.device, vae.decoder
    nn.init.dirac_(decoder.conv_in.conv.weight)
    nn.init.zeros_(decoder.conv_in.conv.bias)
    x = batched(lambda clip: decoder.conv_in(vae.encoder(clip)), video, device)
    time, side = CELL
    for block in decoder.up_blocks:
        if isinstance(block, ResStack):
            for layer in block.res_blocks:
                nn.init.kaiming_normal_(layer.conv1.conv.weight)
                nn.init.zeros_(layer.conv2.conv.weight)
                nn.init.zeros_(layer.conv2.conv.bias)
            continue
        time, side = time // block.stride[0], side // block.stride[1]
        count = len(block.conv.conv.bias) // math.prod(block.stride)
        target = batched(Components(video, weight, time, side, count, device).of, video, device)
        last = (time, side) == (1, decoder.patch)
        if last:  # its norm must not follow the brightness, the first component: spread it over all channels
            target = torch.einsum("bkfhw,kc->bcfhw", target[:, :-1], cosines(count).to(target))
        target = target / target.square().mean().sqrt()
        fit(block.conv, x, space_to_depth(first_repeated(target, block.stride[0]), block.stride))
        if last:
            block.conv.conv.bias += OFFSET[1]
        x = torch.cat([block(part) for part in x.split(20)])
    target = batched(vae.encoder.patches, video, device)
    fit(decoder.conv_out, F.silu(pixel_norm(x)), target)


def optimize(module: nn.Module, loss, steps: int, lr: float, title: str, report=lambda step: None) -> None:
    """AdamW on `loss()`. The learning rate rises linearly and falls as a cosine."""
    optimizer = torch.optim.AdamW(module.parameters(), lr, betas=(0.9, 0.98), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    bar = tqdm(range(steps), title, unit="step", mininterval=10)
    for step in bar:
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {value.item():.4f}", refresh=False)
        report(step + 1)


@torch.no_grad()
def set_statistics(vae: VideoVAE, video: Tensor) -> None:
    """The mean of each channel, and one spread of all channels together."""
    raw = batched(vae.encode, video, vae.encoder.conv_in.conv.weight.device)  # with statistics 0 and 1
    raw = raw.transpose(0, 1).flatten(1)  # (C, n)
    mean, statistics = raw.mean(1), vae.per_channel_statistics._buffers
    statistics["mean-of-means"].copy_(mean)
    statistics["std-of-means"].fill_((raw - mean[:, None]).square().mean().sqrt())


def train_decoder(
    vae: VideoVAE, video: Tensor, weight: Tensor, steps: int, batch: int, lr: float, show: Path, every: int = 250
) -> None:
    """Step 4, on short clips first, which cost less and train the same convolutions."""
    device, done = vae.encoder.conv_in.conv.weight.device, 0
    with torch.no_grad():
        latents = batched(vae.encode, video, device)

    def loss() -> Tensor:
        chosen = torch.randint(len(video), (batch,))
        cell = 5 if done > 0.85 * steps else 3
        first = int(torch.randint(0, 2, (1,))) if cell == 3 else 0  # a window's first latent frame is one pixel frame
        z = latents[chosen, :, first : first + cell]
        decoded = vae.decode(z + NOISE * torch.rand(1, device=device) * torch.randn_like(z))
        span = slice(first * 4, first * 4 + decoded.shape[2])
        error = (decoded - to_float(video[chosen, :, span], device)).abs()
        count = weight[chosen, :, span].to(device).float()
        if first:  # the decoder treats a first latent frame as one pixel frame, and here it stands for four
            error, count = error[:, :, 1:], count[:, :, 1:]
        return (error * count).mean() / count.mean()

    def report(step: int) -> None:
        nonlocal done
        done = step
        if step % every == 0 or step == steps:
            describe(vae, show, f"decoder, step {step}")

    optimize(vae.decoder, loss, steps, lr, "decoder", report)


@torch.no_grad()
def describe(vae: VideoVAE, path: Path, title: str, count: int = 32) -> float:
    """PSNR in dB on the test split, also with noise in the latents. `path`: a sheet, true above decoded frames."""
    device = vae.encoder.conv_in.conv.weight.device
    video = to_float(draw_clips(0, count, "test")[0], device)
    z = vae.encode(video)
    decoded = vae.decode(z).clamp(-1, 1)
    noisy = vae.decode(z + 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)).clamp(-1, 1)
    psnr, with_noise = (
        (10 * torch.log10(4 / (x - video).square().mean((1, 2, 3, 4)))).mean().item() for x in (decoded, noisy)
    )
    tqdm.write(f"{title}: PSNR {psnr:.2f} dB, with noise of 0.1 in the latents {with_noise:.2f} dB")
    rows = [np.concatenate(list(to_uint8(row)), 1) for pair in zip(video[:4], decoded[:4]) for row in pair]
    sheet = Image.fromarray(np.concatenate(rows))
    with whole_file(path) as temporary:
        sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(temporary)
    return psnr


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/toy/vae.safetensors", help="in the released layout (%(default)s)")
    parser.add_argument("--clips", type=int, default=2500, help="drawn clips (%(default)s)")
    parser.add_argument(
        "--fitted", type=int, default=1500, help="clips of these that fit the linear start (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=4000, help="of the decoder (%(default)s)")
    parser.add_argument("--batch", type=int, default=12, help="clips per step (%(default)s)")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, out, since = torch.device(options.device), Path(options.out), time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    config = json.loads((Path(__file__).parent.parent / "configs" / "ltx-2.3.json").read_text())
    config["vae"] |= CONFIG
    vae = VideoVAE(config["vae"]).to(device)
    video, weight = draw_clips(options.seed, options.clips)
    few = slice(options.fitted)
    set_encoder(vae, video[few], weight[few])
    set_statistics(vae, video[few])
    set_decoder(vae, video[few], weight[few])
    describe(vae, out.with_suffix(".png"), "linear, nearly")
    write_modules(out, [vae], config, {})  # the encoder is final: a cache can be made already
    print(f"wrote the linear start to {out} after {time.monotonic() - since:.0f} s", flush=True)
    train_decoder(vae, video, weight, options.steps, options.batch, options.lr, out.with_suffix(".png"))
    write_modules(out, [vae.cpu()], config, {})
    print(f"wrote {out} after {time.monotonic() - since:.0f} s on {device}")


if __name__ == "__main__":
    with one_line_errors():
        main()

"""The tiny VAE: pixels of the drawn world to 48 channels per cell of 4 frames x 8 x 8 pixels, and back.

Layout and code are those of the released VAE. The training takes a CPU less than an hour: the best *linear* code is
known in closed form, the network starts there, and only the decoder is trained.

    1. principal components of small and large cells of many clips        (covariances)
    2. encoder: the components of the large cells                         (its layers set one after the other, linear)
    3. decoder: the best linear inverse                                   (least squares, layer by layer)
    4. training of the decoder                                            latents + noise --> clip (L1)

Each principal component is divided by the root of its spread. Divided by the spread itself, all would be equal, and the
DiT would spend most of its capacity on those that matter least for the picture. Undivided, the strongest is a hundred
times the weakest, and noise hides the eyes of a face. The statistics in the checkpoint keep these proportions.

    python -m toy.vae --out runs/toy/vae.safetensors
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial, reduce
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import write_modules
from common.errors import ROOT, SEED, Parser, one_line_errors, whole, whole_file
from common.media import from_bytes, to_bytes
from common.outputs import refuse_folders
from toy.descend import descend
from toy.world import toy_clip
from vae import Conv3d, ResStack, VideoVAE, pixel_norm, space_to_depth

CHANNELS = 48
SPACE, TIME = ["compress_space", {"multiplier": 2}], ["compress_time", {"multiplier": 1}]
CONFIG = {
    "patch_size": 4,
    "latent_channels": CHANNELS,
    "encoder_base_channels": 40,
    "decoder_base_channels": 64,
    "encoder_blocks": [["compress_space_res", {"multiplier": 4}], *[["compress_time_res", {"multiplier": 1}]] * 2],
    # from the pixels, as in the released config
    "decoder_blocks": [["res_x", {"num_layers": 2}], SPACE, TIME, ["res_x", {"num_layers": 2}], TIME],
}
SIZE, FPS, FRAMES = 64, 12.0, 17
CELL = 4, 8  # frames and pixels to a side
OFFSET = 6.0, 3.0  # encoder, decoder: added to the input of the last PixelNorm and SiLU, in units of its spread.
# Far from zero both are nearly linear. Decoded from the encoder's: 24.6 dB with 3, 25.3 with 6, 25.7 without them.
ROWS = 100  # equations for each unknown of a least-squares fit; with 12 the linear start has 1.5 times the error
FACE = 4.0  # extra weight of a pixel at an eye, the nose or the mouth
SPREAD = 4.0  # pixels from a landmark at which the extra weight is 0.6 of FACE
NOISE = 0.3  # at most, in the latents of step 4: a DiT's latents are inexact, and the decoder learns to clean them
EVERY = 250  # steps between two pictures of decoded clips
Function = Callable[[Tensor], Tensor]


def face_weight(points: np.ndarray, size: int) -> np.ndarray:
    """Weight of each pixel: landmarks (F, 5, 2) -> (F, size, size), 1 far from all landmarks."""
    y, x = np.mgrid[:size, :size]
    distance = (x - points[..., 0, None, None]) ** 2 + (y - points[..., 1, None, None]) ** 2  # (F, 5, size, size)
    return 1 + FACE * np.exp(-distance / (2 * SPREAD**2)).max(1)


def draw_clip(seed: int, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """A clip's frames (F, H, W, 3) as bytes, and the weights of its pixels in half precision (F, H, W)."""
    clip = toy_clip(seed, number, FRAMES, SIZE, FPS, split)
    return clip["frames"], face_weight(clip["landmarks"], SIZE).astype(np.float16)


def draw_clips(seed: int, count: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """Clips (count, 3, F, H, W) as bytes, and the weights of their pixels (count, 1, F, H, W). Every core draws."""
    video = torch.empty(count, 3, FRAMES, SIZE, SIZE, dtype=torch.uint8)
    weight = torch.empty(count, 1, FRAMES, SIZE, SIZE, dtype=torch.float16)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        drawn = pool.map(partial(draw_clip, seed, split), range(count), chunksize=10)
        for k, (frames, weights) in enumerate(tqdm(drawn, "drawing", total=count, unit="clip", leave=False)):
            video[k], weight[k, 0] = torch.from_numpy(frames).permute(3, 0, 1, 2), torch.from_numpy(weights)
    return video, weight


@cache
def clips_to_show() -> Tensor:
    """32 clips of the test split as bytes, drawn once."""
    return draw_clips(0, 32, "test")[0]


def cells(video: Tensor, time: int, side: int) -> Tensor:
    """(B, C, F, H, W) -> (B, f, h, w, C * time * side * side)"""
    return space_to_depth(first_repeated(video, time), (time, side, side)).permute(0, 2, 3, 4, 1)


def first_repeated(x: Tensor, time: int) -> Tensor:
    """(B, C, F, H, W) -> (B, C, F + time - 1, H, W): the first frame alone fills a cell."""
    return torch.cat([x[:, :, :1].expand(-1, -1, time - 1, -1, -1), x], 2)


def batched(function: Function, video: Tensor) -> Tensor:
    """`function` of all clips, in batches."""
    return torch.cat([function(from_bytes(part)) for part in video.split(20)])


def moments(video: Tensor, weight: Tensor, cell: tuple[int, int], vectors: Function) -> tuple[Tensor, Tensor]:
    """Weighted mean (P,) and covariance (P, P) of the `vectors` (B, f, h, w, P) of clips, one for each cell."""
    total, mean, square = 0.0, 0.0, 0.0
    for part, counts in zip(video.split(50), weight.split(50)):
        x = vectors(from_bytes(part)).flatten(0, 3)  # (n, P)
        count = cells(counts.float(), *cell).flatten(0, 3).mean(1, keepdim=True)  # (n, 1)
        total, mean, square = total + count.sum(), mean + (count * x).sum(0), square + (count * x).T @ x
    mean = mean / total
    return mean, square / total - mean[:, None] * mean


class Components:
    """The `count` strongest principal components of cells of time x side x side pixels, weighted by pixel."""

    def __init__(self, video: Tensor, weight: Tensor, time: int, side: int, count: int):
        self.cells = partial(cells, time=time, side=side)
        self.mean, covariance = moments(video, weight, (time, side), self.cells)
        self.basis = torch.linalg.eigh(covariance)[1][:, -count:].flip(1)  # (P, count)

    def of(self, video: Tensor) -> Tensor:
        """(B, 3, F, H, W) -> (B, count, f, h, w)"""
        return ((self.cells(video) - self.mean) @ self.basis).permute(0, 4, 1, 2, 3)


@torch.no_grad()
def fit(conv: Conv3d, inputs: Tensor, targets: Tensor, ridge: float = 1e-4) -> None:
    """Set the kernel by least squares, from `inputs` (B, C, F, H, W) and `targets` (B, C', F, H, W), as many clips of
    them as give ROWS equations for each unknown."""
    gram, product = 0.0, 0.0
    count = math.ceil(ROWS * 27 * inputs.shape[1] / inputs[0, 0].numel())
    inputs, targets = inputs[:count], targets[:count]
    for x, y in zip(inputs.split(20), targets.split(20)):
        first, last = x[:, :, :1], x[:, :, -1:]
        x = torch.cat([first, first, x] if conv.causal else [first, x, last], 2)
        x = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)  # (B, C, F, H, W, 3, 3, 3)
        x = F.pad(rearrange(x, "b c f h w i j k -> (b f h w) (c i j k)"), (0, 1), value=1)  # (n, C * 27 + 1)
        gram, product = gram + x.T @ x, product + x.T @ rearrange(y, "b c f h w -> (b f h w) c")
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, product)
    conv.conv.weight.copy_(solution[:-1].T.view_as(conv.conv.weight))
    conv.conv.bias.copy_(solution[-1])


def halve_time(x: Tensor, weight: Tensor) -> Tensor:
    """`compress_time_res` on (..., frames, C), with a kernel that is `weight` (C / 2, C) at one frame and else zero."""
    pairs = x.unflatten(-2, (-1, 2))  # (..., pairs, 2, C)
    return (pairs @ weight.T).transpose(-1, -2).flatten(-2) + pairs.mean(-2)


def keep_most(covariance: Tensor, frames: int, steps: int = 300) -> list[Tensor]:
    """Kernels of the log2(frames) `compress_time_res` that lose the least of `frames` frames with this covariance: by
    descent on the variance that no linear map can recover. It needs the covariance, not the clips."""
    channels = len(covariance) // frames
    everything = torch.eye(len(covariance)).to(covariance).unflatten(1, (frames, channels))
    single = covariance.unflatten(0, (frames, -1)).unflatten(2, (frames, -1)).diagonal(0, 0, 2).sum(-1)
    start = torch.linalg.eigh(single)[1].flip(1)[:, : channels // 2].T
    others = (torch.randn_like(start) / channels**0.5 for _ in range(1, int(math.log2(frames))))
    kernels = [nn.Parameter(kernel) for kernel in (start.clone(), *others)]
    optimizer = torch.optim.Adam(kernels, 0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        short = reduce(halve_time, kernels, everything).flatten(1)  # (frames * C, C)
        inner, product = short.T @ covariance @ short, covariance @ short
        inner = inner + 1e-4 * inner.diagonal().mean() * torch.eye(channels).to(inner)
        loss = covariance.trace() - (torch.linalg.solve(inner, product.T) * product.T).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return [kernel.detach() for kernel in kernels]


def cosines(count: int) -> Tensor:
    """(count - 1, count): orthonormal rows that sum to zero; the squares of each column have about equal sums."""
    place = (torch.arange(count) + 0.5) / count
    return (torch.arange(1, count)[:, None] * math.pi * place).cos() * (2 / count) ** 0.5


@torch.no_grad()
def set_encoder(vae: VideoVAE, video: Tensor, weight: Tensor) -> None:
    """Steps 1 and 2: the encoder as a nearly linear map to the principal components."""
    encoder = vae.encoder
    for parameter in encoder.parameters():
        parameter.zero_()
    small = Components(video, weight, 1, encoder.patch, len(encoder.conv_in.conv.weight))
    across = small.basis.view(3, encoder.patch, encoder.patch, -1).transpose(1, 2).flatten(0, 2)  # a patch's layout
    encoder.conv_in.conv.weight[:, :, 2, 1, 1] = across.T
    encoder.conv_in.conv.bias.copy_(-small.mean @ small.basis)
    space, *times = encoder.down_blocks

    def frames_of_cells(clips: Tensor) -> Tensor:
        x = first_repeated(space(encoder.conv_in(encoder.patches(clips))), CELL[0])
        return rearrange(x, "b c (f t) h w -> b f h w (t c)", t=CELL[0])

    covariance = moments(video, weight, CELL, frames_of_cells)[1]
    with torch.enable_grad():
        kernels = keep_most(covariance, CELL[0])
    for block, kernel in zip(times, kernels):
        block.conv.conv.weight[:, :, 2, 1, 1] = kernel

    layers = nn.Sequential(encoder.conv_in, *encoder.down_blocks)  # all but the last
    spread = batched(lambda clips: layers(encoder.patches(clips)), video[:100]).std()
    times[-1].conv.conv.bias.fill_(OFFSET[0] * spread)
    target = batched(Components(video, weight, *CELL, CHANNELS).of, video)
    target = target / target.square().mean((0, 2, 3, 4), keepdim=True) ** 0.25
    target = target / target.square().mean().sqrt()
    target = F.pad(target, (0,) * 7 + (1,))  # the last channel is the unused log-variance
    inputs = batched(lambda clips: layers(encoder.patches(clips)), video)
    fit(encoder.conv_out, F.silu(pixel_norm(inputs)), target)
    for parameter in encoder.parameters():  # as stored, since statistics and decoder depend on it
        parameter.copy_(parameter.bfloat16())


@torch.no_grad()
def set_statistics(vae: VideoVAE, video: Tensor) -> None:
    """The mean of each channel, and one spread of all channels together."""
    raw = batched(vae.encode, video).transpose(0, 1).flatten(1)  # (C, n), with statistics 0 and 1
    mean, statistics = raw.mean(1), vae.per_channel_statistics._buffers
    statistics["mean-of-means"].copy_(mean)
    statistics["std-of-means"].fill_((raw - mean[:, None]).square().mean().sqrt())


@torch.no_grad()
def set_decoder(vae: VideoVAE, video: Tensor, weight: Tensor) -> None:
    """Step 3: residual blocks add zero, and every other layer is the best linear map at its place."""
    decoder, (time, side) = vae.decoder, CELL
    nn.init.dirac_(decoder.conv_in.conv.weight)
    nn.init.zeros_(decoder.conv_in.conv.bias)
    x = batched(lambda clips: decoder.conv_in(vae.encoder(clips)), video)
    for block in decoder.up_blocks:
        if isinstance(block, ResStack):
            for layer in block.res_blocks:
                nn.init.kaiming_normal_(layer.conv1.conv.weight)
                nn.init.zeros_(layer.conv2.conv.weight)
                nn.init.zeros_(layer.conv2.conv.bias)
            continue
        time, side = time // block.stride[0], side // block.stride[1]
        count = len(block.conv.conv.bias) // math.prod(block.stride)
        target = batched(Components(video, weight, time, side, count).of, video)
        last = (time, side) == (1, decoder.patch)
        if last:  # its norm must not follow the brightness, the first component: spread it over all channels
            target = target[:, : count - 1]
            target = torch.einsum("bkfhw,kc->bcfhw", target, cosines(count)[: target.shape[1]].to(target))
        target = target / target.square().mean().sqrt()
        fit(block.conv, x, space_to_depth(first_repeated(target, block.stride[0]), block.stride))
        if last:
            block.conv.conv.bias += OFFSET[1]
        x = torch.cat([block(part) for part in x.split(20)])
    fit(decoder.conv_out, F.silu(pixel_norm(x)), batched(vae.encoder.patches, video))


def train_decoder(vae: VideoVAE, video: Tensor, weight: Tensor, steps: int, batch: int, lr: float, show: Path) -> None:
    """Step 4. On a GPU the products are in bf16."""
    with torch.no_grad():
        latents = batched(vae.encode, video)
    device = latents.device

    def loss(step: int) -> Tensor:
        picks = torch.randint(len(video), (batch,)).to(device)
        z, count = latents[picks], weight[picks].float()
        noise = NOISE * torch.rand(batch, 1, 1, 1, 1, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            decoded = vae.decode(z + noise * torch.randn_like(z))
        error = (decoded.float() - from_bytes(video[picks])).abs()
        return (error * count).mean() / count.mean()

    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr, (0.9, 0.98), weight_decay=1e-3)
    for step, _ in enumerate(descend("decoder", optimizer, loss, steps, rise=0.05), 1):
        if step % EVERY == 0 or step == steps:
            describe(vae, show, f"decoder, step {step}")


@torch.no_grad()
def describe(vae: VideoVAE, path: Path, title: str) -> None:
    """PSNR in dB on the test split, also with noise in the latents. `path`: a sheet, true above decoded frames."""
    video = from_bytes(clips_to_show()).to(next(vae.parameters()).device)
    z = vae.encode(video)
    noise = 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    decoded, noisy = vae.decode(z).clamp(-1, 1), vae.decode(z + noise).clamp(-1, 1)
    errors = ((x - video).square().mean((1, 2, 3, 4)) for x in (decoded, noisy))
    psnr, with_noise = (10 * torch.log10(4 / error).mean() for error in errors)
    tqdm.write(f"{title}: PSNR {psnr:.2f} dB, with noise of 0.1 in the latents {with_noise:.2f} dB")
    pairs = torch.stack([video[:4], decoded[:4]], 1)
    sheet = Image.fromarray(to_bytes(rearrange(pairs, "n two c f h w -> (n two h) (f w) c")).cpu().numpy())
    with whole_file(path) as temporary:
        sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(temporary)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/toy/vae.safetensors", help="in the released layout (%(default)s)")
    parser.add_argument("--clips", type=whole(), default=2000, help="drawn clips (%(default)s)")
    parser.add_argument("--fitted", type=whole(), default=1300, help="clips that fit the linear start (%(default)s)")
    parser.add_argument("--steps", type=whole(), default=5000, help="of the decoder (%(default)s)")
    parser.add_argument("--batch", type=whole(), default=32, help="clips per step (%(default)s)")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    refuse_folders(options.out)
    out, since = Path(options.out), time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    ltx = json.loads((ROOT / "configs" / "ltx-2.3.json").read_text())
    ltx["vae"] |= CONFIG
    vae = VideoVAE(ltx["vae"]).to(options.device)
    video, weight = (x.to(options.device) for x in draw_clips(options.seed, options.clips))
    start = video[: options.fitted], weight[: options.fitted]
    set_encoder(vae, *start)
    set_statistics(vae, start[0])
    set_decoder(vae, *start)
    describe(vae, out.with_suffix(".png"), "linear, nearly")
    train_decoder(vae, video, weight, options.steps, options.batch, options.lr, out.with_suffix(".png"))
    write_modules(out, [vae.cpu()], ltx, {})
    print(f"wrote {out} after {time.monotonic() - since:.0f} s on {options.device}")


if __name__ == "__main__":
    with one_line_errors():
        main()

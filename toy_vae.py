"""The tiny VAE: pixels of the drawn world to 96 channels per cell of 4 frames x 16 x 16 pixels, and back.

Layout and code are those of the released VAE; only the training is simpler, so that a CPU does it in half an hour:

    1. principal components of the cells of many clips: the linear latents that lose least        (a covariance)
    2. the encoder learns to give them                    clip ──> encoder ──> components         (regression)
    3. the decoder learns to see a picture in them        latents + noise ──> decoder ──> clip    (L1)

Principal components have a natural spectrum: what matters much for the picture is large, what matters little is
small. Divided each by its own spread, they would all be equally large, and the DiT would spend itself on what matters
least; left alone, the strongest is a hundred times the weakest, and noise covers the eyes in a face. They are divided
by the root of their spread, which is between. The statistics in the checkpoint have one spread for all, to keep that.

    python toy_vae.py --out runs/toy/vae.safetensors
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import write_modules
from errors import Parser, one_line_errors, whole_file
from media import to_uint8
from toy import toy_clip
from vae import ResBlock, Upsample, VideoVAE

CHANNELS = 96
CONFIG = {
    "patch_size": 8,
    "latent_channels": CHANNELS,
    "encoder_base_channels": 48,
    "decoder_base_channels": 64,
    "encoder_blocks": [
        ["compress_space_res", {"multiplier": 4}],
        ["compress_time_res", {"multiplier": 1}],
        ["compress_time_res", {"multiplier": 1}],
    ],
    "decoder_blocks": [  # from the pixels to the latents, as in the released config
        ["res_x", {"num_layers": 2}],
        ["compress_all", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_time", {"multiplier": 2}],
    ],
}
SIZE, FPS, FRAMES = 64, 12.0, 17
CELL = 4, 16  # frames and pixels to a side
FACE = 4.0  # a pixel at an eye, the nose or the mouth counts this much more than one of the background
SPREAD = 4.0  # pixels from a landmark at which that has fallen to 0.6 of it
NOISE = 0.1  # in the latents that the decoder learns from, which a DiT will not hit exactly


def face_weight(points: np.ndarray, size: int) -> np.ndarray:
    """How much each pixel counts: landmarks (F, 5, 2) -> (F, size, size), 1 far from all of them."""
    y, x = np.mgrid[:size, :size]
    distance = (x - points[..., 0, None, None]) ** 2 + (y - points[..., 1, None, None]) ** 2  # (F, 5, size, size)
    return 1 + FACE * np.exp(-distance / (2 * SPREAD**2)).max(1)


def draw_clips(seed: int, count: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """Clips as bytes (count, 3, F, H, W), and what each pixel counts, in half precision: (count, 1, F, H, W)."""
    video = torch.empty(count, 3, FRAMES, SIZE, SIZE, dtype=torch.uint8)
    weight = torch.empty(count, 1, FRAMES, SIZE, SIZE, dtype=torch.float16)
    for k in tqdm(range(count), "drawing", unit="clip", leave=False):
        clip = toy_clip(seed, k, FRAMES, SIZE, FPS, split)
        video[k] = torch.from_numpy(clip["frames"]).permute(3, 0, 1, 2)
        weight[k, 0] = torch.from_numpy(face_weight(clip["landmarks"], SIZE))
    return video, weight


def to_float(video: Tensor, device: torch.device) -> Tensor:
    return video.to(device).float() / 127.5 - 1


def cells(video: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B, f, h, w, C * 4 * 16 * 16); the first frame is a cell of four of its kind."""
    time, side = CELL
    video = torch.cat([video[:, :, :1].expand(-1, -1, time - 1, -1, -1), video], 2)
    parts = video.unflatten(4, (-1, side)).unflatten(3, (-1, side)).unflatten(2, (-1, time))
    return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # from (B, C, f, time, h, side, w, side)


def principal_components(video: Tensor, weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean (P,) and the CHANNELS strongest components (P, CHANNELS) of the cells, those with a face counting more."""
    total, mean, square = 0.0, 0.0, 0.0
    for part, count in zip(video.split(50), weight.split(50)):
        x = cells(to_float(part, device)).flatten(0, 3)  # (n, P)
        c = cells(count.to(device).float()).flatten(0, 3).mean(1, keepdim=True)  # (n, 1)
        total, mean, square = total + c.sum(), mean + (c * x).sum(0), square + (c * x).T @ x
    mean = mean / total
    covariance = square / total - mean[:, None] * mean
    components = torch.linalg.eigh(covariance)[1][:, -CHANNELS:].flip(1)
    return mean, components


def optimize(module: nn.Module, loss, steps: int, lr: float, title: str, report=lambda step: None) -> None:
    """AdamW on `loss()` with a linear rise and a cosine fall."""
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


def train_encoder(vae: VideoVAE, video: Tensor, weight: Tensor, steps: int, batch: int, lr: float) -> None:
    """Steps 1 and 2."""
    device = vae.encoder.conv_in.conv.weight.device
    mean, components = principal_components(video, weight, device)
    target = [(cells(to_float(part, device)) - mean) @ components for part in video.split(50)]
    target = torch.cat(target).permute(0, 4, 1, 2, 3)  # (n, C, f, h, w)
    target = target / target.square().mean((0, 2, 3, 4), keepdim=True) ** 0.25
    target = target / target.square().mean().sqrt()
    with torch.no_grad():  # far from zero, PixelNorm and SiLU are nearly linear: begin there
        vae.encoder.down_blocks[-1].conv.conv.bias.fill_(2.0)
        vae.encoder.conv_out.conv.weight.mul_(0.5)

    def loss() -> Tensor:
        chosen = torch.randint(len(video), (batch,))
        short = 9 if torch.rand(1) < 0.5 else FRAMES
        latents = vae.encoder(to_float(video[chosen, :, :short], device))
        return F.mse_loss(latents, target[chosen][:, :, : latents.shape[2]])

    optimize(vae.encoder, loss, steps, lr, "encoder")


@torch.no_grad()
def start_decoder(vae: VideoVAE) -> None:
    """Begin near a linear map: residual blocks add nothing, and what is enlarged is repeated."""
    for module in vae.decoder.modules():
        if isinstance(module, ResBlock):
            nn.init.kaiming_normal_(module.conv1.conv.weight)
            nn.init.zeros_(module.conv2.conv.weight)
            nn.init.zeros_(module.conv2.conv.bias)
        elif isinstance(module, Upsample):
            weight, copies = module.conv.conv.weight, math.prod(module.stride)  # (C copies, C', 3, 3, 3)
            for channel in range(len(weight) // copies):
                weight[channel * copies : (channel + 1) * copies, channel, 1, 1, 1] += 1
    weight = vae.decoder.conv_in.conv.weight
    weight[:, :, 1, 1, 1] += torch.eye(*weight.shape[:2]).to(weight)


@torch.no_grad()
def encode_all(vae: VideoVAE, video: Tensor) -> Tensor:
    device = vae.encoder.conv_in.conv.weight.device
    return torch.cat([vae.encode(to_float(part, device)) for part in video.split(16)])


def set_statistics(vae: VideoVAE, video: Tensor) -> None:
    """Each channel's mean, and one spread, that of all of them together."""
    raw = encode_all(vae, video).transpose(0, 1).flatten(1)  # (C, n), the statistics being 0 and 1 so far
    mean, statistics = raw.mean(1), vae.per_channel_statistics._buffers
    statistics["mean-of-means"].copy_(mean)
    statistics["std-of-means"].fill_((raw - mean[:, None]).square().mean().sqrt())


def train_decoder(
    vae: VideoVAE, video: Tensor, weight: Tensor, steps: int, batch: int, lr: float, show: Path, every: int = 250
) -> None:
    """Step 3, on short clips first: convolutions are the same at any length, their cost is not."""
    device, latents = vae.encoder.conv_in.conv.weight.device, encode_all(vae, video)
    done = 0

    def loss() -> Tensor:
        chosen = torch.randint(len(video), (batch,))
        cell = 5 if done > 0.85 * steps else 3
        first = int(torch.randint(0, 2, (1,))) if cell == 3 else 0  # a window's first latent frame is one pixel frame
        z = latents[chosen, :, first : first + cell]
        decoded = vae.decode(z + NOISE * torch.rand(1, device=device) * torch.randn_like(z))
        span = slice(first * 4, first * 4 + decoded.shape[2])
        error = (decoded - to_float(video[chosen, :, span], device)).abs()
        count = weight[chosen, :, span].to(device).float()
        if first:  # its pixels are the last of a cell of four: not what the decoder makes of a beginning
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
    """PSNR in dB on people and scenes never trained on, also with noise in the latents; true above decoded frames."""
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
    parser.add_argument("--clips", type=int, default=2500, help="drawn once and trained on (%(default)s)")
    parser.add_argument("--encoder-steps", type=int, default=1500)
    parser.add_argument("--decoder-steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=12, help="clips per step (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, out, since = torch.device(options.device), Path(options.out), time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    config = json.loads((Path(__file__).parent / "configs" / "ltx-2.3.json").read_text())
    config["vae"] |= CONFIG
    vae = VideoVAE(config["vae"]).to(device)
    video, weight = draw_clips(options.seed, options.clips)
    train_encoder(vae, video, weight, options.encoder_steps, options.batch, options.lr)
    set_statistics(vae, video[:200])
    start_decoder(vae)
    write_modules(out, [vae], config, {})  # the encoder is what it will be: a cache can be made already
    print(f"wrote the encoder to {out} after {time.monotonic() - since:.0f} s", flush=True)
    train_decoder(vae, video, weight, options.decoder_steps, options.batch, options.lr, out.with_suffix(".png"))
    write_modules(out, [vae.cpu()], config, {})
    print(f"wrote {out} after {time.monotonic() - since:.0f} s on {device}")


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Pixels to latents and back: the video VAE of LTX-2.3 (E_vae of Eq. 1, D_vae of Eq. 7).

A causal 3-D convolutional encoder makes one latent cell of 8 frames x 32 x 32 pixels (the first latent frame of one
single frame, so an image is a video of length 1), and a decoder that also looks ahead turns it back.

        video (B, 3, 8k+1, 32h, 32w)                                            in [-1, 1]
          | space-to-depth by 4, conv                  E                        E: encoder blocks, in order
          | residual blocks, compress space / time / all                        D: decoder blocks, in reverse
        latents (B, 128, k+1, h, w)                    normalized per channel
          | conv, residual blocks, expand time / space D
          | conv, depth-to-space by 4
        video (B, 3, 8k+1, 32h, 32w)

Every size comes from the config: `compress_space*` halves height and width, `compress_time*` halves time,
`compress_all*` both.

With `chunk` both ways run piece by piece in time, each layer remembering the frames of the last piece that it still
needs: the same sums in less memory. (Pieces that overlap would have to share 14 latent frames on either side of a cut,
which is how far the released decoder sees.)
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from checkpoint import Checkpoint, open_checkpoint
from common.errors import UserError

STRIDES = {"compress_space": (1, 2, 2), "compress_time": (2, 1, 1), "compress_all": (2, 2, 2)}


def known_blocks(blocks: list, suffix: str = "") -> list:
    """The config's blocks, if all are of a kind that the code here knows."""
    for kind, _ in blocks:
        if kind != "res_x" and kind not in {name + suffix for name in STRIDES}:
            raise UserError(
                f"the checkpoint's VAE has a block {kind!r}, unknown to this code: not the released LTX-2.3"
            )
    return blocks


def space_to_depth(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """(B, C, F p1, H p2, W p3) -> (B, C p1 p2 p3, F, H, W)"""
    p1, p2, p3 = stride
    x = x.unflatten(4, (-1, p3)).unflatten(3, (-1, p2)).unflatten(2, (-1, p1))  # (B, C, F, p1, H, p2, W, p3)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def depth_to_space(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """(B, C p1 p2 p3, F, H, W) -> (B, C, F p1, H p2, W p3), the inverse of `space_to_depth`"""
    x = x.unflatten(1, (x.shape[1] // math.prod(stride), *stride))  # (B, C, p1, p2, p3, F, H, W), F may be 0
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def pixel_norm(x: Tensor) -> Tensor:
    """Divide each pixel (B, C, F, H, W) by the root mean square over its channels."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class Memory(dict):
    """What each layer has to remember of a video that passes it in pieces; `last` is true with the last piece."""

    last = False


Pieces = Iterable[tuple[Tensor, bool]]  # consecutive frames, and whether they are the last


def flow(layer: Callable[[Tensor, Memory], Tensor], pieces: Pieces, memory: Memory, most: int) -> Pieces:
    """Pieces through a layer, out again in pieces of `most` frames: what it held back comes all with the last."""
    for x, memory.last in pieces:
        last = memory.last  # the layers behind change it
        out = layer(x, memory).split(most, dim=2)
        for k, piece in enumerate(out):
            if piece.shape[2]:
                yield piece, last and k + 1 == len(out)


class Conv3d(nn.Module):
    """A 3x3x3 convolution, zeros around in space; in time the edge frames are repeated.

    Causal (encoder): the first frame twice in front, so no frame sees a later one. Else once at either end.
    """

    def __init__(self, channels: int, out_channels: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.conv = nn.Conv3d(channels, out_channels, kernel_size=3, padding=(0, 1, 1))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """With `memory` x is a piece: all frames out that can be known by now, which may be none."""
        first, last = x[:, :, :1], x[:, :, -1:]
        if memory is None:
            return self.conv(torch.cat([first, first, x] if self.causal else [first, x, last], dim=2))
        if self in memory:
            before = [memory[self]]
            last = last if x.shape[2] else memory[self][:, :, -1:]
        else:
            before = [first, first] if self.causal else [first]
        x = torch.cat([*before, x, last] if memory.last and not self.causal else [*before, x], dim=2)
        if x.shape[2]:
            memory[self] = x[:, :, -2:].clone()  # a view would keep all of x
        if x.shape[2] < 3:
            return x.new_empty(x.shape[0], self.conv.out_channels, 0, *x.shape[3:])
        return self.conv(x)


class ResBlock(nn.Module):
    """PixelNorm, SiLU, conv, twice, plus the input."""

    def __init__(self, channels: int, causal: bool):
        super().__init__()
        self.conv1 = Conv3d(channels, channels, causal)
        self.conv2 = Conv3d(channels, channels, causal)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        h = self.conv1(F.silu(pixel_norm(x)), memory)
        h = self.conv2(F.silu(pixel_norm(h)), memory)
        if memory is not None:  # h comes later than x where the convolutions look ahead
            x = torch.cat([memory[self], x], dim=2) if self in memory else x
            memory[self] = x[:, :, h.shape[2] :].clone()
            x = x[:, :, : h.shape[2]]
        return x + h


class ResStack(nn.Module):
    """`res_x`: residual blocks at one resolution."""

    def __init__(self, channels: int, layers: int, causal: bool):
        super().__init__()
        self.res_blocks = nn.ModuleList([ResBlock(channels, causal) for _ in range(layers)])

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        for block in self.res_blocks:
            x = block(x, memory)
        return x


class Downsample(nn.Module):
    """`compress_*_res`: a strided convolution as conv and space-to-depth, plus the averaged input as a skip."""

    def __init__(self, channels: int, out_channels: int, stride: tuple[int, int, int]):
        super().__init__()
        self.stride, self.out_channels = stride, out_channels
        self.conv = Conv3d(channels, out_channels // math.prod(stride), causal=True)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        if self.stride[0] == 2 and (memory is None or self.conv not in memory):
            x = torch.cat([x[:, :, :1], x], dim=2)  # frames come as 1 + 2k: the first counts twice
        skip = space_to_depth(x, self.stride).unflatten(1, (self.out_channels, -1)).mean(dim=2)
        return space_to_depth(self.conv(x, memory), self.stride) + skip


class Upsample(nn.Module):
    """`compress_*` of the decoder: conv to more channels, then depth-to-space; no skip."""

    def __init__(self, channels: int, out_channels: int, stride: tuple[int, int, int]):
        super().__init__()
        self.stride = stride
        self.conv = Conv3d(channels, out_channels * math.prod(stride), causal=False)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        x = depth_to_space(self.conv(x, memory), self.stride)
        if self.stride[0] == 1 or not x.shape[2] or (memory is not None and self in memory):
            return x
        if memory is not None:
            memory[self] = True
        return x[:, :, 1:]  # 2k frames are 1 + 2 (k-1) and the doubled first


class Encoder(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.patch = config["patch_size"]
        channels = config["encoder_base_channels"]
        self.conv_in = Conv3d(config["in_channels"] * self.patch**2, channels, causal=True)
        blocks: list[nn.Module] = []
        for kind, options in known_blocks(config["encoder_blocks"], "_res"):
            if kind == "res_x":
                blocks.append(ResStack(channels, options["num_layers"], causal=True))
            else:
                out_channels = channels * options["multiplier"]
                blocks.append(Downsample(channels, out_channels, STRIDES[kind.removesuffix("_res")]))
                channels = out_channels
        self.down_blocks = nn.ModuleList(blocks)
        # The means and a single log-variance shared by all channels, which is not used.
        self.conv_out = Conv3d(channels, config["latent_channels"] + 1, causal=True)

    def patches(self, video: Tensor) -> Tensor:
        """(B, 3, F, H, W) -> (B, 3 p p, F, H/p, W/p). Here alone the released layout counts width before height."""
        return space_to_depth(video.transpose(3, 4), (1, self.patch, self.patch)).transpose(3, 4)

    def forward(self, video: Tensor, memory: Memory | None = None) -> Tensor:
        x = self.conv_in(self.patches(video), memory)
        for block in self.down_blocks:
            x = block(x, memory)
        return self.conv_out(F.silu(pixel_norm(x)), memory)[:, :-1]


class Decoder(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.patch = config["patch_size"]
        stages = config["decoder_blocks"]
        channels = config["decoder_base_channels"] * math.prod(o.get("multiplier", 1) for _, o in stages)
        self.conv_in = Conv3d(config["latent_channels"], channels, causal=False)
        blocks: list[nn.Module] = []
        for kind, options in reversed(known_blocks(stages)):
            if kind == "res_x":
                blocks.append(ResStack(channels, options["num_layers"], causal=False))
            else:
                out_channels = channels // options["multiplier"]
                blocks.append(Upsample(channels, out_channels, STRIDES[kind]))
                channels = out_channels
        self.up_blocks = nn.ModuleList(blocks)
        self.conv_out = Conv3d(channels, config["out_channels"] * self.patch**2, causal=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.up_blocks:
            # Under the identity losses a gradient goes through: keep only what goes in between the blocks.
            x = recompute(block, x, use_reentrant=False) if x.requires_grad else block(x)
        return self.to_pixels(x)

    def to_pixels(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        patches = self.conv_out(F.silu(pixel_norm(x)), memory)
        return depth_to_space(patches.transpose(3, 4), (1, self.patch, self.patch)).transpose(3, 4)

    def stream(self, x: Tensor, chunk: int) -> Iterator[Tensor]:
        """What `forward` returns, in pieces of `chunk` latent frames; each layer runs as far as it can."""
        parts, memory, most = x.split(chunk, dim=2), Memory(), chunk
        pieces: Pieces = [(part, k + 1 == len(parts)) for k, part in enumerate(parts)]
        for layer in (self.conv_in, *self.up_blocks, self.to_pixels):
            most *= layer.stride[0] if isinstance(layer, Upsample) else 1
            pieces = flow(layer, pieces, memory, most)
        return (piece for piece, _ in pieces)


class ChannelStatistics(nn.Module):
    """Mean and spread of each latent channel over the training data; the DiT sees normalized latents."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean-of-means", torch.zeros(channels))
        self.register_buffer("std-of-means", torch.ones(channels))

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Both as (C, 1, 1, 1), to go with (B, C, f, h, w)."""
        buffers = self._buffers["mean-of-means"], self._buffers["std-of-means"]
        return tuple(buffer.view(-1, 1, 1, 1) for buffer in buffers)


class VideoVAE(nn.Module):
    """Encoder, decoder and latent statistics. `scale` is (frames, pixels, pixels) per latent cell."""

    PREFIXES = {"": "vae."}

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.per_channel_statistics = ChannelStatistics(config["latent_channels"])
        self.scale = latent_scale(config)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path | Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "VideoVAE":
        checkpoint = open_checkpoint(path)
        with torch.device("meta"):
            vae = cls(checkpoint.config["vae"])
        return checkpoint.load(vae, cls.PREFIXES, device, dtype)

    def encode(self, video: Tensor, chunk: int | None = None) -> Tensor:
        """Eq. 1: video (B, 3, F, H, W) in [-1, 1] to normalized latents (B, C, f, h, w); the mean, nothing drawn.

        `chunk`: so many latent frames at a time, None for all at once.
        """
        frames, height, width = video.shape[2:]
        time, rows, columns = self.scale
        if (frames - 1) % time or height % rows or width % columns:
            raise ValueError(
                f"video of {frames} frames, {height}x{width}: this VAE takes {time}k+1 frames, "
                f"height a multiple of {rows} and width of {columns}"
            )
        mean, std = self.per_channel_statistics.mean_and_std()
        if chunk is None or frames <= chunk * time:
            return (self.encoder(video) - mean) / std
        first, memory = time * (chunk - 1) + 1, Memory()
        pieces = [video[:, :, :first], *video[:, :, first:].split(chunk * time, dim=2)]
        return (torch.cat([self.encoder(piece, memory) for piece in pieces], dim=2) - mean) / std

    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """Eq. 7: normalized latents (B, C, f, h, w) to video (B, 3, F, H, W), about [-1, 1] and not clamped.

        `chunk`: so many latent frames at a time, None for all at once, which is what a backward pass wants.
        """
        mean, std = self.per_channel_statistics.mean_and_std()
        latents = latents * std + mean
        if chunk is None or latents.shape[2] <= chunk:
            return self.decoder(latents)
        batch, _, frames, height, width = latents.shape
        time, rows, columns = self.scale
        video, done = latents.new_empty(batch, 3, time * (frames - 1) + 1, rows * height, columns * width), 0
        for piece in self.decoder.stream(latents, chunk):
            video[:, :, done : done + piece.shape[2]] = piece
            done += piece.shape[2]
        return video


def to_tokens(latents: Tensor) -> Tensor:
    """Latents (B, C, f, h, w) as the DiT's tokens (B, f*h*w, C), ordered t, h, w."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Tokens (B, f*h*w, C) back to latents (B, C, f, h, w), the inverse of `to_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def latent_scale(config: dict[str, Any]) -> tuple[int, int, int]:
    """(frames, pixels, pixels) that one latent cell covers, from the VAE's config. The released model: (8, 32, 32)."""
    time, space = 1, config["patch_size"]
    for kind, _ in config["encoder_blocks"]:
        time *= 2 if kind.startswith(("compress_time", "compress_all")) else 1
        space *= 2 if kind.startswith(("compress_space", "compress_all")) else 1
    return time, space, space

"""Pixels to latents and back: the video VAE of LTX-2.3 (E_vae of Eq. 1, D_vae of Eq. 7).

One latent cell covers 8 frames of 32 x 32 pixels, and in the first latent frame only 1 frame: an image is a video of
length 1. The encoder is causal, so no latent depends on a later frame. The decoder sees both directions in time.

        video (B, 3, F, H, W) in [-1, 1]                              F = 8k+1
          | patches of 4 x 4 pixels, conv                   encoder
          | residual blocks, compress space / time / all             blocks in the config's order
        z (B, C, T, h, w), normalized per channel                     T = k+1, h = H/32, w = W/32, C = 128
          | conv                                            decoder
          | residual blocks, expand space / time / all               blocks in the config's order reversed
          | conv, patches back to pixels
        video (B, 3, F, H, W)

Every size comes from the config. Inside a layer (B, C, F, H, W) are the sizes of the layer's input.

With `chunk`, a few latent frames are processed at a time, and every layer keeps its last frames for the next piece: the
same result in less memory. Overlapping pieces would cost more: the released decoder sees 14 latent frames on each side.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from checkpoint import Checkpoint, open_checkpoint
from common.errors import UserError

CHUNK = 2  # latent frames in a piece: longer videos go through in pieces, with the same result and less memory
STRIDES = {"compress_space": (1, 2, 2), "compress_time": (2, 1, 1), "compress_all": (2, 2, 2)}


def block_stride(kind: str, suffix: str = "") -> tuple[int, int, int]:
    """(frames, rows, columns) that a block of the config compresses into one. `suffix` is the end of the encoder's
    kinds. UserError for an unknown kind."""
    strides = {"res_x": (1, 1, 1)} | {name + suffix: stride for name, stride in STRIDES.items()}
    if kind in strides:
        return strides[kind]
    raise UserError(f"the checkpoint's VAE has a block {kind!r}, unknown to this code: not the released LTX-2.3")


def space_to_depth(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """(B, C, F p, H q, W r) -> (B, C p q r, F, H, W)"""
    p, q, r = stride
    return rearrange(x, "b c (f p) (h q) (w r) -> b (c p q r) f h w", p=p, q=q, r=r)


def depth_to_space(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """(B, C p q r, F, H, W) -> (B, C, F p, H q, W r), the inverse of `space_to_depth`"""
    p, q, r = stride
    return rearrange(x, "b (c p q r) f h w -> b c (f p) (h q) (w r)", p=p, q=q, r=r)


def pixel_norm(x: Tensor) -> Tensor:
    """Divide each pixel of (B, C, F, H, W) by the root mean square of its C channels."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class Memory(dict):
    """For a video in pieces: each layer, and the frames (or a flag) that it keeps for the next piece."""

    last = False  # true while the last piece is processed


def run_in_pieces(layer: Callable, pieces: Iterable, memory: Memory, limit: int) -> Iterator[tuple[Tensor, bool]]:
    """Run a layer on pieces (frames (B, C, F, H, W), true for the last). It yields pieces of at most `limit` frames."""
    for x, last in pieces:
        memory.last = last  # again for each piece: the layers behind this one set it in between
        parts = layer(x, memory).split(limit, dim=2)
        for k, part in enumerate(parts):
            if part.shape[2]:
                yield part, last and k + 1 == len(parts)


class Conv3d(nn.Module):
    """A 3x3x3 convolution. Space is padded with zeros, time with copies of the edge frames.

    Causal (encoder): two copies of the first frame in front, so an output frame depends on no later frame.
    Otherwise (decoder): one copy of the first frame in front and one of the last frame behind.
    """

    def __init__(self, channels: int, out_channels: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.conv = nn.Conv3d(channels, out_channels, kernel_size=3, padding=(0, 1, 1))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """(B, C, F, H, W) -> (B, C', F, H, W). With `memory` x is a piece, and the output has F-1 to F+1 frames:
        a frame of the decoder's output waits for the input frame after it."""
        past = [] if memory is None else memory.get(self, [])  # the last two frames before this piece
        front = past or [x[:, :, :1]] * (2 if self.causal else 1)
        behind = [x[:, :, -1:]] if not self.causal and (memory is None or memory.last) else []
        x = torch.cat([*front, x, *behind], dim=2)  # (B, C, F+2, H, W); of a piece, other sizes too
        if memory is not None and x.shape[2]:
            memory[self] = [x[:, :, -2:].clone()]  # a view would keep all of x alive
        if x.shape[2] < 3:  # too few frames for one frame of output
            return x.new_empty(x.shape[0], self.conv.out_channels, 0, *x.shape[3:])
        return self.conv(x)  # (B, C', F, H, W)


class ResBlock(nn.Module):
    """x + conv2(SiLU(norm(conv1(SiLU(norm(x))))))"""

    def __init__(self, channels: int, causal: bool):
        super().__init__()
        self.conv1 = Conv3d(channels, channels, causal)
        self.conv2 = Conv3d(channels, channels, causal)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        h = self.conv1(F.silu(pixel_norm(x)), memory)
        h = self.conv2(F.silu(pixel_norm(h)), memory)
        if memory is not None:  # the decoder's convolutions lag behind: x waits until its frame of h is there
            x = torch.cat([memory[self], x], dim=2) if self in memory else x
            memory[self] = x[:, :, h.shape[2] :].clone()
            x = x[:, :, : h.shape[2]]
        return x + h


class ResStack(nn.Module):
    """`res_x` of the config: residual blocks at one resolution."""

    def __init__(self, channels: int, layers: int, causal: bool):
        super().__init__()
        self.res_blocks = nn.ModuleList([ResBlock(channels, causal) for _ in range(layers)])

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        for block in self.res_blocks:
            x = block(x, memory)
        return x


class Downsample(nn.Module):
    """`compress_*_res` of the encoder: conv and space-to-depth, plus a skip of means over channel groups."""

    def __init__(self, channels: int, out_channels: int, stride: tuple[int, int, int]):
        super().__init__()
        self.stride, self.out_channels = stride, out_channels
        self.conv = Conv3d(channels, out_channels // math.prod(stride), causal=True)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """(B, C, 2k+1, H, W) -> (B, C', k+1, H/2, W/2) with the stride (2, 2, 2)"""
        if self.stride[0] == 2 and (memory is None or self.conv not in memory):
            x = torch.cat([x[:, :, :1], x], dim=2)  # the first frame twice: 2k+1 become even
        skip = reduce(space_to_depth(x, self.stride), "b (c g) f h w -> b c f h w", "mean", c=self.out_channels)
        return space_to_depth(self.conv(x, memory), self.stride) + skip  # (B, C', k+1, H/2, W/2)


class Upsample(nn.Module):
    """`compress_*` of the decoder: conv to more channels, then depth-to-space. There is no skip."""

    def __init__(self, channels: int, out_channels: int, stride: tuple[int, int, int]):
        super().__init__()
        self.stride = stride
        self.conv = Conv3d(channels, out_channels * math.prod(stride), causal=False)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """(B, C, k+1, H, W) -> (B, C', 2k+1, 2H, 2W) with the stride (2, 2, 2)"""
        x = depth_to_space(self.conv(x, memory), self.stride)  # (B, C', 2k+2, 2H, 2W)
        memory = Memory() if memory is None else memory
        if self.stride[0] == 2 and x.shape[2] and self not in memory:
            memory[self] = True
            x = x[:, :, 1:]  # the video's first latent frame stands for 1 frame, not for 2
        return x


class Encoder(nn.Module):
    """Video (B, 3, F, H, W) -> latents (B, C, T, h, w) without normalization."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.patch, channels = config["patch_size"], config["encoder_base_channels"]
        self.conv_in = Conv3d(config["in_channels"] * self.patch**2, channels, causal=True)
        self.down_blocks = nn.ModuleList()
        for kind, options in config["encoder_blocks"]:
            before, stride = channels, block_stride(kind, "_res")
            channels = before * options.get("multiplier", 1)
            stack = kind == "res_x"
            block = ResStack(channels, options["num_layers"], True) if stack else Downsample(before, channels, stride)
            self.down_blocks.append(block)
        self.conv_out = Conv3d(channels, config["latent_channels"] + 1, causal=True)  # means, and an unused variance

    def patches(self, video: Tensor) -> Tensor:
        """(B, 3, F, H, W) -> (B, 3 r q, F, H/q, W/r). The released layout has width before height in patches."""
        return rearrange(video, "b c f (h q) (w r) -> b (c r q) f h w", q=self.patch, r=self.patch)

    def forward(self, video: Tensor, memory: Memory | None = None) -> Tensor:
        x = self.conv_in(self.patches(video), memory)  # (B, base channels, F, H/4, W/4)
        for block in self.down_blocks:  # to (B, C', T, h, w)
            x = block(x, memory)
        return self.conv_out(F.silu(pixel_norm(x)), memory)[:, :-1]  # (B, C, T, h, w)


class Decoder(nn.Module):
    """Latents (B, C, T, h, w) without normalization -> video (B, 3, F, H, W)."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.patch, blocks = config["patch_size"], config["decoder_blocks"]
        channels = config["decoder_base_channels"] * math.prod(o.get("multiplier", 1) for _, o in blocks)
        self.conv_in = Conv3d(config["latent_channels"], channels, causal=False)
        self.up_blocks = nn.ModuleList()
        for kind, options in reversed(blocks):
            before, stride = channels, block_stride(kind)
            channels = before // options.get("multiplier", 1)
            stack = kind == "res_x"
            block = ResStack(channels, options["num_layers"], False) if stack else Upsample(before, channels, stride)
            self.up_blocks.append(block)
        self.conv_out = Conv3d(channels, config["out_channels"] * self.patch**2, causal=False)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)  # (B, C', T, h, w)
        for block in self.up_blocks:  # to (B, base channels, F, H/4, W/4)
            # Under the identity losses only each block's input is kept; the backward pass runs the block again.
            x = recompute(block, x, use_reentrant=False) if x.requires_grad else block(x)
        return self.to_pixels(x)  # (B, 3, F, H, W)

    def to_pixels(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """The output layer: (B, base channels, F, H/4, W/4) -> (B, 3, F, H, W)"""
        x = self.conv_out(F.silu(pixel_norm(x)), memory)  # (B, 3 r q, F, H/q, W/r)
        return rearrange(x, "b (c r q) f h w -> b c f (h q) (w r)", q=self.patch, r=self.patch)

    def stream(self, z: Tensor, chunk: int) -> Iterator[Tensor]:
        """The frames of `forward`, in pieces of at most `chunk` latent frames. Each layer pulls from the one before."""
        parts, memory, limit = z.split(chunk, dim=2), Memory(), chunk
        pieces: Iterable = [(part, k + 1 == len(parts)) for k, part in enumerate(parts)]
        for layer in (self.conv_in, *self.up_blocks, self.to_pixels):
            limit *= layer.stride[0] if isinstance(layer, Upsample) else 1
            pieces = run_in_pieces(layer, pieces, memory, limit)
        return (piece for piece, _ in pieces)


class ChannelStatistics(nn.Module):
    """Mean and standard deviation of each latent channel over LTX's training data: the DiT sees (z - mean) / std."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean-of-means", torch.zeros(channels))  # the names in the released file
        self.register_buffer("std-of-means", torch.ones(channels))

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Both as (C, 1, 1, 1), to go with (B, C, T, h, w)."""
        return tuple(rearrange(self._buffers[name], "c -> c 1 1 1") for name in ("mean-of-means", "std-of-means"))


class VideoVAE(nn.Module):
    """Encoder, decoder and statistics. `scale` is the (frames, rows, columns) that one latent cell covers."""

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
        """Eq. 1, z = E_vae(video): (B, 3, F, H, W) in [-1, 1] -> latents (B, C, T, h, w), normalized per channel.

        The latents are the encoder's means; nothing is drawn. `chunk`: latent frames processed at a time, None for all.
        The size must be 8k+1 frames and sides of 32h and 32w; otherwise ValueError.
        """
        frames, height, width = video.shape[2:]
        time, rows, columns = self.scale
        if (frames - 1) % time or height % rows or width % columns:
            raise ValueError(f"{frames} frames, {height}x{width}: the VAE takes {time}k+1 frames, {rows}h x {columns}w")
        mean, std = self.per_channel_statistics.mean_and_std()
        if chunk is None or frames <= chunk * time:
            return (self.encoder(video) - mean) / std
        first, memory = time * (chunk - 1) + 1, Memory()
        pieces = [video[:, :, :first], *video[:, :, first:].split(chunk * time, dim=2)]
        z = torch.cat([self.encoder(piece, memory) for piece in pieces], dim=2)  # (B, C, T, h, w)
        return (z - mean) / std

    def decode(self, z: Tensor, chunk: int | None = None) -> Tensor:
        """Eq. 7, video = D_vae(z): normalized latents (B, C, T, h, w) -> (B, 3, F, H, W), about [-1, 1], not clamped.

        `chunk`: latent frames processed at a time, None for all. A gradient needs None: `stream` recomputes nothing.
        """
        mean, std = self.per_channel_statistics.mean_and_std()
        z = z * std + mean
        if chunk is None or z.shape[2] <= chunk:
            return self.decoder(z)
        batch, _, frames, height, width = z.shape
        time, rows, columns = self.scale
        video, done = z.new_empty(batch, 3, time * (frames - 1) + 1, rows * height, columns * width), 0
        for piece in self.decoder.stream(z, chunk):
            video[:, :, done : done + piece.shape[2]] = piece
            done += piece.shape[2]
        return video


def to_tokens(z: Tensor) -> Tensor:
    """Latents (B, C, T, h, w) -> the DiT's tokens (B, N, C), N = T h w, columns fastest"""
    return rearrange(z, "b c t h w -> b (t h w) c")


def from_tokens(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Tokens (B, N, C) -> latents (B, C, T, h, w) of the grid (T, h, w), the inverse of `to_tokens`"""
    t, h, w = grid
    return rearrange(tokens, "b (t h w) c -> b c t h w", t=t, h=h, w=w)


def latent_scale(config: dict[str, Any]) -> tuple[int, int, int]:
    """The (frames, rows, columns) that one latent cell covers, from the VAE's config. LTX-2.3: (8, 32, 32)."""
    strides = [block_stride(kind, "_res") for kind, _ in config["encoder_blocks"]]
    time, rows, columns = (math.prod(axis) for axis in zip((1, config["patch_size"], config["patch_size"]), *strides))
    return time, rows, columns

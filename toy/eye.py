"""A small convolutional network that reads pose, light, colors and traits from a frame of the tiny world.

A model's video comes without the renderer's parameters, which `toy/judge.py` needs. This network is trained on drawn
frames of the train split, degraded as a generative model degrades them, to predict the parameters:

    frame (3, 64, 64) ──> 4 convolutions ──> 8x8 cells ──> linear, 96 ──┬─> scene  toy.scene_vector, 23 numbers
                                                                        ├─> skin   0 to 1
                                                                        └─> hair, style, glasses, beard: classes

    python -m toy.judge --train out/judge.safetensors           # about an hour on one core
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from checkpoint import NAMES, write
from common.errors import UserError
from common.images import require_file
from common.media import from_bytes, to_bytes
from common.schema import parse_json, record
from evaluation.curricular import require_finite
from toy import world as toy
from toy.portrait import landmarks, render
from toy.traits import TRAITS, Identity

SIZE = 64  # side of its frames, pixels
SCENE = [*toy.POSE, "light x", "light y", "light strength", "light warmth"]  # toy.scene_vector's order
SCENE += [f"{of} {color}" for of in ("background", "shirt") for color in ("red", "green", "blue")]
SCENE += list(toy.BACKGROUNDS)[1:]
CLASSES = {trait: list(TRAITS[trait]) for trait in ("hair", "style", "glasses", "beard")}
MIRRORED = [SCENE.index(name) for name in ("yaw", "roll", "x", "light x")]  # change sign in a mirror
LENGTHS = [len(names) for names in CLASSES.values()]
NUMBERS = len(SCENE) + 1
LR = 2.5e-3
POOL = 1024  # clips of 8 frames that training draws from
Width = Annotated[int, Field(gt=0, le=1024)]


@record
class Sizes:
    """The network's sizes, in the metadata of its file."""

    channels: tuple[Width, Width, Width, Width]
    points: Width
    cells: Width
    hidden: Width


class Eye(nn.Module):
    """Frames (n, 3, 64, 64) in [-1, 1] -> numbers (n, 24), scene vector and skin in their own units; logits (n, 27) of
    the classes; landmarks (n, 5, 2) from 0 to 1, an output for its training only."""

    def __init__(self, channels: Sequence[int] = (24, 48, 64, 96), points: int = 32, cells: int = 16, hidden: int = 96):
        super().__init__()
        self.sizes = {"channels": list(channels), "points": points, "cells": cells, "hidden": hidden}
        a, b, c, d = channels

        def layer(before: int, after: int, kernel: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
            return [convolution, nn.BatchNorm2d(after), nn.ReLU()]

        self.fine = nn.Sequential(*layer(3, a, 5, 2), *layer(a, b, 3, 2), *layer(b, c, 3, 1))  # (n, c, 16, 16)
        self.maps = nn.Conv2d(c, points, 1)
        self.coarse = nn.Sequential(*layer(c, d, 3, 2), nn.Conv2d(d, cells, 1), nn.ReLU(), nn.Flatten())  # to 64 cells
        self.landmarks = nn.Linear(2 * points, 10)
        first, second = nn.Linear(cells * 64 + 2 * points, hidden), nn.Linear(hidden, hidden)
        self.hidden = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.head = nn.Linear(hidden, NUMBERS + sum(LENGTHS))
        self.register_buffer("mean", torch.zeros(NUMBERS))
        self.register_buffer("deviation", torch.ones(NUMBERS))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.fine(frames)
        weight = self.maps(fine).flatten(2).softmax(2).unflatten(2, fine.shape[2:])  # (n, points, 16, 16)
        line = torch.linspace(-2, 2, fine.shape[3], device=frames.device)
        points = torch.cat([(weight.sum(axis) * line).sum(2) for axis in (2, 3)], 1)  # x and y of each map's center
        out = self.head(self.hidden(torch.cat([self.coarse(fine), points], 1)))
        return self.mean + self.deviation * out[:, :NUMBERS], out[:, NUMBERS:], self.landmarks(points).view(-1, 5, 2)

    @torch.no_grad()
    def read(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        """frames (n, H, W, 3) bytes -> "scene" (n, 23), "skin" (n,), and for each of CLASSES the class numbers (n,)."""
        parts = []
        for chunk in np.array_split(frames, max(1, len(frames) // 256)):
            x = from_bytes(torch.from_numpy(chunk).to(self.mean.device)).permute(0, 3, 1, 2)
            parts.append(self(F.interpolate(x, (SIZE, SIZE), mode="area"))[:2])  # the same frames where they have SIZE
        numbers, logits = (torch.cat(column).cpu() for column in zip(*parts))
        reading = {"scene": numbers[:, :-1].numpy(), "skin": numbers[:, -1].numpy()}
        return reading | {trait: part.argmax(1).numpy() for trait, part in zip(CLASSES, logits.split(LENGTHS, 1))}

    @classmethod
    def from_file(cls, path: str | Path, device: str | torch.device = "cpu") -> "Eye":
        try:
            require_file(path, "file")
            with safe_open(path, "pt") as file:
                eye = cls(**vars(parse_json(Sizes, (file.metadata() or {})["eye"], path)))
                eye.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()}, strict=False)  # noqa: SIM118
        except (UserError, SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{path} is no judge ({reason}): make it with python -m toy.judge --train {path}") from None
        require_finite(eye.state_dict(), path)
        return eye.to(device).eval()

    def save(self, path: str | Path) -> None:
        tensors = {k: v for k, v in self.state_dict().items() if v.is_floating_point()}
        entries = [(k, NAMES[torch.bfloat16], list(v.shape), lambda v=v: v) for k, v in tensors.items()]
        write(path, entries, {"eye": json.dumps(self.sizes)})


def targets(who: Identity, scene: toy.Scene) -> tuple[np.ndarray, np.ndarray]:
    """The network's targets for each frame: numbers (F, 24) and classes (F, 4)."""
    vector = toy.scene_vector(scene)
    numbers = np.concatenate([vector, np.full((len(vector), 1), who["skin"], np.float32)], 1)
    return numbers, np.tile([choices.index(who[trait]) for trait, choices in CLASSES.items()], (len(vector), 1))


def drawn(seed: int, split: str, frames: int = 8) -> Iterator[tuple[np.ndarray, ...]]:
    """Endless clips of random frames, each of a new person: frames (F, 64, 64, 3), numbers (F, 24), classes (F, 4),
    landmarks (F, 5, 2)."""
    for number in count():
        rng = np.random.default_rng((seed, number))
        who, scene = toy.person(seed, number, split), toy.draw_scene(rng, 17, 12.0, split)
        at = rng.choice(17, frames, replace=False)
        scene = replace(scene, pose={track: values[at] for track, values in scene.pose.items()})
        yield render(who, scene, SIZE), *targets(who, scene), landmarks(who, scene, SIZE) / SIZE


def worsen(x: Tensor) -> Tensor:
    """Degrade frames (n, 3, 64, 64) as a generative model does: color shift, seams every 16 pixels, blur, noise, each
    with a random strength."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(len(x), *shape, device=x.device)

    seams, blur, grain = torch.rand(3, len(x), 1, 1, 1, device=x.device)
    x = x * (1 + 0.05 * noise(3, 1, 1)) + 0.04 * noise(3, 1, 1)
    x = x + 0.06 * seams * F.interpolate(noise(3, 4, 4), scale_factor=16)
    soft = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    softer = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.where(blur < 0.4, x, torch.where(blur < 0.75, soft, softer))
    return (x + 0.1 * grain**2 * noise(3, SIZE, SIZE)).clamp(-1, 1)


def train(path: str | Path, seconds: float, seed: int, device: torch.device, batch: int = 64) -> Eye:
    """Train for `seconds`. The moving average of the weights is saved every 500 steps and at the end. Batches come from
    a pool of frames whose oldest are replaced at every step."""
    torch.manual_seed(seed)
    begun, rng, source = time.perf_counter(), np.random.default_rng(seed), drawn(seed, "train")
    eye = Eye().to(device, memory_format=torch.channels_last)
    pool = [np.concatenate(column) for column in zip(*[next(source) for _ in range(POOL)])]
    eye.mean.copy_(torch.from_numpy(pool[1].mean(0)))
    eye.deviation.copy_(torch.from_numpy(pool[1].std(0)).clamp(min=1e-3))  # a small pool may hold a single kind
    optimizer = torch.optim.AdamW(eye.parameters(), weight_decay=0.02)
    average = AveragedModel(eye, multi_avg_fn=get_ema_multi_avg_fn(0.996), use_buffers=True)
    sign, weight = torch.ones(2, NUMBERS, device=device)
    sign[MIRRORED] = -1
    weight[: len(toy.POSE)] = 2
    step, at = 0, 0
    while (passed := time.perf_counter() - begun) < seconds:
        for _ in range(batch // 32):  # new frames: a quarter of a batch
            for store, new in zip(pool, next(source)):
                store[at : at + len(new)] = new
            at = (at + 8) % len(pool[0])
        pick = rng.integers(len(pool[0]), size=batch)
        pixels, y, labels, points = (torch.from_numpy(store[pick]).to(device) for store in pool)
        x = from_bytes(pixels).permute(0, 3, 1, 2)
        mirror = torch.rand(batch, 1, device=device) < 0.5
        x = torch.where(mirror[..., None, None], x.flip(3), x)
        y = torch.where(mirror, y * sign, y)
        other = points[:, [1, 0, 2, 4, 3]] * points.new_tensor([-1, 1]) + points.new_tensor([1 - 1 / SIZE, 0])
        points = torch.where(mirror[..., None], other, points)
        numbers, logits, at_points = eye(worsen(x))
        loss = (weight * ((numbers - y) / eye.deviation).square()).mean() + 50 * (at_points - points).square().mean()
        for trait, part in enumerate(logits.split(LENGTHS, 1)):
            loss = loss + 0.1 * F.cross_entropy(part, labels[:, trait])
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 50)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        average.update_parameters(eye)
        if step % 100 == 0:
            off = SIZE * (at_points - points).square().sum(2).sqrt().mean().item()
            print(f"step {step:5}  loss {loss.item():.3f}  landmarks {off:.1f} px  {passed:.0f} s", flush=True)
        if step % 500 == 0:
            average.module.save(path)
    average.module.save(path)
    return average.module.eval()


def accuracy(eye: Eye, seed: int, clips: int, worse: bool) -> dict[str, float]:
    """On people and scenes of the test split: R^2 of each number, share of right answers for each trait."""
    source = drawn(seed, "test", 4)
    columns = zip(*[next(source) for _ in range(clips)])
    frames, numbers, classes, _ = (np.concatenate(column) for column in columns)
    if worse:
        torch.manual_seed(seed)
        x = worsen(from_bytes(frames).permute(0, 3, 1, 2))
        frames = to_bytes(x).permute(0, 2, 3, 1).numpy()
    reading = eye.read(frames)
    read = np.concatenate([reading["scene"], reading["skin"][:, None]], 1)
    rest = ((read - numbers) ** 2).mean(0) / numbers.var(0)
    result = dict(zip([*SCENE, "skin"], (1 - rest).tolist()))
    return result | {trait: float((reading[trait] == classes[:, k]).mean()) for k, trait in enumerate(CLASSES)}

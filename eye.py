"""What a frame of the tiny world shows, read back from its pixels by a small convolutional network.

A model's video comes without the renderer's parameters. To say how far its head turned, from where its light comes,
which hair its person has, something must look. This network was shown drawn frames (people and scenes of the train
split, made worse as a generative model makes them) and learned to say what they were drawn from:

    frame (3, 64, 64) ──> 4 convolutions ──> 8x8 cells ──> linear, 80 ──┬─> scene  toy.scene_vector, 23 numbers
                                                                        ├─> skin   the trait, 0 to 1
                                                                        └─> hair, style, glasses, beard: classes

    python judge.py --train assets/judge.safetensors        # ten minutes on one core
"""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import toy
from checkpoint import NAMES, write
from errors import UserError
from portrait import render
from traits import TRAITS, Identity

SIZE = 64  # side of the frames that it knows
SCENE = [*toy.POSE, "light x", "light y", "light strength", "light warmth"]  # toy.scene_vector's order
SCENE += [f"{what} {part}" for what in ("background", "shirt") for part in ("red", "green", "blue")]
SCENE += list(toy.BACKGROUNDS)[1:]
CLASSES = {trait: list(TRAITS[trait]) for trait in ("hair", "style", "glasses", "beard")}
MIRRORED = [SCENE.index(name) for name in ("yaw", "roll", "x", "light x")]  # change sign in a mirror
NUMBERS = len(SCENE) + 1


class Eye(nn.Module):
    """Frames (n, 3, 64, 64) in [-1, 1] -> (n, 24 + 27): scene vector and skin in their own units, then logits."""

    def __init__(self, channels: tuple[int, ...] = (24, 48, 64, 96), cells: int = 24, hidden: int = 80):
        super().__init__()
        self.sizes = {"channels": list(channels), "cells": cells, "hidden": hidden}
        layers, before = [], 3
        for width, kernel, stride in zip(channels, (5, 3, 3, 3), (2, 2, 1, 2)):
            layers += [nn.Conv2d(before, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.ReLU()]
            before = width
        layers += [nn.Conv2d(before, cells, 1), nn.ReLU(), nn.Flatten()]
        layers += [nn.Linear(cells * (SIZE // 8) ** 2, hidden), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(hidden, NUMBERS + sum(map(len, CLASSES.values())))
        self.register_buffer("mean", torch.zeros(NUMBERS))
        self.register_buffer("deviation", torch.ones(NUMBERS))

    def forward(self, frames: Tensor) -> Tensor:
        out = self.head(self.body(frames))
        return torch.cat([self.mean + self.deviation * out[:, :NUMBERS], out[:, NUMBERS:]], 1)

    @torch.no_grad()
    def read(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        """frames (n, H, W, 3) bytes -> "scene" (n, 23), "skin" (n,), and each of CLASSES as numbers in it (n,)."""
        parts = []
        for chunk in np.array_split(frames, max(1, len(frames) // 256)):
            x = torch.from_numpy(chunk).to(self.mean.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            if x.shape[2:] != (SIZE, SIZE):
                x = F.interpolate(x, (SIZE, SIZE), mode="area")
            parts.append(self(x).cpu())
        return split_outputs(torch.cat(parts).numpy())

    @classmethod
    def from_file(cls, path: str | Path, device: str | torch.device = "cpu") -> "Eye":
        try:
            with safe_open(path, "pt") as file:
                eye = cls(**json.loads((file.metadata() or {})["eye"]))
                eye.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()}, strict=False)  # noqa: SIM118
        except (SafetensorError, FileNotFoundError, KeyError, ValueError, TypeError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{path} is no judge ({reason}): make it with python judge.py --train {path}") from None
        return eye.to(device).eval()

    def save(self, path: str | Path) -> None:
        tensors = {k: v for k, v in self.state_dict().items() if v.is_floating_point()}
        entries = [(k, NAMES[torch.bfloat16], list(v.shape), lambda v=v: v) for k, v in tensors.items()]
        write(path, entries, {"eye": json.dumps(self.sizes)})


def split_outputs(outputs: np.ndarray) -> dict[str, np.ndarray]:
    """(n, 24 + 27) -> the parts by name; of a class the most likely."""
    told, at = {"scene": outputs[:, : NUMBERS - 1], "skin": outputs[:, NUMBERS - 1]}, NUMBERS
    for trait, choices in CLASSES.items():
        told[trait] = outputs[:, at : at + len(choices)].argmax(1)
        at += len(choices)
    return told


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def targets(who: Identity, scene: toy.Scene) -> tuple[np.ndarray, np.ndarray]:
    """What the network should say of each frame: numbers (F, 24) and classes (F, 4)."""
    vector = toy.scene_vector(scene)
    numbers = np.concatenate([vector, np.full((len(vector), 1), who["skin"], np.float32)], 1)
    return numbers, np.tile([choices.index(who[trait]) for trait, choices in CLASSES.items()], (len(vector), 1))


def drawn(seed: int, split: str, frames: int = 8) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Endless (frames (F, 64, 64, 3), numbers (F, 24), classes (F, 4)): each time someone new, somewhere in a clip."""
    number = 0
    while True:
        rng = np.random.default_rng((seed, number))
        who, scene = toy.person(seed, number, split), toy.draw_scene(rng, 17, 12.0, split)
        at = rng.choice(17, frames, replace=False)
        scene = replace(scene, pose={track: values[at] for track, values in scene.pose.items()})
        yield render(who, scene, SIZE), *targets(who, scene)
        number += 1


def worsen(x: Tensor) -> Tensor:
    """Frames (n, 3, 64, 64) as a generative model might make them: a shift of color, seams of 16 pixels, softness,
    noise, each of a strength of its own."""

    def dice(*shape: int) -> Tensor:
        return torch.randn(len(x), *shape, device=x.device)

    strength = torch.rand(3, len(x), 1, 1, 1, device=x.device)
    x = x * (1 + 0.05 * dice(3, 1, 1)) + 0.04 * dice(3, 1, 1)
    x = x + 0.06 * strength[0] * F.interpolate(dice(3, 4, 4), scale_factor=16)
    soft = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    softer = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.where(strength[1] < 0.4, x, torch.where(strength[1] < 0.75, soft, softer))
    return (x + 0.1 * strength[2] ** 2 * dice(3, SIZE, SIZE)).clamp(-1, 1)


def train(path: str | Path, seconds: float, seed: int, device: torch.device, batch: int = 128) -> Eye:
    """Learn for so many seconds, then write the file. Frames come from a pool that is renewed all the time."""
    torch.manual_seed(seed)
    eye, source, rng = Eye().to(device, memory_format=torch.channels_last), drawn(seed, "train"), np.random.default_rng(seed)
    pool = [next(source) for _ in range(256)]
    begun = time.perf_counter()
    frames, numbers, classes = (np.concatenate(column) for column in zip(*pool))
    eye.mean.copy_(torch.from_numpy(numbers.mean(0)))
    eye.deviation.copy_(torch.from_numpy(numbers.std(0)))
    optimizer = torch.optim.AdamW(eye.parameters(), lr=1.0, weight_decay=0.02)
    step, at, sign = 0, 0, torch.ones(NUMBERS, device=device)
    sign[MIRRORED] = -1
    while (share := (time.perf_counter() - begun) / seconds) < 1:
        for _ in range(batch // 16):  # half a batch is new
            for store, new in zip((frames, numbers, classes), next(source)):
                store[at : at + len(new)] = new
            at = (at + 8) % len(frames)
        pick = rng.integers(len(frames), size=batch)
        x = torch.from_numpy(frames[pick]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        y, labels = torch.from_numpy(numbers[pick]).to(device), torch.from_numpy(classes[pick]).to(device)
        mirror = torch.rand(batch, 1, device=device) < 0.5
        x = torch.where(mirror[..., None, None], x.flip(3), x)
        y = torch.where(mirror, y * sign, y)
        out = eye(worsen(x))
        loss = ((out[:, :NUMBERS] - y) / eye.deviation).square().mean()
        for trait, logits in enumerate(out[:, NUMBERS:].split([*map(len, CLASSES.values())], 1)):
            loss = loss + 0.1 * F.cross_entropy(logits, labels[:, trait])
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50, 1.02 - share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:5}  loss {loss.item():.3f}  {share:4.0%} of {seconds:.0f} s", flush=True)
        step += 1
    eye.eval().save(path)
    return eye


def accuracy(eye: Eye, seed: int, clips: int, worse: bool) -> dict[str, float]:
    """On people and scenes of the test split: R^2 of each number, share right of each class."""
    source = drawn(seed, "test", 4)
    frames, numbers, classes = (np.concatenate(column) for column in zip(*[next(source) for _ in range(clips)]))
    if worse:
        torch.manual_seed(seed)
        x = worsen(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1)
        frames = ((x.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    told = eye.read(frames)
    read = np.concatenate([told["scene"], told["skin"][:, None]], 1)
    rest = ((read - numbers) ** 2).mean(0) / numbers.var(0)
    result = dict(zip([*SCENE, "skin"], (1 - rest).tolist()))
    return result | {trait: float((told[trait] == classes[:, k]).mean()) for k, trait in enumerate(CLASSES)}

"""A rehearsal of a run before its files are there: three real steps on random weights and random clips.

    plan ──> as many layers as fit this machine ──> RandomCheckpoint, RandomClips ──> train.train ──> plan | measured

Processes, shards, optimizer, batches and losses are the run's own, so memory and speed are those of the run. Faces are
found and compared by the models in assets/, because a pack by name would be a download.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from checkpoint import Checkpoint, file_name
from clips.cache import TYPICAL_TOKENS
from common.cache import Bucket
from common.errors import UserError
from common.schema import validate
from common.sizes import amount
from config import ASSETS, Config
from data import CachedClips
from engine.logbook import peak_tflops
from engine.parallel import report
from engine.plan import GIB, USABLE, Plan, plan_of
from face import CROP, ArcFace, recognition_file
from model import LTXVideo
from text import TextConnector
from vae import VideoVAE

MOST_ON_CPU = 1e15  # operations of a step; a CPU takes an hour and more for them


class RandomCheckpoint(Checkpoint):
    """A checkpoint without a file: the names and shapes of `ltx`, numbers drawn when they are read."""

    def __init__(self, ltx: dict[str, Any]):
        self.path, self.config, self.ours, self.layers = Path("random weights"), ltx, {}, {}
        with torch.device("meta"):
            parts = LTXVideo(ltx["transformer"]), TextConnector(ltx["transformer"], 1), VideoVAE(ltx["vae"])
        self.tensors = {
            file_name(name, part.PREFIXES): {"dtype": "BF16", "shape": list(slot.shape)}
            for part in parts
            for name, slot in part.state_dict().items()
        }

    def read(self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        tensor = torch.empty(self.tensors[name]["shape"], dtype=dtype or torch.bfloat16, device=device)
        # Statistics of the latents are divided by, so they are 1.
        return tensor.fill_(1) if "statistics" in name else tensor.normal_(std=0.02)


class RandomClips(CachedClips):
    """Clips of the plan's size without a cache."""

    def __init__(self, plan: Plan, settings: dict[str, Any], e_ref_shape: tuple[int, ...]):
        self.settings = settings
        self.latent_shape = (plan.ltx["vae"]["latent_channels"], *plan.grid)
        self.buckets = [validate(Bucket, settings | {"latent_shape": self.latent_shape}, "rehearsal")]
        self.bucket_of = np.zeros(64, int)
        self.null_features = torch.randn(1, plan.connector.dim).bfloat16()
        self.e_ref_shape, self.names = e_ref_shape, [f"random-{k}" for k in range(64)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens = min(TYPICAL_TOKENS, self.settings["max_tokens"])
        features = torch.randn(tokens, self.null_features.shape[1]).bfloat16()
        image = Image.fromarray(np.random.default_rng(i).integers(256, size=(512, 512, 3), dtype=np.uint8))
        item = {"name": self.names[i], "caption": "", "image": image, "features": features}
        return item | {"latents": torch.randn(self.latent_shape).bfloat16(), "e_ref": torch.randn(self.e_ref_shape)}


def stand_ins(
    config: Config, ltx: dict[str, Any], settings: dict[str, Any], device: torch.device
) -> tuple[Config, Checkpoint, CachedClips]:
    """Options, checkpoint and clips of a rehearsal of a run. UserError if not even one layer of the model fits."""
    plan = plan_of(config, ltx, settings)
    if device.type == "cpu" and (operations := plan.flops_per_sample() * config.optim.batch) > MOST_ON_CPU:
        raise UserError(f"one step is {operations:.1e} operations: rehearse on GPUs; --plan computes without")
    faces = replace(config.faces, pack=str(ASSETS / "faces") if config.faces.pack else "")
    changes = {"data": replace(config.data, holdout=0), "model": replace(config.model, scratch=False)}
    config = replace(config, faces=faces, **changes)
    layers, most = layers_that_fit(config, ltx, settings, device), ltx["transformer"]["num_layers"]
    where = f"{amount(memory(device))} for each of {dist.get_world_size()}"
    report(f"rehearsal on random numbers: {layers} of {most} layers; processes have {where}")
    shape: tuple[int, ...] = (1,)
    if faces.pack:
        shape = tuple(ArcFace.from_onnx(recognition_file(faces.pack))(torch.zeros(1, 3, CROP, CROP)).shape[1:])
    size = dict(zip(("frames", "height", "width"), plan.size)) | {key: settings[key] for key in ("fps", "max_tokens")}
    return config, RandomCheckpoint(with_layers(ltx, layers)), RandomClips(plan, size, shape)


def memory(device: torch.device) -> float:
    """Bytes for one process: those of its GPU, or its part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / dist.get_world_size()


def with_layers(ltx: dict[str, Any], layers: int) -> dict[str, Any]:
    return ltx | {"transformer": ltx["transformer"] | {"num_layers": layers}}


def layers_that_fit(config: Config, ltx: dict[str, Any], settings: dict[str, Any], device: torch.device) -> int:
    """The number of layers whose plan fits the memory, which grows linearly with the layers."""

    def needed(layers: int) -> float:
        return sum(plan_of(config, with_layers(ltx, layers), settings).memory(dist.get_world_size()).values())

    most, room = ltx["transformer"]["num_layers"], USABLE * memory(device)
    whole, one = needed(most), needed(1)
    if one > room:
        advice = "take more GPUs or a smaller parallel.micro_batch"
        raise UserError(f"one layer needs {amount(one)} a process, and there are {amount(room)}: {advice}")
    return most if whole <= room else 1 + int((room - one) / ((whole - one) / (most - 1)))


def compare(figures: dict[str, float], plan: Plan, recompute: str | int, mfu: float) -> str:
    """The plan of the rehearsed layers beside the measured figures of the last step. Called by every rank."""
    world, on_gpu, peak = dist.get_world_size(), torch.cuda.is_available(), peak_tflops()
    most = torch.tensor(figures["memory_gib"], device="cuda" if on_gpu else "cpu")
    dist.all_reduce(most, dist.ReduceOp.MAX)
    planned = sum(plan.memory(world, recompute).values()) / GIB
    name = "memory per GPU, GiB" if on_gpu else "memory per process, GiB (measured with PyTorch's own)"
    lines = ["\n| | plan | measured |\n|---|---:|---:|", f"| {name} | {planned:.2f} | {most.item():.2f} |"]
    if not peak:
        return "\n".join([*lines, f"| seconds a step | | {figures['seconds']:.2f} |\n\nno MFU: unknown device"])
    reached, share = plan.mfu(mfu, recompute), figures["tflops"] / peak
    seconds = plan.flops_per_sample() * plan.config.optim.batch / world / (peak * 1e12 * reached)
    lines += [
        f"| seconds a step | {seconds:.2f} | {figures['seconds']:.2f} |",
        f"| MFU | {reached:.1%} | {share:.1%} |",
    ]
    advice = f"--plan --gpus {world} --mfu {mfu * share / reached:.3f} prints the days of the run at this speed"
    return "\n".join([*lines, f"\n{advice}"])

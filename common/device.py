"""Where a process computes: device, precision, and its place among the processes of torchrun."""

import argparse
import gc
import os
import platform
import re
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from common.errors import UserError
from common.schema import record, validate

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_device(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device that --device names, tried out, and the dtype of --dtype: bfloat16 on a GPU, float32 on a CPU."""
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"device {options.device!r} cannot be used here ({reason}): try --device cpu") from None
    return device, DTYPES[options.dtype or ("float32" if device.type == "cpu" else "bfloat16")]


def free(device: torch.device) -> None:
    """Give back the memory of objects that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> str:
    """The devices of train.py on this machine."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    facts = Path("/proc/cpuinfo")  # of Linux; it names no model on ARM
    names = re.findall(r"model name\s*:\s*(.*)", facts.read_text() if facts.is_file() else "")
    return f"{cores()} cores of {[*names, platform.machine()][0]}, PyTorch {torch.__version__}"


class Place(NamedTuple):
    rank: int
    world: int  # number of processes
    local_rank: int  # among those of this machine


@record
class _Environment:
    RANK: Annotated[int, Field(strict=False, ge=0, lt=2**20)] = 0
    WORLD_SIZE: Annotated[int, Field(strict=False, ge=1, le=2**20)] = 1
    LOCAL_RANK: Annotated[int, Field(strict=False, ge=0, lt=2**20)] = 0


def own_place() -> Place:
    """Rank 0 of 1 without torchrun. UserError where the variables are no numbers or contradict each other."""
    variables = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ}
    place = validate(_Environment, variables, "environment")
    if ("RANK" in variables) != ("WORLD_SIZE" in variables):
        raise UserError("environment: RANK and WORLD_SIZE go together: use torchrun, or unset both")
    if place.RANK >= place.WORLD_SIZE:
        raise UserError(f"environment: RANK = {place.RANK} is not below WORLD_SIZE = {place.WORLD_SIZE}: use torchrun")
    return Place(place.RANK, place.WORLD_SIZE, place.LOCAL_RANK)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without waiting for what runs there."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values

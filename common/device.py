"""Where and in which precision a command computes."""

import argparse
import gc

import torch

from common.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_device(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device that --device names, tried out, and the dtype of --dtype: bfloat16 on a GPU, float32 on a CPU."""
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"device {options.device!r} cannot be used here ({reason}): try --device cpu") from None
    return device, DTYPES[options.dtype or ("float32" if device.type == "cpu" else "bfloat16")]


def free(device: torch.device) -> None:
    """Give back the memory of objects that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

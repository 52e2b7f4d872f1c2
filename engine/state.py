"""A training run on disk: checkpoints to resume from, and the export that others can load.

    runs/st-drc/
        config.json                  what the run was started with
        step-001500/                 torch.distributed.checkpoint in safetensors, every rank its own shard,
            shard-*.safetensors      of model.*, optim.* and ema.*, of what is trained; loads on any number of ranks
            progress.json            written last: a folder without it is not a checkpoint
        log.jsonl, tensorboard/, samples/

A checkpoint is written under a temporary name and renamed, so a kill leaves the last good one. Nothing random is
stored: every draw of a run follows from its seed and the sample's number (objective.py). Everything is safetensors or
JSON; nothing is unpickled.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from checkpoint import OUR_METADATA, Checkpoint, file_name, write
from common.errors import UserError
from engine.average import Average
from model import LTXVideo


def state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None
) -> dict[str, Tensor]:
    """Trained weights, their moments and average by name, sharded as they are and sharing memory with the live ones.

    Frozen weights stay in the base checkpoint. The optimizer's step counters are left out: they are all the run's step
    number.
    """
    trained = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)
    moments = get_optimizer_state_dict(model, optimizer, options=trained)
    weights = get_model_state_dict(model, options=trained)
    tensors = {f"model.{name}": value for name, value in weights.items()}
    if average:
        tensors |= {f"ema.{name}": value for name, value in zip(weights, average.tensors, strict=True)}
    tensors |= {f"optim.{name}": value for name, value in moments.items() if isinstance(value, Tensor) and value.ndim}
    return tensors


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    average: Average | None = None,
) -> Path:
    """Write the checkpoint of `step` and remove all but the last `keep`. Called by every rank."""
    folder, part = run / f"step-{step:06d}", run / f".step-{step:06d}.part"
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    dcp.save(
        state_tensors(model, optimizer, average),
        storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True),
    )
    dist.barrier()
    if dist.get_rank() == 0:
        (part / "progress.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return folder


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in run.glob("step-*/progress.json"))


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None) -> int:
    """Bring model, optimizer and average to where a checkpoint left them, on any number of ranks; returns its step."""
    step = json.loads((folder / "progress.json").read_text())["step"]
    dcp.load(state_tensors(model, optimizer, average), storage_reader=HuggingFaceStorageReader(str(folder)))
    for state in optimizer.state.values():
        state["step"].fill_(step)
    return step


def newest(run: Path) -> Path:
    """The last complete checkpoint of a run."""
    if not (folders := checkpoints(run)):
        raise UserError(f"{run} holds no complete checkpoint to export")
    return folders[-1]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's trained weights by name, put together from the shards, in float32 on the CPU; their average if
    there is one."""
    kind, sizes = _saved_weights(folder)
    tensors = {kind + name: torch.empty(size) for name, size in sizes.items()}
    _load_here(tensors, folder)
    return {name.removeprefix(kind): tensor for name, tensor in tensors.items()}


def _saved_weights(folder: Path) -> tuple[str, dict[str, torch.Size]]:
    """Under which prefix the weights to export are, and their sizes by name."""
    entries = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    kind = "ema." if any(name.startswith("ema.") for name in entries) else "model."
    return kind, {name.removeprefix(kind): entry.size for name, entry in entries.items() if name.startswith(kind)}


def _load_here(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill `tensors` from a checkpoint in this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wonders whether a single process is meant, which no_dist says
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def export(run: Path, base: Path, out: Path, ours: dict[str, Any]) -> Path:
    """The newest checkpoint in the released layout: `base` verbatim with the trained tensors replaced.

    Tensors of the audio branch, VAE, connectors and all metadata are copied byte for byte, the trained ones are cast
    to the dtype they have in the base file; `ours` goes into the metadata under a key of our own. One tensor is in
    memory at a time. ComfyUI, ltx-core and sample.py load the result as they load the base.
    """
    folder, source = newest(run), Checkpoint(base)
    kind, _ = _saved_weights(folder)
    with torch.device("meta"):
        trained = {
            file_name(name, LTXVideo.PREFIXES): name for name in LTXVideo(source.config["transformer"]).state_dict()
        }

    def fetch(name: str) -> Tensor | bytearray:
        if name not in trained:
            return source.read_bytes(name)
        tensor = torch.empty(source.tensors[name]["shape"])
        _load_here({kind + trained[name]: tensor}, folder)
        return tensor

    write(
        out,
        [
            (name, entry["dtype"], entry["shape"], lambda name=name: fetch(name))
            for name, entry in source.tensors.items()
        ],
        source.metadata | {OUR_METADATA: json.dumps(ours)},
    )
    return folder

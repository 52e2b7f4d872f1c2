"""A training run on disk: its folder, checkpoints to resume from, and the export that other programs load.

    runs/st-drc/
        config.json                  the options that the run was started with, and a digest of its cache's settings
        step-001500/                 torch.distributed.checkpoint in safetensors, every rank its own shard,
            shard-*.safetensors      of model.*, optim.* and ema.* of what is trained; loads on any number of ranks
            progress.json            written last: a folder without it is not a checkpoint
        log.jsonl, held_out.jsonl, prompts.safetensors, tensorboard/, samples/

A checkpoint is written under a temporary name and renamed, so a kill leaves the last good one. Nothing random is
stored: every draw of a run follows from its seed and the sample's number (data.py). Everything is safetensors or
JSON; nothing is unpickled.
"""

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.optim import Optimizer

from checkpoint import Checkpoint, file_name
from common.cache import digest
from common.errors import UserError, blame, write_text
from common.images import require_file
from common.outputs import refuse_folders, refuse_overwrite
from common.schema import Count, FiniteFloat, Text, foreign_record, parse_json, validate
from config import Config, LoRAOptions, as_dict, require_same_run
from engine.average import Average, local_parts
from engine.check import require_bf16
from engine.lora import save_lora, write_changed
from engine.parallel import report
from engine.recipe import encoder_metadata, export_guidance, reference_metadata
from model import LTXVideo

TENSORS_IN_FILE = 32


@foreign_record
class Progress:
    """progress.json of a checkpoint."""

    step: Count
    skipped: list[Text] = ()  # damaged samples so far, named
    held_out: FiniteFloat | None = None  # loss on the held-out clips (engine/holdout.py), if this step has one


# --- The folder of a run ----------------------------------------------------------------------------------------------


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make the run's folder and lock it: two trainers in one folder would mix their checkpoints. Called by every rank;
    rank 0 holds the lock, and the system releases it if the process is killed. A folder that is still empty at the end
    is removed."""
    problems, folder = [""], None
    if dist.get_rank() == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
            folder = os.open(run, os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problems = [f"another trainer is at work in {run}: wait for it, or give run.out another folder"]
        except OSError as error:
            problems = [f"{run} cannot be written ({error.strerror}): give run.out another folder"]
    try:
        dist.broadcast_object_list(problems)
        if problems[0]:
            raise UserError(problems[0])
        yield
    finally:
        if folder is not None:
            os.close(folder)
            with suppress(OSError):
                run.rmdir()


def require_same_options(run: Path, config: Config) -> None:
    """UserError if the run was started with other options."""
    if (run / "config.json").exists():
        require_same_run(read_record(run)[0], config, run)


def require_same_cache(run: Path, config: Config, cache: dict[str, Any]) -> None:
    """UserError if the run was started with another cache. `cache` is the settings of the cache."""
    if (run / "config.json").exists() and read_record(run)[1] not in (None, digest(cache)):
        raise UserError(f"{run} was started with another cache than {config.data.cache}: give another run.out")


def read_record(run: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """config.json of a run: its options, and the digest of its cache's settings, which very old runs lack."""
    path = run / "config.json"
    require_file(path, "file")
    record = parse_json(dict[str, Any], path.read_bytes(), path)
    cache = record.pop("cache", None)
    return validate(dict[str, dict[str, Any]], record, path), cache


def trained_lora(run: Path, config: Config) -> LoRAOptions:
    """Options of the adapters that a run trains, whatever this command's are."""
    lora = read_record(run)[0].get("lora", as_dict(config)["lora"])
    return validate(LoRAOptions, lora, f"{run / 'config.json'}: lora")


def write_record(run: Path, config: Config, cache: dict[str, Any]) -> None:
    """Write config.json of a run. Called by every rank."""
    dist.barrier()
    if dist.get_rank() == 0:
        write_text(run / "config.json", json.dumps(as_dict(config) | {"cache": digest(cache)}, indent=1))
    dist.barrier()


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [path.parent for path in run.glob("step-*/progress.json") if path.parent.name[5:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def read_progress(folder: Path) -> Progress:
    require_file(folder / "progress.json", "file of a checkpoint")
    return parse_json(Progress, (folder / "progress.json").read_bytes(), folder / "progress.json")


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the least loss on the held-out clips; None if no checkpoint has one."""
    scores = {}
    for folder in checkpoints(run):
        with suppress(UserError):  # a damaged one is not the best
            scores[folder] = read_progress(folder).held_out
    scores = {folder: score for folder, score in scores.items() if score is not None}
    return min(scores, key=scores.get, default=None)


# --- Saving and resuming ----------------------------------------------------------------------------------------------


def state_tensors(model: nn.Module, optimizer: Optimizer, average: Average | None) -> dict[str, Tensor]:
    """Trained weights, their moments and average by name, sharded as they are and sharing memory with the live ones.
    The optimizer's step counters are left out, because all of them equal the run's step number."""
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
    optimizer: Optimizer,
    keep: int,
    average: Average | None,
    skipped: list[str],
    held_out: float | None = None,
) -> Path:
    """Write the checkpoint of `step` and remove all but the last `keep` and the best. Called by every rank. UserError,
    with nothing written, where a weight, moment or average is not finite: the last good checkpoint stays."""
    folder, part = run / f"step-{step:06d}", run / f".step-{step:06d}.part"
    tensors = state_tensors(model, optimizer, average)
    require_finite(tensors, step)
    if dist.get_rank() == 0:
        remove_parts(run)
        part.mkdir(parents=True)
    dist.barrier()
    # A rank copies all tensors of a file to host memory, three times. So its shard lies in many files.
    files = {name: 1 + number // TENSORS_IN_FILE for number, name in enumerate(tensors)}
    writer = HuggingFaceStorageWriter(str(part), fqn_to_index_mapping=files, save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except Exception as error:  # a full disk comes as one of several classes
        raise UserError(f"{folder} cannot be saved ({last_line(error)}); the last checkpoint is intact") from None
    dist.barrier()
    if dist.get_rank() == 0:
        progress = {"step": step, "skipped": skipped, "held_out": held_out}
        (part / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        best = best_checkpoint(run)
        for old in checkpoints(run)[:-keep]:
            if old != best:
                old.rename(run / f".{old.name}.part")  # a kill in the middle of the removal leaves no half checkpoint
        remove_parts(run)
    dist.barrier()
    return folder


def remove_parts(run: Path) -> None:
    """Remove checkpoints that were not finished, or not wholly removed."""
    for stale in run.glob(".step-*.part"):
        shutil.rmtree(stale, ignore_errors=True)


def require_finite(tensors: dict[str, Tensor], step: int) -> None:
    """UserError, on every rank, that names a tensor with NaN or infinity on one of them."""
    local = zip(tensors, local_parts(tensors.values()))
    bad = of_any_rank(next((name for name, tensor in local if not tensor.isfinite().all()), ""))
    if bad:
        raise UserError(f"step {step}: {bad} is not finite; nothing was saved over the last checkpoint")


def of_any_rank(problem: str) -> str:
    """A problem of one of the ranks, the same on all: a rank that stops alone would leave the others waiting."""
    everyone = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, problem)
    return max(everyone)


def resume(
    run: Path, model: nn.Module, optimizer: Optimizer, average: Average | None, from_previous: bool
) -> tuple[int, list[str]]:
    """Load the newest checkpoint of a run, if there is one, on any number of ranks: its step, and the damaged samples
    so far. A damaged checkpoint is named. With `from_previous` the one before it is loaded instead."""
    if dist.get_rank() == 0:
        remove_parts(run)
    folders = checkpoints(run)[::-1]
    for folder, before in zip(folders, [*folders[1:], None]):
        problem = ""
        try:
            reader, progress = open_reader(folder), read_progress(folder)
        except Exception as error:  # safetensors and JSON each have classes of their own
            problem = last_line(error)
        if not (problem := of_any_rank(problem)):
            try:
                dcp.load(state_tensors(model, optimizer, average), storage_reader=reader)
            except Exception as error:  # of one rank, known to all
                problem = last_line(error)
        if problem:
            message = f"{folder} is damaged ({problem})"
            if not (from_previous and before):
                advice = f"--from-previous continues from {before}" if before else "no checkpoint is before it"
                raise UserError(f"{message}: {advice}")
            aside = folder.with_name(f"{folder.name}.damaged")
            if dist.get_rank() == 0:  # under its old name it would count as the newest checkpoint of all
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            dist.barrier()
            report(f"{message}; it is {aside.name} now")
            continue
        for state in optimizer.state.values():
            state["step"].fill_(progress.step)
        report(f"continuing {run} after step {progress.step}")
        return progress.step, list(progress.skipped)
    return 0, []


def open_reader(folder: Path) -> HuggingFaceStorageReader:
    """DCP's reader of a checkpoint, with the headers of its shards. An error for a shard that is cut, and for a pipe or
    a folder in the place of one."""
    for path in folder.iterdir():
        require_file(path, "file of a checkpoint")
    reader = HuggingFaceStorageReader(str(folder))
    metadata = reader.read_metadata()
    reader.read_metadata = lambda: metadata  # DCP would read all headers again, an export for each tensor
    return reader


def last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]


# --- Export -----------------------------------------------------------------------------------------------------------


class SavedWeights:
    """The weights of a checkpoint that an export has, or their average if there is one. `entries`:
    {name in the model: (name in the checkpoint, size)}."""

    def __init__(self, folder: Path):
        self.folder = folder
        with blame(f"{folder} is damaged", ": move it away, and the checkpoint before it is exported"):
            self.reader = open_reader(folder)
        sizes = {name: entry.size for name, entry in self.reader.read_metadata().state_dict_metadata.items()}
        kind = "ema." if any(name.startswith("ema.") for name in sizes) else "model."
        self.entries = {n.removeprefix(kind): (n, size) for n, size in sizes.items() if n.startswith(kind)}

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Weights by their names in the model, put together from the shards by this process alone, in float32 on the
        CPU."""
        tensors = {saved: torch.empty(size) for saved, size in map(self.entries.get, names)}
        with warnings.catch_warnings(), blame(f"{self.folder} is damaged"):
            warnings.simplefilter("ignore")  # DCP asks whether a single process is meant, although no_dist says so
            dcp.load(tensors, storage_reader=self.reader, no_dist=True)
        return dict(zip(names, tensors.values()))


def export_run(config: Config, base: Checkpoint, out: Path, best: bool = False) -> None:
    """Write the newest checkpoint of the run, or the best on its held-out clips, in the released layout, or its
    adapters as a LoRA file. In the released layout the trained tensors replace those of `base`, cast to the dtype that
    they have there. ComfyUI, ltx-core and sample.py load the result as they load the base."""
    run = Path(config.run.out)
    if not (folders := checkpoints(run)):
        raise UserError(f"{run} holds no complete checkpoint to export")
    folder = best_checkpoint(run) if best else folders[-1]
    if folder is None:
        raise UserError(f"no checkpoint of {run} has a loss on held-out clips: leave out --best")
    refuse_folders(out)
    refuse_overwrite([out], [base.path, *folder.iterdir()])
    out.parent.mkdir(parents=True, exist_ok=True)
    ours = reference_metadata(config.reference) | {"training": as_dict(config)} | encoder_metadata(base)
    defaults = export_guidance(config, base)
    lora, weights = trained_lora(run, config), SavedWeights(folder)
    if lora.rank:
        alpha = lora.alpha or lora.rank
        ours |= {"lora": asdict(lora) | {"alpha": alpha}, "base": base.path.name, "defaults": defaults}
        save_lora(out, weights.read(list(weights.entries)), alpha / lora.rank, ours)
        options = f"--lora {out}" + (f" --ckpt {base.path}" if config.model.ckpt else "")
    else:
        require_bf16(base)  # a cast to fp8 without a scale would be garbage
        ours = base.ours | ours | {"defaults": base.ours.get("defaults", {}) | defaults}
        ours.pop("weights", None)
        trained = {file_name(name, LTXVideo.PREFIXES): name for name in weights.entries}
        write_changed(out, base, trained, lambda name: weights.read([trained[name]])[trained[name]], ours)
        options = f"--ckpt {out}"
    print(f'wrote {out} from {folder}: sample with  python sample.py {options} --ref face.jpg --prompt "..."')
    print("It is for video only: in ComfyUI leave out the audio latent, which would change the picture.")

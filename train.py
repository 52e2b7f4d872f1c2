"""Train ST-DRC (Sec. 3.3 to 4.1), on a laptop or on a cluster.

    python train.py                                               # the tiny model on the clips in assets/
    torchrun --nproc_per_node=8 train.py configs/paper.toml       # the paper's run, on 8 GPUs
    python train.py configs/paper.toml --plan --gpus 8            # what that needs; loads nothing
    python train.py configs/paper.toml --export st-drc.safetensors   # the result, in the released layout
    python train.py configs/lora.toml                             # adapters on the frozen model, on one GPU (lora.py)

Run the same command again to continue after a stop. Ctrl-C, SIGTERM or a file named "stop" in the run's folder end it
after the step: saved, exit code 0. (torchrun kills its workers 30 s after a SIGTERM to itself; the file has no limit.)
"""

import common  # isort: skip  # noqa: F401 (before torch: sets the wait policy of its threads)

import argparse
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import Checkpoint
from common.errors import Parser, UserError, one_line_errors, whole_file
from common.media import contact_sheet, read_image, to_tensor, to_uint8
from config import Config, read_config, require_same_run
from data import FITS, CachedClips
from engine import state
from engine.average import Average
from engine.loader import training_batches
from engine.logbook import Log
from engine.lora import save_lora, seed_dropout
from engine.optim import AdamWBF16
from engine.parallel import StopSignal, build_model, gather_rows, join_processes, reshard
from engine.plan import Plan
from face import ArcFace, FaceDetector, recognition_file
from guidance import generate
from objective import Objective
from text import GEMMA, TextConnector, TextEncoder
from toy.cache import prepare_toy
from vae import VideoVAE

HERE = Path(__file__).parent


def main() -> None:
    options = parse_arguments()
    config = read_config(options.config, options.set)
    run, ckpt = Path(config["run"]["out"]), Path(config["model"]["ckpt"] or HERE / "assets" / "tiny.safetensors")
    if options.plan:
        return print(make_plan(config, ckpt).report(options.gpus, options.mfu))
    if options.export:
        return export(config, run, ckpt, Path(options.export))

    # ---- where we are, and what the run was
    device = join_processes()
    rank, world = dist.get_rank(), dist.get_world_size()
    batch, micro_batch = config["optim"]["batch"], config["parallel"]["micro_batch"]
    if batch % world:
        raise UserError(f"optim.batch = {batch} cannot be shared out evenly over {world} ranks")
    draw_toy_clips(config, ckpt, device)
    clips = CachedClips(config["data"]["cache"])
    if not options.dry_run:
        open_run(run, config)

    # ---- frozen parts, the DiT, the optimizer
    objective = build_objective(config, ckpt, clips, device)
    samples = encode_samples(config, ckpt, clips, run, device) if not options.dry_run else []
    model = build_model(config, ckpt, device)
    in_bf16 = config["optim"]["kind"] == "adamw-bf16"
    optimizer = (AdamWBF16 if in_bf16 else torch.optim.AdamW)(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config["optim"]["lr"],
        betas=tuple(config["optim"]["betas"]),
        weight_decay=config["optim"]["weight_decay"],
        **({"seed": config["run"]["seed"]} if in_bf16 else {"fused": device.type == "cuda"}),
    )
    average = Average(model, config["optim"]["ema"]) if config["optim"]["ema"] else None
    first = 0
    if not options.dry_run and (done := state.checkpoints(run)):
        first = state.load(done[-1], model, optimizer, average)
        report(f"continuing {run} after step {first}")
    plan = make_plan(config, ckpt)
    log = Log(config, plan, run, first, enabled=rank == 0 and not options.dry_run)

    # ---- steps
    stop = StopSignal()
    steps = first + 1 if options.dry_run else config["optim"]["steps"]
    batches = training_batches(config, clips, first, steps)
    for step in range(first, steps):
        begin = time.perf_counter()
        micro_batches = [next(batches) for _ in range(math.ceil(batch // world / micro_batch))]
        rows, names = [], []
        for k, micro in enumerate(micro_batches):
            last = k + 1 == len(micro_batches)
            if config["lora"]["dropout"]:
                seed_dropout(config["run"]["seed"], micro["counts"][0])
            # DDP adds up gradients locally and exchanges them once. FSDP cannot: it would have to keep them whole.
            wait = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
            with wait:
                out = objective(model, micro, micro["dice"])
                (out["loss"].sum() * world / batch).backward()  # both DDP and FSDP average over ranks
            rows.append(torch.stack([out[key].detach().float() for key in Log.COLUMNS], dim=1))
            names += micro["names"]

        asked = stop.asked or ("the file stop" if (run / "stop").exists() else "")
        table, stop_now = gather_rows(torch.cat(rows), asked)  # (batch, columns), of all ranks
        if not table.isfinite().all():
            stop_on_bad_loss(step, names, torch.cat(rows))
        norm = nn.utils.clip_grad_norm_(model.parameters(), config["optim"]["clip"])
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if not math.isfinite(norm):
            raise UserError(
                f"step {step + 1}: the gradient is not finite (norm {norm}), on rank {rank} for {', '.join(names)}; "
                "nothing was saved over the last checkpoint"
            )
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:
            average.update(step)

        done = step + 1
        if options.dry_run:
            report(log.line(done, table, norm, lr, time.perf_counter() - begin))
            report("dry run: one step done, nothing written")
            break
        log.add(done, table, norm, lr, time.perf_counter() - begin)
        every = config["log"]["sample_every"]
        if samples and every and (done % every == 0 or done == steps):
            with average.in_place() if average else nullcontext():
                draw_samples(config, model, objective, samples, clips, run / "samples", done)
        if stop_now or done % config["log"]["save_every"] == 0 or done == steps:
            folder = state.save(run, done, model, optimizer, config["log"]["keep"], average)
            report(f"saved {folder}")
        if stop_now:
            report(f"stopped by {asked or 'a signal to another rank'} after step {done}; run again to continue")
            if rank == 0:
                (run / "stop").unlink(missing_ok=True)
            break
    log.close()
    dist.barrier()
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(HERE / "configs" / "tiny.toml"), help="a TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one option")
    parser.add_argument("--dry-run", action="store_true", help="one step on one batch; write nothing")
    parser.add_argument("--export", metavar="FILE", help="write the newest checkpoint in the released layout")
    parser.add_argument("--plan", action="store_true", help="print memory per GPU and days; load nothing")
    parser.add_argument("--gpus", type=int, default=8, help="for --plan")
    parser.add_argument("--mfu", type=float, default=0.4, help="for --plan: share of the peak that is reached")
    return parser.parse_args()


def report(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# setting up


def open_run(run: Path, config: Config) -> None:
    """Make the run's folder, or see that it was started with the same options."""
    record = run / "config.json"
    if record.exists():
        require_same_run(json.loads(record.read_text()), config, run)
    dist.barrier()
    if dist.get_rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        with whole_file(record) as temporary:
            temporary.write_text(json.dumps(config, indent=1))
    dist.barrier()


def draw_toy_clips(config: Config, ckpt: Path, device: torch.device) -> None:
    """With data.toy, make the cache of drawn clips, or what is missing of it; every rank its share.

    One of another checkpoint, face pack or size is refused. The clips are the same whatever the run's seed."""
    cache, count = Path(config["data"]["cache"]), config["data"]["toy"]
    if count:
        gemma, faces = config["model"]["gemma"] or HERE / "assets" / "gemma", config["faces"]["pack"]
        faces = faces or HERE / "assets" / "faces"  # the reference's embedding is in a cache in any case
        place = dist.get_rank(), dist.get_world_size()
        prepare_toy(cache, count, ckpt, gemma, faces, device, torch.float32, 0, 1, *place)
    dist.barrier()


def build_objective(config: Config, ckpt: Path, clips: CachedClips, device: torch.device) -> Objective:
    """The frozen parts that a step needs beside the DiT, in the precision of the computation."""
    low = torch.bfloat16 if config["parallel"]["precision"] == "bf16" else torch.float32
    faces, reference = config["faces"], config["reference"]
    detector = arcface = None
    if faces["pack"]:
        for turn in range(2):  # rank 0 first: a pack that is not there is downloaded once
            if turn == (dist.get_rank() > 0):
                detector = FaceDetector(faces["pack"], device)
                arcface = ArcFace.from_onnx(recognition_file(faces["pack"])).to(device)
            dist.barrier()
    # Under DDP float32 weights are cast as they are used; others are in low precision already.
    in_float32 = config["optim"]["kind"] == "adamw" and not config["lora"]["rank"]
    cast = config["parallel"]["mode"] == "ddp" and in_float32
    connector = TextConnector.from_checkpoint(ckpt, device, low).requires_grad_(False)
    connector.projection = None  # the cache holds what comes after it
    return Objective(
        vae=VideoVAE.from_checkpoint(ckpt, device, low).requires_grad_(False),
        connector=connector,
        null_features=clips.null_features,
        slots=clips.settings["max_tokens"],
        fps=clips.settings["fps"],
        detector=detector,
        arcface=arcface,
        use_reference=reference["use"],
        ref_timestep=reference["timestep"],
        **{key: reference[key] for key in ("placement", "source_id", "phase_scale")},
        dtype=torch.float32 if cast else low,
        autocast=low == torch.bfloat16 and cast,
        window_context=faces["context"],
        **{key: faces[key] for key in ("lambda_id", "lambda_tic", "gamma", "window", "min_weight")},
    )


# ----------------------------------------------------------------------------------------------------------------------
# steps


def learning_rate(config: Config, step: int) -> float:
    """Of step number `step`, counted from 0: a linear rise, then constant or falling to zero."""
    optim = config["optim"]
    fall = (optim["steps"] - step) / max(1, optim["steps"] - optim["warmup"]) if optim["decay"] == "linear" else 1.0
    return optim["lr"] * min(1.0, (step + 1) / max(1, optim["warmup"]), fall)


def stop_on_bad_loss(step: int, names: list[str], rows: Tensor) -> None:
    """Name the samples whose loss is not finite, on every rank, and end the run. Checkpoints stay as they are."""
    bad = [name for name, row in zip(names, rows) if not row.isfinite().all()]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, bad)
    culprits = ", ".join(name for part in everyone for name in part)
    raise UserError(
        f"step {step + 1}: the loss is not finite for {culprits}; nothing was saved over the last checkpoint"
    )


# ----------------------------------------------------------------------------------------------------------------------
# samples


def encode_samples(
    config: Config, ckpt: Path, clips: CachedClips, run: Path, device: torch.device
) -> list[tuple[Any, Tensor]]:
    """The fixed samples' photos, fitted to the video, and contexts, last the empty prompt's context. Gemma is freed."""
    wanted = config["log"]["samples"]
    if not wanted or not config["log"]["sample_every"]:
        return []
    height, width = clips.settings["height"], clips.settings["width"]
    photos = [FITS[config["reference"]["fit"]](read_image(face), height, width) for face, _ in wanted]
    path = run / "prompts.safetensors"
    if dist.get_rank() == 0:  # one rank reads Gemma, the others its result
        gemma = config["model"]["gemma"] or (GEMMA if config["model"]["ckpt"] else HERE / "assets" / "gemma")
        encoder = TextEncoder.from_checkpoint(
            ckpt, gemma, device, torch.bfloat16 if device.type == "cuda" else torch.float32
        )
        with whole_file(path) as temporary:
            save_file({"context": encoder.encode([prompt for _, prompt in wanted] + [""]).cpu()}, str(temporary))
        del encoder
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.barrier()
    contexts = load_file(str(path))["context"].to(device).split(1)
    return list(zip([*photos, None], contexts))


def draw_samples(
    config: Config,
    model: nn.Module,
    objective: Objective,
    samples: list[tuple[Any, Tensor]],
    clips: CachedClips,
    folder: Path,
    step: int,
) -> None:
    """A contact sheet for each fixed sample. Every rank takes part, since each holds a shard; rank 0 writes."""
    *wanted, (_, null_context) = samples
    size = {key: clips.settings[key] for key in ("frames", "height", "width", "fps")}
    guidance, reference = config["guidance"], config["reference"]
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    inner.eval()
    for k, (photo, context) in enumerate(wanted):
        with torch.autocast(null_context.device.type, torch.bfloat16, enabled=objective.autocast):
            video = generate(
                inner,
                objective.vae,
                context,
                null_context,
                to_tensor(photo) if reference["use"] else None,
                **size,
                steps=guidance["steps"],
                seed=k,
                **{key: reference[key] for key in ("placement", "source_id", "phase_scale")},
                dtype=objective.dtype,
                s_y=guidance["s_text"],
                s_r=guidance["s_ref"],
                ref_timestep=reference["timestep"],
            )
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            contact_sheet(folder / f"step-{step:06d}-{k}.png", photo, to_uint8(video))
    inner.train()
    reshard(inner)
    report(f"drew {len(wanted)} samples into {folder}")


# ----------------------------------------------------------------------------------------------------------------------
# before and after


def make_plan(config: Config, ckpt: Path) -> Plan:
    """The plan for the checkpoint's config, or the released one's where neither it nor the cache is here yet."""
    ltx = Checkpoint(ckpt).config if ckpt.exists() else json.loads((HERE / "configs" / "ltx-2.3.json").read_text())
    cache = Path(config["data"]["cache"])
    settings = CachedClips(cache).settings if (cache / "cache.json").exists() else PAPER_CLIPS
    size = tuple(settings[key] for key in ("frames", "height", "width"))
    return Plan(config, ltx, size, settings["max_tokens"])


PAPER_CLIPS = {"frames": 121, "height": 480, "width": 832, "fps": 24.0, "max_tokens": 1024}


def export(config: Config, run: Path, ckpt: Path, out: Path) -> None:
    """Write the newest checkpoint of the run in the released layout; of adapters, as a LoRA file."""
    folder, base = state.newest(run), Checkpoint(ckpt)
    guidance, reference = config["guidance"], config["reference"]
    defaults = {"s_text": guidance["s_text"], "s_ref": guidance["s_ref"]}
    ours = {key: reference[key] for key in ("placement", "source_id", "phase_scale", "fit")}
    ours |= {"ref_timestep": reference["timestep"], "training": config}
    out.parent.mkdir(parents=True, exist_ok=True)
    # What was trained is up to the run, whatever this command says.
    lora = json.loads((run / "config.json").read_text()).get("lora", config["lora"])
    if lora["rank"]:
        alpha = lora["alpha"] or lora["rank"]
        ours |= {"lora": lora | {"alpha": alpha}, "base": ckpt.name, "defaults": defaults}
        save_lora(out, state.read_weights(folder), alpha / lora["rank"], ours)
        given = f"--lora {out}" + (f" --ckpt {ckpt}" if config["model"]["ckpt"] else "")
    else:
        ours = base.ours | ours | {"defaults": base.ours.get("defaults", {}) | defaults}
        ours.pop("weights", None)
        state.export(run, ckpt, out, ours)
        given = f"--ckpt {out}"
    print(f'wrote {out} from {folder}: sample with  python sample.py {given} --ref face.jpg --prompt "..."')


if __name__ == "__main__":
    with one_line_errors():
        main()

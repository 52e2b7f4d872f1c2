"""Train ST-DRC (Sec. 3.3 to 4.1), on a laptop or on a cluster.

    python -m toy.cache --count 15000 --out cache/tiny            # a cache of drawn clips
    python train.py                                               # the tiny model on that cache, from random weights
    torchrun --nproc_per_node=8 train.py configs/paper.toml       # the paper's run, on 8 GPUs
    python train.py configs/paper.toml --plan --gpus 8            # memory and days of that run; loads no weights
    torchrun --nproc_per_node=8 train.py configs/paper.toml --rehearse   # three steps of it on random numbers
    python train.py configs/paper.toml --export st-drc.safetensors   # write the model of that run
    python train.py configs/lora.toml                             # adapters on the frozen model, on one GPU

The same command continues a stopped run. Ctrl-C, SIGTERM or a file named "stop" in the run's folder ends the run
after the current step. The run saves a checkpoint and exits with code 0. torchrun kills its workers 30 s after its own
SIGTERM; with the file there is no time limit.
"""

import common  # isort: skip  # noqa: F401 (before torch: sets the wait policy of its threads)

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from checkpoint import Checkpoint
from common.device import upload
from common.errors import Parser, UserError, one_line_errors, whole
from common.schema import parse_json
from common.sizes import require_video_size
from config import ASSETS, VIDEO, Config, read_config
from data import CachedClips, check_cache_fits, training_batches
from engine import state
from engine.average import Average
from engine.check import require_bf16
from engine.holdout import CURE, evaluate, hold_out
from engine.logbook import Log
from engine.lora import seed_dropout
from engine.optim import build_optimizer, learning_rate
from engine.parallel import StopSignal, build_model, gather_rows, join_processes, report, usable_memory
from engine.plan import RELEASED, plan_of
from engine.recipe import default_gemma
from engine.rehearsal import compare, stand_ins
from engine.samples import draw_samples, encode_samples
from face import ArcFace, FaceDetector, recognition_file
from objective import Objective
from text import GEMMA, MAX_TOKENS, TextConnector
from vae import VideoVAE, latent_scale

HERE = Path(__file__).parent


def main() -> None:
    options = parse_arguments()
    config = read_config(options.config, options.set)
    ckpt = Path(config.model.ckpt or ASSETS / "tiny.safetensors")
    if options.plan:
        size = ckpt.stat().st_size if ckpt.is_file() else RELEASED
        print(plan_of(config, *model_and_cache(config, ckpt)).report(options.gpus, options.mfu, size))
        return None
    if not (ckpt.is_file() or options.rehearse):
        raise UserError(f"no checkpoint at {ckpt}: name one with --set model.ckpt=FILE, or in the config")
    if options.export:
        return state.export_run(config, Checkpoint(ckpt), Path(options.export), options.best)
    run = Path(config.run.out)
    if not options.trial:
        state.require_same_options(run, config)  # before the cache is opened: if it is missing, making it takes hours
    device = join_processes()
    if config.optim.batch % (world := dist.get_world_size()):
        raise UserError(f"optim.batch = {config.optim.batch} is not a multiple of {world} ranks: change one of the two")
    if options.rehearse:
        config, base, clips = stand_ins(config, *model_and_cache(config, ckpt), device)
    else:
        clips, base = CachedClips(config.data.cache), Checkpoint(ckpt)
        check_cache_fits(clips.settings, base, config.model.gemma, config.faces.pack)
        if not config.lora.rank:
            require_bf16(base)  # before the run, not at its export
        if not options.trial:
            state.require_same_cache(run, config, clips.settings)
    with nullcontext() if options.trial else state.locked(run):
        clips, held = hold_out(clips, config.data.holdout)
        train(config, base, clips, held, device, options)
    dist.barrier()
    dist.destroy_process_group()


def train(
    config: Config,
    ckpt: Checkpoint,
    clips: CachedClips,
    held: CachedClips | None,
    device: torch.device,
    options: argparse.Namespace,
) -> None:
    """Train on `clips` and measure the loss on the held-out clips `held`. A trial is a few steps that write nothing."""
    run, rank, world = Path(config.run.out), dist.get_rank(), dist.get_world_size()
    batch, micro_batch = config.optim.batch, config.parallel.micro_batch

    # ---- frozen parts, the DiT, the optimizer
    plan = plan_of(config, ckpt.config, clips.settings)
    objective = build_objective(config, ckpt, clips, device, plan.autocast)
    recompute = plan.recompute(world, usable_memory(device))
    if device.type == "cuda":
        report(f"parallel.recompute = {recompute}")
    model = build_model(config, ckpt, device, recompute)
    optimizer = build_optimizer(config, model, device)
    average = Average(model, config.optim.ema) if config.optim.ema else None
    first, skipped, samples = 0, [], []
    if not options.trial:
        state.write_record(run, config, clips.settings)
        samples = encode_samples(config, ckpt, objective, clips.settings, held, run, device)
        first, skipped = state.resume(run, model, optimizer, average, options.from_previous)
    log = Log(config, plan, run, first, enabled=rank == 0 and not options.trial)

    def held_out_loss(step: int) -> float:
        """The loss on the held-out clips, logged, with the weights that an export has. All ranks compute it."""
        with average.in_place() if average else nullcontext():
            figures = evaluate(config, model, objective, held)
        log.add_held_out(step, figures)
        return figures["flow"]

    if held:
        report(f"held out: {len(held):,} clips of {len(set(held.identities)):,} people; {len(clips):,} are trained on")
        if not (first or options.trial):
            held_out_loss(0)

    # ---- steps
    stop, stop_now = StopSignal(), False
    end = first + options.trial if options.trial else config.optim.steps
    batches = ahead(training_batches(config, clips, first, end), device)
    for step in range(first, end):
        begin, done = time.perf_counter(), step + 1
        rows, names, problems = [], [], []

        # -- loss and gradients
        micro_batches = [next(batches) for _ in range(math.ceil(batch // world / micro_batch))]
        log.grid = tuple(micro_batches[0]["latents"].shape[2:])  # a step has one bucket
        for k, micro in enumerate(micro_batches):
            if config.lora.dropout:
                seed_dropout(config.run.seed, micro["numbers"][0])
            # DDP sums gradients locally and exchanges them once. FSDP would have to hold unsharded gradients for that,
            # so it exchanges after every micro-batch.
            last = k + 1 == len(micro_batches)
            wait = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
            with wait:
                out = objective(model, micro, micro["draws"])
                intact = upload(torch.tensor([not problem for problem in micro["problems"]]), device)  # (b,)
                loss = torch.where(intact, out["loss"], 0)  # a damaged sample adds 0
                (loss.sum() * world / batch).backward()  # DDP and FSDP average over ranks, hence * world
            out["skipped"] = ~intact
            rows.append(torch.stack([out[key].detach().float() for key in Log.COLUMNS], dim=1))
            names += micro["names"]
            problems += [f"{name} ({why})" for name, why in zip(micro["names"], micro["problems"]) if why]

        # -- update, queued on the GPU before gather_rows waits for the figures
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip, foreach=True)
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:
            average.update(step)

        # -- figures of all ranks, the same table on each, so all take the same branches below. After a number that is
        # not finite nothing is saved: the newest checkpoint is from before it.
        reason = stop.signal or ('the file "stop"' if (run / "stop").exists() else "")
        table, stop_now = gather_rows(torch.cat(rows), reason)  # (batch, columns), of all ranks
        if not table.isfinite().all():
            bad = gather_names([name for name, row in zip(names, torch.cat(rows)) if not row.isfinite().all()])
            raise UserError(f"step {done}: the loss is not finite for {', '.join(bad)}: {CURE}")
        if table[:, Log.COLUMNS.index("skipped")].any():
            skipped = count_skipped(config, skipped, gather_names(problems), done)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if not math.isfinite(norm):
            raise UserError(f"step {done}: the gradient is not finite (norm {norm}): {CURE}")

        # -- log, held-out clips, samples, checkpoint, stop
        if options.trial:
            figures = log.figures(done, table, norm, lr, time.perf_counter() - begin)
            report(log.line(figures))
            continue
        log.add(done, table, norm, lr, time.perf_counter() - begin)
        sample_every, loss_held = config.log.sample_every, None
        if held and not stop_now and (done % config.log.eval_every == 0 or done == end):
            loss_held = held_out_loss(done)
        if samples and sample_every and not stop_now and (done % sample_every == 0 or done == end):
            with average.in_place() if average else nullcontext():
                draw_samples(config, model, objective, samples, clips.settings, done)
        if stop_now or done % config.log.save_every == 0 or done == end or loss_held is not None:
            folder = state.save(run, done, model, optimizer, config.log.keep, average, skipped, loss_held)
            report(f"saved {folder}")
        if stop_now:
            report(f"stopped by {reason or 'a signal to another rank'} after step {done}; run again to continue")
            if rank == 0:
                (run / "stop").unlink(missing_ok=True)
            break
    if options.trial:
        line = "dry run: one step done, nothing written"
        report(compare(figures, plan, recompute, options.mfu) if options.rehearse else line)
    elif first >= config.optim.steps:
        report(f"{run} has its {first} steps already: raise optim.steps, or use --export FILE to write the model")
    elif not stop_now:
        best = f", with --best that of {best.name}" if (best := state.best_checkpoint(run)) else ""
        curves = f"; tensorboard --logdir {run} shows the curves" if config.log.tensorboard else ""
        report(f"finished: --export FILE writes the model{best}{curves}")
    log.close()


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "config", nargs="?", default=str(HERE / "configs" / "tiny.toml"), help="config of the run (configs/tiny.toml)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one option; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="one step on one batch; write nothing")
    parser.add_argument(
        "--from-previous", action="store_true", help="if the newest checkpoint is damaged, use the one before"
    )
    parser.add_argument(
        "--export",
        metavar="FILE",
        help="write the newest checkpoint as a model file (a LoRA file, if the run trained adapters)",
    )
    best = "with --export: the checkpoint with the least loss on the held-out clips instead"
    parser.add_argument("--best", action="store_true", help=best)
    parser.add_argument("--plan", action="store_true", help="print memory per GPU and days; load no weights")
    rehearse = "three steps on random weights and latents, beside the plan; needs no file, writes none"
    parser.add_argument("--rehearse", action="store_true", help=rehearse)
    parser.add_argument("--gpus", type=whole(), default=8, help="number of GPUs for --plan (%(default)s)")
    parser.add_argument("--mfu", type=float, default=0.4, help="for --plan: with all blocks recomputed (%(default)s)")
    options = parser.parse_args()
    options.trial = 3 if options.rehearse else int(options.dry_run)  # steps that write nothing; 0: a run
    if options.export is not None and not options.export.strip():
        raise UserError("--export needs the name of a file")
    if options.best and options.export is None:
        raise UserError("--best says which checkpoint --export writes: give both")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu} is not between 0 and 1")
    return options


# ----------------------------------------------------------------------------------------------------------------------
# setting up


def build_objective(
    config: Config, ckpt: Checkpoint, clips: CachedClips, device: torch.device, autocast: bool
) -> Objective:
    """The frozen parts that a step needs besides the DiT. VAE and connector are in the precision of the computation;
    ArcFace is in float32. `autocast`: of the plan."""
    compute_dtype = torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32
    detector = arcface = None
    if config.faces.pack:
        detector = FaceDetector(config.faces.pack, device)
        arcface = ArcFace.from_onnx(recognition_file(config.faces.pack)).to(device)
    connector = TextConnector.from_checkpoint(ckpt, device, compute_dtype).requires_grad_(False)
    connector.projection = None  # the cache holds its output
    return Objective(
        vae=VideoVAE.from_checkpoint(ckpt, device, compute_dtype).requires_grad_(False),
        connector=connector,
        null_features=clips.null_features.to(device),
        slots=clips.settings["max_tokens"],
        fps=clips.settings["fps"],
        detector=detector,
        arcface=arcface,
        reference=config.reference,
        faces=config.faces,
        # In bf16, a float32 DiT under DDP computes by autocast and takes float32 inputs. Under FSDP, with LoRA and with
        # "adamw-bf16" the weights are bf16 when they compute, and so are the inputs.
        dtype=torch.float32 if autocast else compute_dtype,
        autocast=autocast,
    )


def model_and_cache(config: Config, ckpt: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's config and the cache's settings of a run whose files may be missing. Without the checkpoint, the
    config is that of LTX-2.3. Without the cache, the settings are those that prepare.py would give it."""
    base = Checkpoint(ckpt) if ckpt.is_file() else None
    ltx = base.config if base else json.loads((HERE / "configs" / "ltx-2.3.json").read_text())
    if (Path(config.data.cache) / "cache.json").exists():
        settings = CachedClips(config.data.cache).settings
        for size in settings.get("buckets") or [settings]:
            require_video_size(size, latent_scale(ltx["vae"]))
        return ltx, settings
    settings = VIDEO | {"max_tokens": MAX_TOKENS} | (base.ours.get("defaults", {}) if base else {})
    file = Path(config.model.gemma or (default_gemma(base) if base else GEMMA)) / "tokenizer_config.json"
    if file.is_file() and isinstance(limit := parse_json(dict, file.read_bytes(), file).get("model_max_length"), int):
        settings["max_tokens"] = min(limit, MAX_TOKENS)
    return ltx, settings


# ----------------------------------------------------------------------------------------------------------------------
# steps


def ahead(batches: Iterator[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """The micro-batches on the device. The next one is read, and its copy queued, before the caller gets this one."""
    sent = (tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch) for batch in batches)
    now = next(sent)
    for following in sent:
        yield now
        now = following
    yield now


def gather_names(names: list[str]) -> list[str]:
    """The names of all ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, names)
    return [name for part in everyone for name in part]


def count_skipped(config: Config, skipped: list[str], new: list[str], step: int) -> list[str]:
    """All damaged samples so far. Reports each clip once. UserError above the limit.

    The limit is data.max_bad times the samples of the whole run, and at least 10. It follows from options
    alone, so all ranks have the same.
    """
    for name in dict.fromkeys(new):
        if name not in skipped:
            report(f"step {step}: skipped {name}")
    skipped = skipped + new
    limit = max(10, int(config.data.max_bad * config.optim.steps * config.optim.batch))
    if len(skipped) > limit:
        raise UserError(
            f"step {step}: {len(skipped)} samples are damaged, and data.max_bad allows {limit}: "
            "make the clips reported above again"
        )
    return skipped


if __name__ == "__main__":
    with one_line_errors():
        main()

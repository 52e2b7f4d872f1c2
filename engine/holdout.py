"""Held-out clips: people whom a run never trains on, and the losses on them, which show what the run learns.

    people, in the order of a hash of their names ──> the first ones, until data.holdout clips ──> kept from training
    every log.eval_every steps, for each of the clips and each of eight noise levels
        with its reference       ──> L_flow, and the faces in the one-step estimate ──> similarity to e_ref
        without                  ──> L_flow; the difference is what the reference is worth

The training loss moves with the draw of clips, t and eps more than with learning. Here all three are fixed, so two
moments of a run, and two runs on one cache, are compared on the same numbers. A hash decides alone, so more data may
move a held-out person into training, and never a trained one out of it.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from config import LEVELS, Config
from data import CachedClips, Draws, reference_tensor
from engine.parallel import reshard
from objective import Objective

LARGEST_SHARE = 8  # of the held-out clips at most 1 in 8 shows the same person


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:7], "big")


def hold_out(clips: CachedClips, count: int) -> tuple[CachedClips, CachedClips | None]:
    """The clips to train on, and `count` clips of other people. UserError if nobody is left to train on.

    People are told apart by the manifest's `identity`; clips without one belong together if they are cut from one file.
    """
    if not count:
        return clips, None
    people, held, kept_out = defaultdict(list), [], set()
    for k, identity in enumerate(clips.identities):
        people[identity].append(k)
    for identity in sorted(people, key=hash_of):
        if len(held) >= count:
            break
        kept_out.update(people[identity])
        held += sorted(people[identity], key=lambda k: hash_of(clips.names[k]))[: max(1, count // LARGEST_SHARE)]
    rest = [k for k in range(len(clips)) if k not in kept_out]
    if not rest:
        raise UserError(
            f"data.holdout = {count} leaves no clip to train on: {clips.folder} has {len(clips):,} clips of "
            f"{len(people):,} people"
        )
    return clips.subset(rest), clips.subset(held[:count])


# The run itself keeps its learning rate, and would meet the same samples again.
CURE = "begin anew, or from this run's --export as model.ckpt, with a lower optim.lr and another run.out"


@torch.no_grad()
def evaluate(config: Config, model: nn.Module, objective: Objective, clips: CachedClips) -> dict[str, Any]:
    """The figures of the held-out clips, the same on every rank and for any number of ranks.

    flow and its standard error over the clips, no_reference, similarity (a frame without a face counts as 0), and each
    by noise level. Without reference tokens or face models the figures that need them are missing.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    rank, world, rows = dist.get_rank(), dist.get_world_size(), []
    inner.eval()
    for turn in range(math.ceil(len(clips) / world)):  # under FSDP every rank must call the model equally often
        rows.append(clip_figures(config, inner, objective, clips, min(turn * world + rank, len(clips) - 1)))
    inner.train()
    reshard(inner)
    own = torch.stack(rows)  # (turns, 2, levels, 3)
    everyone = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(everyone, own)
    table = torch.stack(everyone, dim=1).flatten(0, 1)[: len(clips)].cpu()  # (clips, 2, levels, 3), in their order
    return figures(table, config.reference.use)


def clip_figures(config: Config, model: nn.Module, objective: Objective, clips: CachedClips, number: int) -> Tensor:
    """(2, levels, 3) of a clip, without and with its reference: L_flow, sum of similarities, decoded frames."""
    clip, intact = read(clips, number)
    device = objective.vae.decoder.conv_in.conv.weight.device
    channels, *grid = clip["latents"].shape
    height, width = (cells * side for cells, side in zip(grid[1:], objective.vae.scale[1:]))
    ref_image = reference_tensor(clip["image"], height, width, fit=config.reference.fit)  # (3, H, W)
    generator = torch.Generator("cpu").manual_seed(hash_of(clip["name"]))
    noise = torch.randn(len(LEVELS), math.prod(grid), channels, generator=generator)  # (levels, N, C)
    window_start = max(0, (grid[0] - config.faces.window) // 2)

    table = torch.zeros(2, len(LEVELS), 3, dtype=torch.float64, device=device)
    for with_reference in range(1 + config.reference.use):
        loss = objective if with_reference else replace(objective, detector=None)
        # One clip a call, so that its figures do not depend on its neighbors, not even by rounding.
        for levels in torch.arange(len(LEVELS)).split(config.parallel.micro_batch):
            n = len(levels)
            draws = [Draws(LEVELS[k], noise[k], False, not with_reference, window_start) for k in levels]
            batch = {key: clip[key].expand(n, *clip[key].shape) for key in ("latents", "e_ref")}
            batch |= {"ref_images": ref_image.expand(n, -1, -1, -1), "features": [clip["features"]] * n}
            out = loss(model, batch, draws)
            similar = out["faces"] * (1 - out["id"])
            table[with_reference, levels] = torch.stack([out["flow"], similar, out["frames"]], dim=1).double()
    return table if intact else table.fill_(math.nan)


def read(clips: CachedClips, number: int) -> tuple[dict[str, Any], bool]:
    """A clip, and whether it is intact. For a damaged one another stands in: ranks call the model equally often."""
    for k in (number, *range(len(clips))):
        try:
            return clips[k], k == number
        except UserError as error:
            problem = error
            if k == number:
                print(f"held out, skipped: {error}", flush=True)
    raise problem


def figures(table: Tensor, use_reference: bool) -> dict[str, Any]:
    """Means over the intact clips of `table` (clips, 2, levels, 3)."""
    table = table[table.isfinite().all(-1).flatten(1).all(1)]
    if not len(table):
        raise UserError(f"the loss on the held-out clips is not finite: {CURE}")
    without, flow = table[:, 0, :, 0], table[:, int(use_reference), :, 0]  # (clips, levels)
    result = {"clips": len(table), "flow": flow.mean().item(), "flow_by_t": flow.mean(0).tolist()}
    result["flow_error"] = flow.mean(1).std().item() / len(table) ** 0.5 if len(table) > 1 else 0.0
    if use_reference:
        result |= {"no_reference": without.mean().item(), "no_reference_by_t": without.mean(0).tolist()}
    similar, frames = table[:, 1, :, 1].sum(0), table[:, 1, :, 2].sum(0)  # (levels,)
    if frames.sum():
        by_t: Sequence[float] = (similar / frames.clamp(min=1)).tolist()
        result |= {"similarity": (similar.sum() / frames.sum()).item(), "similarity_by_t": by_t}
    return result

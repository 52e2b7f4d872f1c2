"""The samples of a run: fixed photos and prompts, drawn again and again as the model learns."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import Checkpoint
from common.device import free
from common.errors import UserError, whole_file
from common.images import contact_sheet, read_image, to_tensor, to_uint8
from config import Config
from data import FITS, CachedClips, Draws
from engine.parallel import report, reshard
from engine.recipe import default_gemma
from guidance import generate
from objective import Objective
from text import TextEncoder

HELD_OUT = 2  # samples where log.samples names none
Sample = tuple[Image.Image | None, str, Tensor]  # reference image in the video's shape, prompt, context (1, S, D)


def encode_samples(
    config: Config,
    ckpt: Checkpoint,
    objective: Objective,
    size: dict[str, Any],
    held: CachedClips | None,
    run: Path,
    device: torch.device,
) -> list[Sample]:
    """The samples of `log.samples` with their contexts; the last one is the empty prompt's. Gemma is freed. Without
    `log.samples`, photo and caption of held-out clips, whose text features the cache has."""
    entries, fit = config.log.samples, FITS[config.reference.fit]
    if not config.log.sample_every or not (entries or held):
        return []
    if not entries:
        clips = list(islice(intact_clips(held), HELD_OUT))
        images = [fit(clip["image"], size["height"], size["width"]) for clip in clips]
        features = [row.to(device) for row in (*(clip["features"] for clip in clips), objective.null_features)]
        kept = Draws(0.0, torch.empty(0), drop_text=False, drop_ref=False, window_start=0)
        contexts = objective.encode_text(features, [kept] * len(features)).split(1)
        return list(zip([*images, None], [*(clip["caption"] for clip in clips), ""], contexts))
    images = [fit(read_image(path), size["height"], size["width"]) for path, _ in entries]
    prompts = [prompt for _, prompt in entries] + [""]
    path = run / "prompts.safetensors"
    if dist.get_rank() == 0:  # one rank runs Gemma, the others read the result
        gemma = config.model.gemma or default_gemma(ckpt)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        encoder = TextEncoder.from_checkpoint(ckpt, gemma, device, dtype)
        with whole_file(path) as temporary:
            save_file({"context": encoder.encode(prompts).cpu()}, str(temporary))
        del encoder
        free(device)
    dist.barrier()
    contexts = load_file(str(path))["context"].to(device).split(1)
    return list(zip([*images, None], prompts, contexts))


def intact_clips(clips: CachedClips) -> Iterator[dict[str, Any]]:
    for k in range(len(clips)):
        with suppress(UserError):  # a damaged clip is named when the loss on the held-out clips is measured
            yield clips[k]


def draw_samples(
    config: Config, model: nn.Module, objective: Objective, samples: list[Sample], size: dict[str, Any], step: int
) -> None:
    """A contact sheet for each sample. Every rank takes part, since each may hold a shard; rank 0 writes."""
    *samples, (_, _, null_context) = samples
    guidance, folder = config.guidance, Path(config.run.out) / "samples"
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    inner.eval()
    settings = {key: size[key] for key in ("frames", "height", "width", "fps")}
    settings |= {"steps": guidance.steps, "s_y": guidance.s_text, "s_r": guidance.s_ref}
    settings |= {"reference": config.reference, "dtype": objective.dtype}
    for k, (image, prompt, context) in enumerate(samples):
        ref_image = to_tensor(image) if config.reference.use else None
        with torch.autocast(context.device.type, torch.bfloat16, enabled=objective.autocast):
            video = generate(inner, objective.vae, context, null_context, ref_image, seed=k, **settings)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            contact_sheet(folder / f"step-{step:06d}-{k}.png", image, to_uint8(video), title=prompt)
    inner.train()
    reshard(inner)
    report(f"drew {len(samples)} samples into {folder}")

"""The micro-batches of a rank: clips from the cache, references augmented, dice rolled, all in the workers.

        step s, batch B          samples s B ... s B + B - 1; number j goes to rank j modulo their number
        worker                   read, augment, roll, put together  --(shared memory)-->  the training loop

Many samples a second leave the training loop no time for work of its own. So whatever can be done for a sample without
the model is done in a worker, and a batch comes as a few large tensors: each tensor that changes process is a file
that is opened, and one for each sample's features and noise would cost more than the step.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from config import Config
from data import CachedClips, TrainingClips, collate
from objective import Dice, roll


def training_batches(config: Config, clips: CachedClips, first: int, steps: int) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches of steps `first` to `steps`: those of data.collate and "dice", a list of Dice."""
    batch, size = config["optim"]["batch"], config["parallel"]["micro_batch"]

    def counts() -> Iterator[list[int]]:
        for step in range(first, steps):
            mine = list(range(step * batch + dist.get_rank(), (step + 1) * batch, dist.get_world_size()))
            yield from (mine[k : k + size] for k in range(0, len(mine), size))

    reference = config["reference"]
    training = TrainingClips(clips, config["run"]["seed"], reference["augment"], reference["fit"])
    workers = config["data"]["workers"]
    return map(
        unpack,
        DataLoader(
            training,
            batch_sampler=counts(),
            num_workers=workers,
            collate_fn=partial(pack, config, clips.latent_shape),
            multiprocessing_context="spawn" if workers else None,  # forking after threads have started can hang
            persistent_workers=False,
        ),
    )


def pack(config: Config, latent_shape: tuple[int, ...], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch whose features (tokens, D) lie in one tensor, and so does the dice's noise."""
    batch = collate(samples)
    dice = [throw(config, latent_shape, count) for count in batch["counts"]]
    batch["tokens"] = [len(features) for features in batch["features"]]
    batch["features"] = torch.cat(batch["features"])
    batch["eps"] = torch.stack([d.eps for d in dice])
    batch["chance"] = [(d.t, d.drop_text, d.drop_reference, d.window) for d in dice]
    return batch


def unpack(batch: dict[str, Any]) -> dict[str, Any]:
    """What was packed, as views of the same memory."""
    batch["features"] = batch["features"].split(batch.pop("tokens"))
    chances, eps = batch.pop("chance"), batch.pop("eps")
    batch["dice"] = [Dice(t, noise, *others) for (t, *others), noise in zip(chances, eps)]
    return batch


def throw(config: Config, latent_shape: tuple[int, ...], count: int) -> Dice:
    """The dice of the run's sample number `count`."""
    channels, frames, height, width = latent_shape
    windows = max(1, frames - config["faces"]["window"] + 1)
    dropout = config["dropout"]
    return roll(
        config["run"]["seed"],
        count,
        frames * height * width,
        channels,
        windows,
        dropout["text"],
        dropout["reference"],
        config["optim"]["noise_tokens"],
    )

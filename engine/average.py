"""The average of the weights over the last steps of a run, which samples better than the last step's own.

        average <- d average + (1 - d) weights         d = `optim.ema`, less in the first steps, after each step

It shares the sharding of the weights, is saved with them, and is what an export writes and samples are drawn from.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


class Average:
    """The average of the trained weights of a model. `tensors` are in the order of its parameters."""

    def __init__(self, model: nn.Module, decay: float):
        self.live = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
        self.decay, self.tensors = decay, [weight.clone() for weight in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`, counted from 0: a mean over the last 1 / (1 - d) steps, or half of all."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(local_parts(self.tensors), local_parts(self.live), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the average for its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, mean in zip(local_parts(self.live), local_parts(self.tensors)):
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)

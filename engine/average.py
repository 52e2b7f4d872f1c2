"""The average of the weights over the last steps of a run, which samples better than the last step's own.

        average <- d average + (1 - d) weights         d = `optim.ema`, less in the first steps, after each step

It shares the sharding of the weights, is saved with them, and is what an export writes and samples are drawn from.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def _here(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's part of each."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


class Average:
    """Of what is trained in a model. `tensors` are in the order of its parameters."""

    def __init__(self, model: nn.Module, decay: float):
        self.live = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
        self.decay, self.tensors = decay, [weight.clone() for weight in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step number `step`, counted from 0: the mean over about the last 1 / (1 - d) steps, or half of all."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(_here(self.tensors), _here(self.live), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average for its weights inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, mean in zip(_here(self.live), _here(self.tensors)):
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)

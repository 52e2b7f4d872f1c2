"""toy/descend.py: the loop reaches a known minimum, limits its steps, and takes any number of them."""

import pytest
import torch
from torch import nn

from toy.descend import descend


def test_descent_reaches_the_minimum():
    x = nn.Parameter(torch.tensor([5.0, -3.0]))
    optimizer = torch.optim.AdamW([x], 0.3, weight_decay=0)
    losses = list(descend("test", optimizer, lambda step: (x - 1).square().sum(), 200))
    assert len(losses) == 200 and losses[0] == 32
    assert losses[-1] < 1e-4 and x.detach().numpy() == pytest.approx([1, 1], abs=0.01)


def test_the_norm_of_the_gradients_is_limited():
    x = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([x], 1.0)
    places, steps = [], []

    def loss(step):
        places.append(x.detach().clone())
        steps.append(step)
        return (x * torch.tensor([300.0, 400.0])).sum()

    list(descend("test", optimizer, loss, 40, clip=2.0, cycle=False))
    assert steps == list(range(40))
    assert (places[1] - places[0]).numpy() == pytest.approx(
        [-1.2 / 25, -1.6 / 25], rel=1e-4
    )  # OneCycleLR starts at 1/25


@pytest.mark.parametrize("steps, rise", [(1, 0.1), (10, 0.1), (20, 0.05), (2, 0.05)])
def test_any_number_of_steps(steps, rise):
    x = nn.Parameter(torch.ones(1))
    losses = list(descend("test", torch.optim.AdamW([x], 0.1), lambda step: x.square().sum(), steps, rise))
    assert len(losses) == steps and x.item() < 1

"""The average of the weights against its recursion in numpy."""

import numpy as np
import torch
from torch import nn

from engine.average import Average


def test_average_is_the_recursion():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average = Average(model, 0.9)
    expected = [p.detach().numpy().astype(np.float64) for p in model.parameters()]
    for step in range(200):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update(step)
        d = min(0.9, (1 + step) / (10 + step))  # the first updates would otherwise hang on to the start
        expected = [d * mean + (1 - d) * p.detach().numpy() for mean, p in zip(expected, model.parameters())]
    for mean, truth in zip(average.tensors, expected):
        np.testing.assert_allclose(mean.numpy(), truth, rtol=0, atol=1e-4)
    assert not any(torch.allclose(mean, p) for mean, p in zip(average.tensors, model.parameters()))


def test_average_leaves_frozen_weights_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    assert [tensor.shape for tensor in Average(model, 0.5).tensors] == [(3, 3), (3,)]


def test_in_place_and_back():
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    average = Average(model, 0.9)
    for mean in average.tensors:
        mean.fill_(7)
    with average.in_place():
        assert all((p == 7).all() for p in model.parameters())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert all((mean == 7).all() for mean in average.tensors)

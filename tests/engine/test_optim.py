"""optim.py against torch.optim.AdamW in float32, and stochastic rounding against its definition."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.optim import AdamWBF16, hash_bits, round_stochastically


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e20])
def test_rounding_takes_one_of_two_neighbours_and_the_mean_is_exact(size):
    x = size * torch.randn(50, generator=generator(1))
    bits = hash_bits(torch.arange(20_000 * 50, dtype=torch.int32) + 12345).view(20_000, 50)
    draws = round_stochastically(x.repeat(20_000, 1), bits).double()
    # The neighbours: the number with its last 16 bits cut off, and one step of bf16 (2^-7 of the power of two) further.
    below = (x.view(torch.int32) >> 16 << 16).view(torch.float32).double()
    step = 2.0 ** (x.double().abs().log2().floor() - 7) * x.sign()
    upper = draws != below
    assert torch.equal(draws, below + upper * step)
    share = (x.double() - below) / step  # of the upper one
    deviation = (share * (1 - share) / len(draws)).sqrt()
    assert ((upper.double().mean(0) - share).abs() < 5 * deviation + 1e-9).all()
    exact = x.bfloat16()
    assert torch.equal(round_stochastically(exact.float(), bits[0]), exact)


def murmur(h):
    """MurmurHash3's finalizer with Python's integers."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def test_bits_are_the_published_hash_and_look_random():
    x = torch.randint(-(2**31), 2**31, (2000,), generator=generator()).int()
    assert [int(h) % 2**32 for h in hash_bits(x)] == [murmur(int(n) % 2**32) for n in x]
    # Of neighbours: each bit is set in half of them, and the halves used for weight and moment are not alike.
    bits = hash_bits(torch.arange(2**18, dtype=torch.int32) + 99)
    set_bits = torch.stack([bits >> k & 1 for k in range(32)]).double()
    assert (set_bits.mean(1) - 0.5).abs().max() < 5 * 0.5 / 2**9
    three = torch.stack([bits & 0xFFFF, bits >> 16 & 0xFFFF, hash_bits(bits) & 0xFFFF, torch.roll(bits, 1) & 0xFFFF])
    assert (torch.corrcoef(three.double()) - torch.eye(4)).abs().max() < 5 / 2**9


def problem():
    """A small regression with a hidden layer: parameters, and the loss of the step with a given number."""
    x = torch.randn(256, 16, generator=generator(2))
    y = torch.sin(x @ torch.randn(16, 4, generator=generator(3)) / 2)
    weights = [torch.randn(shape, generator=generator(k)) / shape[-1] ** 0.5 for k, shape in enumerate(SHAPES)]

    def loss(parameters, step):
        rows = torch.randint(256, (64,), generator=generator(step))
        w_1, b_1, w_2 = parameters
        hidden = F.gelu(F.linear(x[rows].to(w_1.dtype), w_1, b_1[0]))
        return (F.linear(hidden, w_2).float() - y[rows]).square().mean()

    return [w.bfloat16().float() for w in weights], loss


SHAPES = [(64, 16), (1, 64), (4, 64)]


def train(kind, steps, lr=2e-3):
    """Parameters after training, the mean loss of the last 50 steps and of the first 5, and the optimizer."""
    start, loss = problem()
    dtype = torch.float32 if kind is torch.optim.AdamW else torch.bfloat16
    parameters = [nn.Parameter(w.to(dtype)) for w in start]
    optimizer, losses = kind(parameters, lr=lr, weight_decay=0.01), []
    for step in range(steps):
        value = loss(parameters, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return parameters, sum(losses[-50:]) / 50, sum(losses[:5]) / 5, optimizer


def test_it_learns_what_float32_learns():
    """400 steps: the loss falls as far, and the weights moved by nearly the same."""
    full, full_loss, first, _ = train(torch.optim.AdamW, 400)
    small, small_loss, _, optimizer = train(AdamWBF16, 400)
    assert full_loss < 0.3 * first and small_loss == pytest.approx(full_loss, rel=0.15)
    start, _ = problem()
    for a, b, w in zip(small, full, start):
        assert (a.float() - b).norm() < 0.15 * (b - w).norm()
    assert all(t.dtype == torch.bfloat16 for p in small for t in (p, *(optimizer.state[p][k] for k in MOMENTS)))


MOMENTS = ("exp_avg", "exp_avg_sq")


def test_updates_too_small_for_bf16_are_not_lost():
    """1,000 steps of 1e-5 from 1: rounding to nearest (steps of 2^-8 below 1) would stay at 1."""
    weight = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = AdamWBF16([weight], lr=1e-5, weight_decay=0.0)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(0.99, abs=1e-3)


@pytest.mark.parametrize(
    "piece, compiled", [(128, False), (2**24, False), pytest.param(2**24, True, marks=pytest.mark.slow)]
)
def test_one_step_is_adamw_s_before_rounding(piece, compiled, monkeypatch):
    """Each weight and moment is a bf16 neighbour of what AdamW in float32 makes of the same numbers."""
    monkeypatch.setattr("engine.optim.PIECE", piece)
    start, grads = (torch.randn(1000, generator=generator(k)).bfloat16() for k in (4, 5))
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours = AdamWBF16([mine], lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), compiled=compiled)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.8, 0.95))
    for _ in range(3):
        mine.grad, theirs.grad = grads.clone(), grads.float()
        ours.step(), reference.step()
        pairs = [(mine, theirs)] + [(ours.state[mine][key], reference.state[theirs][key]) for key in MOMENTS]
        for a, b in pairs:
            assert ((a.float() - b).abs() <= b.abs() * 2**-7 + 1e-12).all()
            with torch.no_grad():
                b.copy_(a)  # go on from the same


SHARDED = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from engine.optim import AdamWBF16

def stepped(model):
    for weight, grad in zip(model.parameters(), grads):
        weight.grad = grad if sharded is None else torch.distributed.tensor.distribute_tensor(
            grad, weight.device_mesh, weight.placements)
    AdamWBF16(model.parameters(), lr=0.01, seed=3).step()
    return [weight.detach() for weight in model.parameters()]

dist.init_process_group("gloo")
torch.manual_seed(0)
models = [nn.Linear(24, 11).bfloat16() for _ in range(2)]
models[1].load_state_dict(models[0].state_dict())
grads = [torch.randn(11, 24).bfloat16(), torch.randn(11).bfloat16()]
sharded = None
whole = stepped(models[0])
sharded = fully_shard(models[1], mesh=init_device_mesh("cpu", (2,)))
for part, weight in zip(stepped(models[1]), whole):
    assert part.to_local().shape != weight.shape and torch.equal(part.full_tensor(), weight)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_bits_follow_from_the_place_in_the_whole_weight(root, tmp_path):
    """Two shards become what the whole weight becomes: a run may continue on another number of ranks."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([*words, str(tmp_path / "sharded.py")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_numbers_that_are_not_finite_stay_so():
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)  # a GPU's own is the first
    x = torch.cat([nan, torch.tensor([float("inf"), float("-inf")])])
    rounded = round_stochastically(x, torch.full((5,), 0xFFFF, dtype=torch.int32))
    assert rounded[:3].isnan().all() and torch.equal(rounded[3:].float(), x[3:])


def test_the_same_seed_draws_the_same():
    first, again = (train(AdamWBF16, 20)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    other, _ = train(lambda p, **options: AdamWBF16(p, seed=1, **options), 20)[:2]
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


def test_compiled_once_whatever_the_size_and_the_step():
    """The compiled step gives what the plain one gives, but for roundings at a tie. It is compiled twice: for multiples
    of 16 numbers, and for others."""
    start = [torch.randn(size, generator=generator(k)).bfloat16() for k, size in enumerate((7, 300, 640, 4096))]
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        parameters = [nn.Parameter(w.clone()) for w in start]
        optimizer = AdamWBF16(parameters, lr=1e-2, compiled=compiled)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            for k, parameter in enumerate(parameters):
                parameter.grad = torch.randn(parameter.shape, generator=generator(10 * step + k)).bfloat16()
            optimizer.step()
        runs.append(parameters)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    for plain, compiled, first in zip(*runs, start):
        assert (plain == compiled).float().mean() > 0.97  # a last bit more or less in float32 may turn a rounding
        assert (plain.float() - compiled.float()).abs().max() <= 2**-7 * first.float().abs().max() + 1e-3

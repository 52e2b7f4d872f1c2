"""offload.py: streamed blocks give what resident ones give, and two of them are on the device.

On a CPU the "device" is a second set of buffers, so all but the overlap of copy and computation runs here too.
"""

from copy import deepcopy

import pytest
import torch
from conftest import TINY_A
from torch import nn

from engine.fp8 import FP8Linear, dequantize, store_in_fp8
from engine.offload import offload
from model import Block, LTXVideo

CPU = torch.device("cpu")


def with_blocks(count, dtype):
    """The tiny model with `count` blocks, no two alike."""
    model = LTXVideo.from_checkpoint(TINY_A, dtype=dtype)
    model.transformer_blocks = nn.ModuleList(Block(model.dim, model.heads) for _ in range(count)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.transformer_blocks.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


def velocity(model, golden):
    t, dtype = golden["sigma"], model.scale_shift_table.dtype
    timesteps = t[:, None].expand(-1, golden["latent"].shape[1])
    return model(golden["latent"].to(dtype), timesteps, t, golden["context"].to(dtype), golden["video_positions"])


@pytest.mark.parametrize("count, dtype, fp8", [(1, torch.float32, False), (2, torch.bfloat16, True), (5, None, False)])
def test_streamed_is_resident_to_the_bit(count, dtype, fp8, golden):
    resident, streamed = with_blocks(count, dtype or torch.float32), with_blocks(count, dtype or torch.float32)
    if fp8:
        store_in_fp8(resident), store_in_fp8(streamed)
    offload(streamed, CPU)
    for _ in range(2):  # the second time the device holds the last blocks
        assert torch.equal(velocity(streamed, golden), velocity(resident, golden))


def test_blocks_of_several_kinds_are_streamed(golden):
    """As of a checkpoint in fp8: the first block and the last in bf16, one in another format than the others."""

    def mixed():
        model = with_blocks(7, torch.bfloat16)
        plain = [deepcopy(model.transformer_blocks[k]) for k in (0, 6)]
        store_in_fp8(model)
        model.transformer_blocks[0], model.transformer_blocks[6] = plain
        odd = model.transformer_blocks[3].ff.net[2]
        whole = dequantize(odd.weight, odd.scale, torch.float32)
        model.transformer_blocks[3].ff.net[2] = FP8Linear(
            (whole / 3e-4).to(torch.float8_e5m2).view(torch.uint8),
            torch.full((1, 1), 3e-4),
            odd.bias,
            torch.float8_e5m2,
        )
        return model

    resident, streamed = mixed(), offload(mixed(), CPU)
    assert len(list(streamed.transformer_blocks.children())) == 4  # of block 0 and 6, of 1 and 5, of 2 and 4, of 3
    for _ in range(2):
        assert torch.equal(velocity(streamed, golden), velocity(resident, golden))


def test_two_blocks_are_on_the_device_and_one_is_fetched_ahead(golden):
    streamed = with_blocks(5, torch.float32)
    one = sum(p.nbytes for p in streamed.transformer_blocks[0].parameters())
    rest = sum(p.nbytes for p in streamed.parameters()) - 5 * one
    blocks, events = offload(streamed, CPU).transformer_blocks, []
    assert sum(p.nbytes for p in streamed.parameters()) == rest + 2 * one
    on_host = {t.data_ptr() for block in blocks.host for t in block}
    assert not on_host & {p.data_ptr() for p in streamed.parameters()}
    fetch = blocks.fetch
    blocks.fetch = lambda k: events.append(f"copy {k}") or fetch(k)
    for k, copy in enumerate(blocks.children()):
        copy.register_forward_pre_hook(lambda *_, k=k: events.append(f"run in {k}"))
    velocity(streamed, golden)
    want = [
        "copy 0",
        "copy 1",
        "run in 0",
        "copy 2",
        "run in 1",
        "copy 3",
        "run in 0",
        "copy 4",
        "run in 1",
        "run in 0",
    ]
    assert events == want


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: copies beside the computation")
def test_on_a_gpu_copies_never_overtake_the_blocks(golden):
    device = torch.device("cuda")
    there = {name: tensor.to(device) for name, tensor in golden.items()}
    want = velocity(with_blocks(5, torch.bfloat16).to(device), there)
    streamed = offload(with_blocks(5, torch.bfloat16), device)
    assert all(tensor.is_pinned() for block in streamed.transformer_blocks.host for tensor in block)
    assert all(torch.equal(velocity(streamed, there), want) for _ in range(20))

"""step_cache.py: when blocks are left out and what stands in for them, on blocks of known sums; whole samples."""

import pytest
import torch
from conftest import TINY_A
from torch._dynamo.testing import CompileCounter

from engine.fp8 import multiply_in_fp8, store_in_fp8
from engine.offload import offload
from engine.step_cache import StepCache
from guidance import sample_latents
from model import LTXVideo
from rope import RefPositions

STEPS = 4
NEAR = torch.linspace(0.5, 0.495, 13)  # noise levels between which even random weights change little


@pytest.fixture(scope="module")
def problem(golden):
    names = {"noise": "noise", "positions": "video_positions", "context": "context", "null_context": "null_context"}
    names |= {"z_ref": "ref", "sigmas": "sigmas"}
    return {key: golden[name] for key, name in names.items()} | {
        "ref_positions": RefPositions(golden["tass_positions"])
    }


@pytest.fixture
def count_blocks():
    """count_blocks(model) -> a list that grows by the batch size of each run of a block."""

    def watch(model):
        runs = []
        for block in model.transformer_blocks:
            block.register_forward_pre_hook(lambda _, inputs: runs.append(len(inputs[0])))
        return runs

    return watch


def run(x, blocks):
    for block in blocks:
        x = block(x)
    return x


def test_what_is_kept_and_what_is_left_out():
    """The first block adds 1, 1.05, 1.2 and 1.3: after 1 a threshold of 0.1 skips the second, runs the third, and then
    compares with the third."""
    first, others, ran = iter([1.0, 1.05, 1.2, 1.3]), iter([10.0, 20.0]), []

    def rest(x):
        ran.append(True)
        return x + next(others)

    cache, zeros = StepCache(0.1), torch.zeros(1, 2, 3)
    got = [cache(run, zeros, [lambda x: x + next(first), rest])[0, 0, 0].item() for _ in range(4)]
    assert got == pytest.approx([1 + 10, 1.05 + 10, 1.2 + 20, 1.3 + 20]) and len(ran) == 2


def test_threshold_0_is_no_cache_to_the_bit(model, problem):
    """With s_y = s_r no two streams share a batch, so the cache runs the same batches."""
    want = sample_latents(model, **problem, s_y=5.0, s_r=5.0)
    assert torch.equal(sample_latents(model, **problem, s_y=5.0, s_r=5.0, new_cache=lambda: StepCache(0.0)), want)
    three = sample_latents(model, **problem, new_cache=lambda: StepCache(0.0))
    torch.testing.assert_close(three, sample_latents(model, **problem), atol=1e-4, rtol=0)


def test_each_stream_has_a_cache_of_its_own(problem):
    made, seen = [], []

    def model(latents, timesteps, sigma, context, positions, cache):
        seen.append(cache)
        return torch.zeros_like(latents)

    sample_latents(model, **problem, new_cache=lambda: made.append(object()) or made[-1])
    assert len(made) == 3 and seen == made * STEPS


def test_a_large_threshold_leaves_only_the_first_block(problem, count_blocks):
    """Its step is then the first block, the change that the others made in the first step, and the output layers."""
    model = LTXVideo.from_checkpoint(TINY_A).requires_grad_(False)
    runs, blocks = count_blocks(model), len(model.transformer_blocks)
    options = {"s_y": 1.0, "s_r": 1.0}
    got = sample_latents(model, **problem, **options, new_cache=lambda: StepCache(1e9))
    assert len(runs) == blocks + STEPS - 1 > STEPS
    ends, runs[:] = [], []
    model.transformer_blocks[0].register_forward_hook(lambda *_: ends.append(_[2]))
    change = []

    def last(_, __, out):
        if not change:
            change.append(out - ends[0])
        return ends[-1] + change[0]

    model.transformer_blocks[-1].register_forward_hook(last)
    torch.testing.assert_close(got, sample_latents(model, **problem, **options), atol=1e-5, rtol=0)
    assert len(runs) == blocks * STEPS


def test_a_threshold_between_leaves_out_some(problem, count_blocks):
    """And blocks in host memory, copied one ahead, give the same."""
    model, streamed = (LTXVideo.from_checkpoint(TINY_A).requires_grad_(False) for _ in range(2))
    runs, near = count_blocks(model), problem | {"sigmas": NEAR}
    full = sample_latents(model, **near)
    complete, runs[:] = sum(runs), []
    got = sample_latents(model, **near, new_cache=lambda: StepCache(0.1))
    assert 0.5 * complete < sum(runs) < complete
    assert 0 < (got - full).abs().mean() < 0.01 * full.abs().mean()
    offload(streamed, torch.device("cpu"))
    assert torch.equal(sample_latents(streamed, **near, new_cache=lambda: StepCache(0.1)), got)


def test_no_new_graph_in_any_step(problem, count_blocks):
    """With products in 8 bits, a cache, and guidance in some of the steps."""
    model = multiply_in_fp8(store_in_fp8(LTXVideo.from_checkpoint(TINY_A, dtype=torch.bfloat16)))
    runs, counter = count_blocks(model), CompileCounter()
    model.compile_blocks(counter)
    some = {"sigmas": NEAR, "guidance_interval": (0.496, 0.499), "dtype": torch.bfloat16}
    sample_latents(model, **problem | some, new_cache=lambda: StepCache(0.1))
    steps = 12 + 2 * sum(0.496 <= sigma <= 0.499 for sigma in NEAR[:-1].tolist())
    assert steps < len(runs) < len(model.transformer_blocks) * steps
    assert counter.frame_count == 2  # streams without and with reference

"""guidance.py: the schedule and Eq. 13 from the facts, golden samples, which streams are computed, exact solutions."""

import itertools
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_A
from safetensors.torch import load_file, save_file

import guidance
from engine.step_cache import StepCache
from guidance import sample_latents, sigma_schedule, three_stream_cfg
from rope import ReferenceSettings, RefPositions, reference_positions, video_positions
from vae import from_tokens, to_tokens

SCALES = [(5.0, 7.5), (5.0, 0.0), (1.0, 7.5), (5.0, 5.0), (1.0, 1.0), (1.0, 0.0), (0.0, 3.0), (2.0, -1.0), (0.0, 0.0)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def problem(golden):
    """What `sample_latents` needs beside the model, from the golden vectors."""
    return {
        "noise": golden["noise"],
        "sigmas": golden["sigmas"],
        "positions": golden["video_positions"],
        "context": golden["context"],
        "null_context": golden["null_context"],
        "z_ref": golden["ref"],
        "ref_positions": RefPositions(golden["tass_positions"]),
    }


class Recorder:
    """A model that writes down what it was asked, and answers with a velocity unlike any other."""

    def __init__(self):
        self.calls = []

    def __call__(self, latents, timesteps, sigma, context, positions):
        self.calls.append({"latents": latents, "timesteps": timesteps, "sigma": sigma, "positions": positions})
        told = context.mean(dim=(1, 2)).view(-1, 1, 1) + latents.mean(dim=(1, 2), keepdim=True)
        return torch.sin(latents + 3 * told + positions.mean(dim=(1, 3))[..., None] / 100) * (1 + sigma.view(-1, 1, 1))

    def shapes(self):
        return [tuple(call["latents"].shape[:2]) for call in self.calls]


def by_hand(model, problem, s_y, s_r, ref_level=0.0):
    """Eq. 13 with all three streams computed one sample at a time, and Euler steps."""
    z, sigmas = problem["noise"].clone(), problem["sigmas"]
    tokens, reference = z.shape[1], problem["z_ref"].shape[1]
    for sigma, following in itertools.pairwise(sigmas):
        for row in range(len(z)):
            one = {
                key: value[row : row + 1] for key, value in problem.items() if key not in ("sigmas", "ref_positions")
            }
            ref_positions = problem["ref_positions"].positions[row : row + 1]
            x, level = z[row : row + 1].clone(), sigma[None]
            video_t = level.expand(1, tokens)
            v_0 = model(x, video_t, level, one["null_context"], one["positions"])
            v_y = model(x, video_t, level, one["context"], one["positions"])
            v_yr = model(
                torch.cat([x, one["z_ref"]], dim=1),
                torch.cat([video_t, torch.full((1, reference), float(sigma) * ref_level)], dim=1),
                level,
                one["context"],
                torch.cat([one["positions"], ref_positions], dim=2),
            )[:, :tokens]
            v = (1 - s_y) * v_0 + (s_y - s_r) * v_y + s_r * v_yr
            z[row] = z[row] + (v * (following - sigma))[0]
    return z


# ---------------------------------------------------------------------------------------------------------------------
# the schedule


def numpy_schedule(steps, tokens):
    slope = (2.05 - 0.95) / (4096 - 1024)
    strength = np.exp(0.95 + slope * (tokens - 1024))
    # 1 - sigma = (1/s - 1) / (strength + 1/s - 1), so that nothing cancels
    rest = 1 / np.linspace(1, 0, steps + 1)[:-1] - 1
    rest = rest / (strength + rest)
    return np.append(1 - rest * 0.9 / rest[-1], 0.0)


def test_schedules_equal_golden(golden):
    tokens = int(golden["grid"].prod())
    torch.testing.assert_close(sigma_schedule(4, tokens), golden["sigmas"], atol=1e-5, rtol=0)
    listed = [name for name in golden if name.startswith("sigmas_")]
    assert len(listed) == 3
    for name in listed:
        steps, tokens = map(int, name.split("_")[1:])
        torch.testing.assert_close(sigma_schedule(steps, tokens), golden[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(20))
def test_schedule_equals_the_facts_in_numpy(seed):
    rng = random.Random(seed)
    steps, tokens = rng.randint(2, 80), rng.randint(1, 12000)
    np.testing.assert_allclose(sigma_schedule(steps, tokens).numpy(), numpy_schedule(steps, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "frames, height, width",
    [(121, 480, 832), (121, 1088, 1920), (257, 1088, 1920), (481, 1088, 1920), (121, 2176, 3840), (1, 32, 32)],
)
def test_schedule_falls_from_one_to_zero_at_every_size(frames, height, width):
    """In float32 1 - sigma vanishes for long sequences: not a number from the first step on."""
    tokens = ((frames - 1) // 8 + 1) * (height // 32) * (width // 32)
    sigmas = sigma_schedule(30, tokens)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and abs(sigmas[-2] - 0.1) < 1e-6
    assert (sigmas.diff() <= 0).all()
    np.testing.assert_allclose(sigmas.numpy(), numpy_schedule(30, tokens), atol=1e-5, rtol=0)


def test_a_single_step_goes_straight_to_zero():
    assert sigma_schedule(1, 100).tolist() == [1, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 13


@pytest.mark.parametrize("seed", range(5))
def test_eq13_in_numpy(seed):
    rng = np.random.default_rng(seed)
    v_0, v_y, v_yr = rng.standard_normal((3, 2, 7, 4))
    s_y, s_r = rng.uniform(-2, 10, 2)
    want = v_0 + s_y * (v_y - v_0) + s_r * (v_yr - v_y)
    got = three_stream_cfg(*map(torch.from_numpy, (v_0, v_y, v_yr)), s_y, s_r)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-12)
    default = v_0 + 5.0 * (v_y - v_0) + 7.5 * (v_yr - v_y)
    np.testing.assert_allclose(three_stream_cfg(*map(torch.from_numpy, (v_0, v_y, v_yr))).numpy(), default, rtol=1e-12)


def test_three_stream_sample_equals_golden(model, problem, golden):
    z_0 = sample_latents(model, **problem, s_y=5.0, s_r=7.5)
    torch.testing.assert_close(z_0, golden["sampled"], atol=1e-3, rtol=0)


def test_defaults_are_the_papers(model, problem):
    assert torch.equal(sample_latents(model, **problem), sample_latents(model, **problem, s_y=5.0, s_r=7.5))


@pytest.mark.parametrize("s_y, s_r", SCALES)
def test_streams_left_out_give_what_all_three_give(problem, s_y, s_r):
    got = sample_latents(Recorder(), **problem, s_y=s_y, s_r=s_r)
    torch.testing.assert_close(got, by_hand(Recorder(), problem, s_y, s_r), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("s_y, s_r", SCALES)
def test_streams_left_out_give_what_all_three_give_with_the_real_model(model, problem, s_y, s_r):
    two_steps = problem | {"sigmas": problem["sigmas"][2:]}
    got = sample_latents(model, **two_steps, s_y=s_y, s_r=s_r)
    torch.testing.assert_close(got, by_hand(model, two_steps, s_y, s_r), atol=1e-3, rtol=0)


@pytest.mark.parametrize("s_y, s_r", SCALES)
def test_streams_with_weight_zero_are_not_computed(problem, s_y, s_r):
    """Weights of Eq. 13: 1 - s_y for v_0, s_y - s_r for v_y, s_r for v_yr. Those without reference share a batch."""
    recorder = Recorder()
    sample_latents(recorder, **problem, s_y=s_y, s_r=s_r)
    batch, tokens = problem["noise"].shape[:2]
    without = (s_y != 1) + (s_y != s_r)
    expected = [(without * batch, tokens)] if without else []
    expected += [(batch, tokens + problem["z_ref"].shape[1])] if s_r else []
    assert recorder.shapes() == expected * (len(problem["sigmas"]) - 1)


@pytest.mark.parametrize("s_y", [5.0, 1.0, 2.5])
def test_no_reference_or_s_ref_zero_is_ordinary_text_guidance(model, problem, s_y):
    z, sigmas = problem["noise"].clone(), problem["sigmas"]
    for sigma, following in itertools.pairwise(sigmas):
        level = sigma.expand(2)
        common = z, level[:, None].expand(-1, z.shape[1]), level
        v_text = model(*common, problem["context"], problem["positions"])
        v_null = model(*common, problem["null_context"], problem["positions"])
        z = z + (v_null + s_y * (v_text - v_null)) * (following - sigma)
    torch.testing.assert_close(sample_latents(model, **problem, s_y=s_y, s_r=0.0), z, atol=1e-3, rtol=0)
    plain = {key: value for key, value in problem.items() if key not in ("z_ref", "ref_positions")}
    torch.testing.assert_close(sample_latents(model, **plain, s_y=s_y), z, atol=1e-3, rtol=0)


def test_reference_is_clean_and_the_video_is_at_sigma(problem):
    recorder = Recorder()
    sample_latents(recorder, **problem)
    tokens = problem["noise"].shape[1]
    for sigma, (without, with_reference) in zip(problem["sigmas"], zip(recorder.calls[::2], recorder.calls[1::2])):
        assert (without["timesteps"] == sigma).all() and (without["sigma"] == sigma).all()
        assert (with_reference["timesteps"][:, :tokens] == sigma).all() and (with_reference["sigma"] == sigma).all()
        assert (with_reference["timesteps"][:, tokens:] == 0).all()
        assert torch.equal(with_reference["latents"][:, tokens:], problem["z_ref"])
        assert torch.equal(with_reference["positions"][:, :, tokens:], problem["ref_positions"].positions)


def test_ref_timestep_shared_gives_the_reference_the_videos_level(model, problem):
    clean = sample_latents(model, **problem)
    shared = sample_latents(model, **problem, ref_timestep="shared")
    assert (clean - shared).abs().max() > 1e-2
    torch.testing.assert_close(shared, by_hand(model, problem, 5.0, 7.5, ref_level=1.0), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="'noisy'"):
        sample_latents(model, **problem, ref_timestep="noisy")


@pytest.mark.parametrize("seed", range(4))
def test_euler_on_a_straight_path_ends_at_the_clean_latent(problem, seed):
    """z_t = (1 - t) z_0 + t eps has v = (z_t - z_0) / t: any schedule must return z_0."""
    z_0, eps = randn(2, 18, 4, seed=seed), randn(2, 18, 4, seed=100 + seed)
    steps = random.Random(seed).randint(1, 40)

    def true_velocity(latents, timesteps, sigma, context, positions):
        clean = z_0.repeat(len(latents) // 2, 1, 1)
        v = torch.zeros_like(latents)
        v[:, :18] = (latents[:, :18] - clean) / sigma.view(-1, 1, 1)
        return v

    got = sample_latents(true_velocity, **(problem | {"noise": eps, "sigmas": sigma_schedule(steps, 18)}))
    torch.testing.assert_close(got, z_0, atol=1e-4, rtol=0)


@pytest.mark.parametrize("s_y, s_r, outside", [(5.0, 7.5, "vyr"), (5.0, 0.0, "vy"), (5.0, 5.0, "vyr")])
def test_outside_the_interval_one_stream_is_computed(problem, s_y, s_r, outside):
    """Guidance at sigma in [low, high], both ends included; elsewhere v_yr alone, or v_y where no step uses the
    reference."""
    sigmas, recorder = problem["sigmas"], Recorder()
    low, high = sigmas[2].item(), sigmas[1].item()
    got = sample_latents(recorder, **problem, s_y=s_y, s_r=s_r, guidance_interval=(low, high))
    batch, tokens = problem["noise"].shape[:2]
    one = batch, tokens + (problem["z_ref"].shape[1] if outside == "vyr" else 0)
    without = ((1 + (s_y != s_r)) * batch, tokens)
    inside = [without, (batch, tokens + problem["z_ref"].shape[1])] if s_r else [without]
    assert recorder.shapes() == [one, *inside, *inside, one]
    z = problem["noise"]
    for k in range(4):
        scales = (s_y, s_r) if k in (1, 2) else (1.0, 1.0 if s_r else 0.0)
        z = by_hand(Recorder(), problem | {"noise": z, "sigmas": sigmas[k : k + 2]}, *scales)
    torch.testing.assert_close(got, z, atol=1e-4, rtol=1e-4)
    everywhere = sample_latents(Recorder(), **problem, s_y=s_y, s_r=s_r)
    assert torch.equal(sample_latents(Recorder(), **problem, s_y=s_y, s_r=s_r, guidance_interval=(0, 1)), everywhere)


def test_steps_are_summed_in_float32_when_the_model_runs_in_bfloat16(problem):
    def constant(latents, timesteps, sigma, context, positions):
        assert latents.dtype == context.dtype == torch.bfloat16
        return torch.ones_like(latents)

    steps = problem | {"sigmas": sigma_schedule(60, 6240)}
    got = sample_latents(constant, **steps, dtype=torch.bfloat16)
    torch.testing.assert_close(got, problem["noise"] - 1, atol=1e-5, rtol=0)


def test_progress_wraps_the_steps(problem):
    seen = []
    sample_latents(Recorder(), **problem, progress=lambda steps: seen.extend(steps) or seen)
    assert seen == [0, 1, 2, 3]


SHARED = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from engine.step_cache import StepCache
from guidance import sample_latents
from model import LTXVideo
from rope import RefPositions

torch.set_num_threads(1)
rank, store, ckpt, problem, out = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
model = LTXVideo.from_checkpoint(ckpt).requires_grad_(False)
streams = []
model.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].shape[0] // 2))
problem, results = load_file(problem), {}
problem["ref_positions"] = RefPositions(problem.pop("ref_positions"))
for world in (2, 3):  # for two the third process has nothing to do
    for reference in (True, False):
        part = {key: value for key, value in problem.items() if reference or key not in ("z_ref", "ref_positions")}
        streams.clear()
        results[f"{world}{reference}"] = sample_latents(model, **part, ranks=(rank, world))
        results[f"streams{world}{reference}"] = torch.tensor(streams)
middle = [problem["sigmas"][2].item(), problem["sigmas"][1].item()]
fewer = {"guidance_interval": middle, "new_cache": lambda: StepCache(1e9)}
results["fewer"] = sample_latents(model, **problem, **fewer, ranks=(rank, 3))
save_file(results, out)
dist.barrier()
dist.destroy_process_group()  # a process that ends with gloo's threads alive may abort
"""


def test_streams_on_two_and_three_processes_are_as_on_one(model, problem, tmp_path):
    tensors = problem | {"ref_positions": problem["ref_positions"].positions}
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "problem")
    words = [str(tmp_path / "store"), str(TINY_A), str(tmp_path / "problem")]
    running = [
        subprocess.Popen([sys.executable, "-c", SHARED, str(rank), *words, str(tmp_path / f"out-{rank}")], cwd=ROOT)
        for rank in range(3)
    ]
    assert [process.wait(timeout=600) for process in running] == [0, 0, 0]
    results = [load_file(tmp_path / f"out-{rank}") for rank in range(3)]
    steps = len(problem["sigmas"]) - 1
    for reference in (True, False):
        part = {key: value for key, value in problem.items() if reference or key not in ("z_ref", "ref_positions")}
        want = sample_latents(model, **part)
        for world in (2, 3):
            for result in results:
                torch.testing.assert_close(result[f"{world}{reference}"], want, atol=1e-4, rtol=0)
            # How many streams each process computed in its calls; with two, those without reference are one batch.
            shares = [result[f"streams{world}{reference}"].tolist() for result in results]
            alone, both = [1] * steps, [2] * steps
            third = alone if reference and world == 3 else []
            assert shares == [both if reference and world == 2 else alone, alone, third]
    middle = [problem["sigmas"][2].item(), problem["sigmas"][1].item()]
    fewer = {"guidance_interval": middle, "new_cache": lambda: StepCache(1e9)}
    for result in results:
        assert torch.equal(result["fewer"], sample_latents(model, **problem, **fewer))


# ---------------------------------------------------------------------------------------------------------------------
# generate

SIZES = {"frames": 9, "height": 64, "width": 96, "fps": 24.0, "steps": 2}
GRID = (2, 2, 3)


@pytest.fixture(scope="module")
def world(model, vae):
    return {
        "model": model,
        "vae": vae,
        "context": randn(1, 16, 128, seed=1),
        "null_context": randn(1, 16, 128, seed=2),
        "ref_image": randn(3, 64, 96, seed=3).clamp(-1, 1),
    }


@pytest.mark.parametrize("placement", ["tass", "overlap", "remote"])
def test_generate_is_encode_sample_decode(world, placement):
    reference = ReferenceSettings(placement=placement)
    got = guidance.generate(**world, **SIZES, seed=5, reference=reference, s_y=3.0, s_r=2.0)
    tokens = math.prod(GRID)
    noise = torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(5))
    problem = {
        "noise": noise,
        "sigmas": sigma_schedule(2, tokens),
        "positions": video_positions(*GRID, 24.0)[None],
        "context": world["context"],
        "null_context": world["null_context"],
        "z_ref": to_tokens(world["vae"].encode(world["ref_image"][None, :, None])),
        "ref_positions": RefPositions(reference_positions(*GRID, 24.0, placement=placement)[None]),
    }
    want = world["vae"].decode(from_tokens(by_hand(world["model"], problem, 3.0, 2.0), GRID))[0]
    assert got.shape == (3, 9, 64, 96) and got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


def test_phase_scale_zero_is_overlap_to_the_bit(world):
    def video(**options):
        return guidance.generate(**world, **SIZES, reference=ReferenceSettings(**options))

    overlap = video(placement="overlap")
    assert torch.equal(video(placement="phase", phase_scale=0.0), overlap)
    assert torch.equal(video(placement="overlap", source_id=7, phase_scale=3.0), overlap)
    videos = [overlap, video(placement="phase"), video(placement="phase", source_id=1)]
    assert all((a - b).abs().mean() > 1e-3 for a, b in itertools.combinations(videos, 2))
    same = video(placement="phase", source_id=1, phase_scale=2.0)  # only their product counts
    torch.testing.assert_close(same, videos[1], atol=1e-5, rtol=0)


def test_phase_goes_to_the_references_tokens_alone(problem):
    phases = []

    class WithPhase(Recorder):
        def __call__(self, *arguments, phase=None):
            phases.append(phase)
            return super().__call__(*arguments)

    sample_latents(WithPhase(), **(problem | {"ref_positions": problem["ref_positions"]._replace(phase=1.5)}))
    tokens, reference = problem["noise"].shape[1], problem["z_ref"].shape[1]
    want = torch.cat([torch.zeros(2, tokens), torch.full((2, reference), 1.5)], dim=1)
    assert len(phases) == 2 * (len(problem["sigmas"]) - 1)
    assert all(phase is None for phase in phases[::2]) and all(torch.equal(phase, want) for phase in phases[1::2])


def test_sigmas_that_are_given_replace_the_schedule(world):
    given = guidance.generate(**world, **SIZES, sigmas=guidance.DISTILLED_SIGMAS, s_y=1.0, s_r=1.0)
    grid, level = {"positions": video_positions(*GRID, 24.0)[None]}, torch.tensor(guidance.DISTILLED_SIGMAS)
    reference = to_tokens(world["vae"].encode(world["ref_image"][None, :, None]))
    grid |= {"z_ref": reference, "ref_positions": RefPositions(reference_positions(*GRID, 24.0)[None])}
    noise = torch.randn(1, math.prod(GRID), 4, generator=torch.Generator().manual_seed(0))
    common = {"context": world["context"], "null_context": world["null_context"], "s_y": 1.0, "s_r": 1.0}
    z_0 = sample_latents(world["model"], noise, level, **grid, **common)
    torch.testing.assert_close(given, world["vae"].decode(from_tokens(z_0, GRID))[0], atol=1e-5, rtol=0)
    assert guidance.DISTILLED_SIGMAS == (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0)


def test_one_seed_is_one_video(world):
    state = torch.get_rng_state()
    first = guidance.generate(**world, **SIZES, seed=7)
    assert torch.equal(torch.get_rng_state(), state)  # and nobody else's random numbers change
    torch.manual_seed(12345)
    assert torch.equal(guidance.generate(**world, **SIZES, seed=7), first)
    assert (guidance.generate(**world, **SIZES, seed=8) - first).abs().mean() > 1e-2


def test_generate_without_reference_is_text_to_video(world):
    text_only = guidance.generate(**(world | {"ref_image": None}), **SIZES)
    torch.testing.assert_close(text_only, guidance.generate(**world, **SIZES, s_r=0.0), atol=1e-5, rtol=0)
    assert (text_only - guidance.generate(**world, **SIZES)).abs().mean() > 1e-3


def test_a_schedule_of_any_length_is_finite_and_falls():
    for tokens in (16, 6_240, 3_000_000, 10**9):
        sigmas = sigma_schedule(30, tokens)
        assert sigmas.isfinite().all() and sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() <= 0).all()
        assert sigmas[-2].item() == pytest.approx(0.1, abs=1e-6)

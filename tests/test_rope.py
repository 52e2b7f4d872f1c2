"""rope.py against the golden vectors, against the facts written out in numpy, and by the properties Sec. 3.2 wants."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import rope

SEEDS = range(8)
MAX_POS = [20, 2048, 2048]


def draw_grid(seed):
    """A random video: latent grid, frame rate."""
    rng = random.Random(seed)
    grid = rng.randint(1, 17), rng.randint(1, 12), rng.randint(1, 12)
    return grid, rng.choice([8.0, 23.976, 24.0, 25.0, 30.0, 60.0])


def numpy_positions(origin, grid, fps, scale=(8, 32, 32)):
    """Intervals of the cells of a grid from `origin`, token by token, from the facts. (3, N, 2)"""
    tokens = []
    for t in range(origin[0], origin[0] + grid[0]):
        for h in range(origin[1], origin[1] + grid[1]):
            for w in range(origin[2], origin[2] + grid[2]):
                start, end = max(0, scale[0] * t + 1 - scale[0]), scale[0] * (t + 1) + 1 - scale[0]
                rows, columns = (h * scale[1], (h + 1) * scale[1]), (w * scale[2], (w + 1) * scale[2])
                tokens.append([(start / fps, end / fps), rows, columns])
    return np.array(tokens, dtype=np.float64).transpose(1, 0, 2)


def numpy_rope(positions, dim, heads, theta, max_pos, phase=None):
    """Rotary tables of positions (B, axes, N, 2) from the facts; float32 where the facts say so.

    phase: (source_id, phase_scale, which tokens are the reference's), as LTX-Best-Face-ID has it.
    """
    batch, axes, tokens, _ = positions.shape
    count = dim // 2 // axes
    ladder = (theta ** np.linspace(0, 1, count, dtype=np.float64) * np.pi / 2).astype(np.float32)
    table = np.zeros((batch, tokens, dim // 2), dtype=np.float32)
    padding = dim // 2 - axes * count
    for axis in range(axes):
        middle = (positions[:, axis, :, 0] + positions[:, axis, :, 1]) / np.float32(2)
        signed = np.float32(2) * (middle / np.float32(max_pos[axis])) - np.float32(1)
        table[:, :, padding + axis :: axes] = signed[..., None] * ladder
    table = table.reshape(batch, tokens, heads, -1).transpose(0, 2, 1, 3)
    if phase is not None:
        source_id, phase_scale, is_reference = phase
        L = dim // heads // 2
        for d in range(L):
            table[:, :, is_reference, d] += np.float32(source_id * phase_scale * 10000 ** (-d / L))
    return np.cos(table), np.sin(table)


def scores(q, k, cos, sin):
    return rope.apply_rope(q, cos, sin) @ rope.apply_rope(k, cos, sin).transpose(-1, -2) / q.shape[-1] ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# positions


def test_positions_equal_the_golden_ones(golden):
    grid, fps = golden["grid"].tolist(), golden["fps"].item()
    for row in golden["video_positions"]:
        torch.testing.assert_close(rope.video_positions(*grid, fps), row, atol=1e-5, rtol=0)
    for row in golden["tass_positions"]:
        torch.testing.assert_close(rope.reference_positions(*grid, fps), row, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scale", [(8, 32, 32), (4, 8, 8), (2, 16, 4)])
def test_positions_equal_the_facts_in_numpy(seed, scale):
    grid, fps = draw_grid(seed)
    T, H, W = grid
    want = numpy_positions((0, 0, 0), grid, fps, scale)
    np.testing.assert_allclose(rope.video_positions(*grid, fps, scale).numpy(), want, atol=1e-5, rtol=1e-6)
    want = numpy_positions((T, H, W), (1, H, W), fps, scale)
    np.testing.assert_allclose(rope.reference_positions(*grid, fps, scale).numpy(), want, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_placement_is_where_the_paper_says(seed):
    grid, fps = draw_grid(seed)
    T, H, W = grid
    origins = {
        "tass": (T, H, W),
        "overlap": (0, 0, 0),
        "temporal": (T, 0, 0),
        "fixed": (100, H, W),
        "remote": (T + 100, H, W),
        "phase": (0, 0, 0),
    }
    assert set(origins) == set(rope.PLACEMENTS)
    for name, origin in origins.items():
        want = numpy_positions(origin, (1, H, W), fps)
        got = rope.reference_positions(*grid, fps, placement=name)
        np.testing.assert_allclose(got.numpy(), want, atol=1e-5, rtol=1e-6, err_msg=name)


def test_unknown_placement_is_refused():
    with pytest.raises(ValueError, match=r"'nowhere'.*tass"):
        rope.reference_positions(2, 2, 2, 24.0, placement="nowhere")


@pytest.mark.parametrize("seed", range(30))
def test_no_reference_token_shares_a_row_or_column_with_a_video_token(seed):
    """The point of TASS: a shared spatial coordinate is what lets the model copy and paste."""
    grid, fps = draw_grid(seed)
    video, reference = rope.video_positions(*grid, fps), rope.reference_positions(*grid, fps)
    for axis in (0, 1, 2):  # interval against interval, every pair; time as well
        start, end = video[axis, :, None].unbind(-1)
        overlap = (reference[axis, None, :, 0] < end) & (reference[axis, None, :, 1] > start)
        assert not overlap.any(), ("time", "height", "width")[axis]
    rejected = rope.reference_positions(*grid, fps, placement="temporal")
    assert torch.equal(rejected[1:], video[1:, : grid[1] * grid[2]])  # so the statement can be false


@pytest.mark.parametrize("seed", SEEDS)
def test_reference_takes_the_first_time_slot_after_the_video(seed):
    grid, fps = draw_grid(seed)
    video, reference = rope.video_positions(*grid, fps), rope.reference_positions(*grid, fps)
    start, end = reference[0].unbind(-1)
    assert (start == video[0, :, 1].max()).all()
    torch.testing.assert_close(end - start, torch.full_like(start, 8 / fps), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_whole_cells_are_a_constant_shift_in_seconds_and_pixels(seed):
    """True from time cell 1 on; cell 0 is the single first frame."""
    grid, fps = draw_grid(seed)
    shift = torch.randint(0, 9, (3,), generator=torch.Generator().manual_seed(seed))
    cells = rope.cell_grid(*grid, origin=(1, 0, 0))
    here = rope.to_seconds_and_pixels(cells, fps, (8, 32, 32))
    there = rope.to_seconds_and_pixels(cells + shift[:, None], fps, (8, 32, 32))
    step = shift * torch.tensor([8 / fps, 32, 32])
    torch.testing.assert_close(there - here, step[:, None, None].expand_as(here), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# rotary embedding


def test_rotary_tables_equal_the_golden_ones(golden):
    positions = torch.cat([golden["video_positions"], golden["tass_positions"]], dim=2)
    cos, sin = rope.rope_cos_sin(positions, 128, 4, 10000.0, MAX_POS)
    torch.testing.assert_close(cos, golden["rope_cos"], atol=1e-5, rtol=0)
    torch.testing.assert_close(sin, golden["rope_sin"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim, heads", [(4096, 32), (128, 4), (192, 2), (96, 3)])
def test_rotary_tables_equal_the_facts_in_numpy(dim, heads):
    positions = torch.stack([rope.video_positions(4, 5, 6, 24.0), rope.video_positions(4, 5, 6, 8.0)])
    got = rope.rope_cos_sin(positions, dim, heads, 10000.0, MAX_POS)
    for table, want in zip(got, numpy_rope(positions.numpy(), dim, heads, 10000.0, MAX_POS)):
        assert table.shape == (2, heads, 120, dim // heads // 2) and table.dtype == torch.float32
        np.testing.assert_allclose(table.numpy(), want, atol=1e-5, rtol=0)


def test_the_full_model_pads_two_slots_in_front_of_the_first_head():
    positions = rope.video_positions(3, 4, 5, 24.0)[None]
    cos, sin = rope.rope_cos_sin(positions, 4096, 32, 10000.0, MAX_POS)
    assert (cos[:, 0, :, :2] == 1).all() and (sin[:, 0, :, :2] == 0).all()
    assert (sin[:, 0, :, 2:] != 0).all() and (sin[:, -1, :, -1] != 0).any()


def test_one_axis_tables_of_the_connector():
    slots = torch.arange(1024.0).expand(1, 1, -1)
    positions = torch.stack([slots, slots], dim=-1)
    got = rope.rope_cos_sin(positions, 4096, 32, 10000.0, [4096])
    for table, want in zip(got, numpy_rope(positions.numpy(), 4096, 32, 10000.0, [4096])):
        np.testing.assert_allclose(table.numpy(), want, atol=1e-5, rtol=0)


def test_apply_rope_turns_the_two_halves_as_complex_numbers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=generator)
    angle = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angle)
    got = rope.apply_rope(x, angle.cos(), angle.sin())
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], dim=-1))


@pytest.mark.parametrize("seed", SEEDS)
def test_shifting_everything_together_leaves_attention_scores_unchanged(seed):
    """Only differences of position may count, between video tokens and from video to reference."""
    grid, fps = draw_grid(seed)
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cat([rope.video_positions(*grid, fps), rope.reference_positions(*grid, fps)], dim=1)[None]
    positions = positions[:, :, torch.randperm(positions.shape[2], generator=generator)[:200]]
    cells = torch.randint(1, 12, (3,), generator=generator)
    shift = (cells * torch.tensor([8 / fps, 32, 32])).view(1, 3, 1, 1)
    q, k = torch.randn(2, 1, 4, positions.shape[2], 32, generator=generator)
    here = scores(q, k, *rope.rope_cos_sin(positions, 128, 4, 10000.0, MAX_POS))
    there = scores(q, k, *rope.rope_cos_sin(positions + shift, 128, 4, 10000.0, MAX_POS))
    torch.testing.assert_close(there, here, atol=1e-2, rtol=0)  # float32 angles of up to 10^4 hold three digits
    alone = positions.clone()
    alone[:, :, : positions.shape[2] // 2] += shift
    moved = scores(q, k, *rope.rope_cos_sin(alone, 128, 4, 10000.0, MAX_POS))
    assert positions.shape[2] < 2 or (moved - here).abs().max() > 0.3  # so the statement can be false


# ---------------------------------------------------------------------------------------------------------------------
# the source phase of LTX-Best-Face-ID


def overlapping(seed):
    """Positions (1, 3, N, 2) of a video and of a reference on its first frame, and which tokens are the reference's."""
    grid, fps = draw_grid(seed)
    video, reference = rope.video_positions(*grid, fps), rope.reference_positions(*grid, fps, placement="phase")
    assert torch.equal(reference, rope.reference_positions(*grid, fps, placement="overlap"))
    is_reference = torch.arange(video.shape[1] + reference.shape[1]) >= video.shape[1]
    return torch.cat([video, reference], dim=1)[None], is_reference


def phase_of(placement, source_id=2, phase_scale=1.0):
    reference = rope.ReferenceSettings(placement=placement, source_id=source_id, phase_scale=phase_scale)
    return rope.place_reference((2, 3, 4), 24.0, (8, 32, 32), reference).phase


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("source_id, phase_scale", [(2, 1.0), (1, 1.0), (3, 0.25)])
def test_phase_equals_its_definition_in_numpy(seed, source_id, phase_scale):
    positions, is_reference = overlapping(seed)
    phase = phase_of("phase", source_id, phase_scale) * is_reference.float()[None]
    got = rope.rope_cos_sin(positions, 128, 4, 10000.0, MAX_POS, phase)
    want = numpy_rope(positions.numpy(), 128, 4, 10000.0, MAX_POS, (source_id, phase_scale, is_reference.numpy()))
    plain = rope.rope_cos_sin(positions, 128, 4, 10000.0, MAX_POS)
    for table, expected, before in zip(got, want, plain):
        np.testing.assert_allclose(table.numpy(), expected, atol=1e-5, rtol=0)
        assert torch.equal(table[:, :, ~is_reference], before[:, :, ~is_reference])
        assert not torch.equal(table[:, :, is_reference], before[:, :, is_reference])


@pytest.mark.parametrize("seed", SEEDS)
def test_phase_leaves_attention_among_video_tokens_alone(seed):
    """And among reference tokens, since both turn alike; only what passes between the two changes."""
    positions, is_reference = overlapping(seed)
    q, k = torch.randn(2, 1, 4, positions.shape[2], 32, generator=torch.Generator().manual_seed(seed))
    phase = 2.0 * is_reference.float()[None]
    before = scores(q, k, *rope.rope_cos_sin(positions, 128, 4, 10000.0, MAX_POS))
    after = scores(q, k, *rope.rope_cos_sin(positions, 128, 4, 10000.0, MAX_POS, phase))
    video = ~is_reference
    assert torch.equal(after[..., video, :][..., video], before[..., video, :][..., video])
    both = after[..., is_reference, :][..., is_reference]
    torch.testing.assert_close(both, before[..., is_reference, :][..., is_reference], atol=1e-2, rtol=0)
    between = after[..., video, :][..., is_reference] - before[..., video, :][..., is_reference]
    assert between.abs().max() > 0.5


def test_only_the_placement_phase_has_one():
    assert phase_of("phase") == 2.0 and phase_of("phase", 3, 0.5) == 1.5
    assert phase_of("phase", 2, 0.0) == 0
    assert all(phase_of(name, 2, 1.0) == 0 for name in rope.PLACEMENTS if name != "phase")


# ---------------------------------------------------------------------------------------------------------------------
# the picture


def draw(root, out):
    command = [sys.executable, root / "docs" / "figures.py", "--out", out]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_command_draws_video_and_reference(root, tmp_path):
    done = draw(root, tmp_path / "tass.png")
    assert done.returncode == 0 and not done.stderr, done.stderr
    with Image.open(tmp_path / "tass.png") as image:
        assert image.format == "PNG" and 800 < image.width < 3000 and 400 < image.height < 2000
        r, g, b = np.asarray(image.convert("RGB"), dtype=int).reshape(-1, 3).T
    orange, blue = (r > b + 60) & (r > g + 30), (b > r + 25) & (b > g + 8)  # shaded by the light
    assert orange.mean() > 0.01 and blue.mean() > 0.02


@pytest.mark.slow
def test_command_with_nowhere_to_draw_says_so_in_one_line(root, tmp_path):
    (tmp_path / "file").touch()
    done = draw(root, tmp_path / "file" / "tass.png")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr

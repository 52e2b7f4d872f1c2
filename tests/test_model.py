"""model.py against the golden vectors, and what an attention over places and per-token timesteps must keep."""

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter

from engine.parallel import first_weight, set_recompute
from model import LTXVideo

FPS = 24.0


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def inputs(golden):
    """Arguments of the model for [video, clean reference], as a dict to change entries of."""
    tokens, reference = golden["latent"].shape[1], golden["ref"].shape[1]
    sigma = golden["sigma"]
    timesteps = torch.cat([sigma[:, None].expand(-1, tokens), torch.zeros(2, reference)], dim=1)
    return {
        "latents": torch.cat([golden["latent"], golden["ref"]], dim=1),
        "timesteps": timesteps,
        "sigma": sigma,
        "context": golden["context"],
        "positions": torch.cat([golden["video_positions"], golden["tass_positions"]], dim=2),
    }


@pytest.fixture(scope="module")
def tokens(golden):
    return golden["latent"].shape[1]


def as_dtype(inputs, dtype):
    """Latents and context in the model's dtype; levels and places stay float32, as sampling passes them."""
    return inputs | {key: inputs[key].to(dtype) for key in ("latents", "context")}


def test_velocity_equals_golden_without_reference(model, golden):
    sigma, tokens = golden["sigma"], golden["latent"].shape[1]
    timesteps = sigma[:, None].expand(-1, tokens)
    v = model(golden["latent"], timesteps, sigma, golden["context"], golden["video_positions"])
    torch.testing.assert_close(v, golden["velocity_text"], atol=1e-4, rtol=0)


def test_velocity_equals_golden_with_reference(model, golden, inputs):
    torch.testing.assert_close(model(**inputs), golden["velocity_text_ref"], atol=1e-4, rtol=0)


def test_float64_agrees_with_golden(tiny_a, golden, inputs):
    double = LTXVideo.from_checkpoint(tiny_a, dtype=torch.float64)
    v = double(**as_dtype(inputs, torch.float64))
    assert v.dtype == torch.float64
    torch.testing.assert_close(v.float(), golden["velocity_text_ref"], atol=1e-4, rtol=0)


def test_bfloat16_runs_and_is_near(tiny_a, golden, inputs):
    half = LTXVideo.from_checkpoint(tiny_a, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    v = half(**as_dtype(inputs, torch.bfloat16))
    want = golden["velocity_text_ref"]
    assert v.dtype == torch.bfloat16
    assert (v.float() - want).abs().mean() < 0.05 * want.abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_timestep_sinusoid_is_made_in_float32(model, dtype):
    """In bf16, 1000 t is known to 4 only: sigmas 0.997 and 0.999 would be the same noise level."""
    seen = []
    model = model.adaln_single.emb["timestep_embedder"]
    hook = model.linear_1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    t = torch.tensor([0.997, 0.998, 0.999, 1.0])
    with pytest.raises(RuntimeError):  # float32 weights after a sinusoid in another dtype
        model(t, dtype)
    hook.remove()
    k = torch.arange(128, dtype=torch.float64)
    angles = 1000 * t.double()[:, None] * 10000 ** (-k / 128)
    want = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert seen[0].dtype == dtype and (seen[0].double() - want).abs().max() < 4e-3


@pytest.mark.parametrize("seed", range(4))
def test_samples_of_a_batch_do_not_mix(model, seed):
    sizes = torch.Generator().manual_seed(seed)
    n, s = (torch.randint(3, 20, (2,), generator=sizes)).tolist()
    arguments = {
        "latents": randn(3, n, 4, seed=seed),
        "timesteps": torch.rand(3, n, generator=sizes),
        "sigma": torch.rand(3, generator=sizes),
        "context": randn(3, s, 128, seed=seed + 1),
        "positions": 100 * torch.rand(3, 3, n, 2, generator=sizes),
    }
    together = model(**arguments)
    for row in range(3):
        alone = model(**{key: value[row : row + 1] for key, value in arguments.items()})
        torch.testing.assert_close(alone, together[row : row + 1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_order_of_reference_tokens_means_nothing(model, inputs, tokens, seed):
    """A token is known by its position alone, not by its place in the sequence."""
    total = inputs["latents"].shape[1]
    order = torch.arange(total)
    order[tokens:] = tokens + torch.randperm(total - tokens, generator=torch.Generator().manual_seed(seed))
    moved = inputs | {key: inputs[key][:, order] for key in ("latents", "timesteps")}
    moved["positions"] = inputs["positions"][:, :, order]
    v = model(**inputs)[:, :tokens]
    torch.testing.assert_close(model(**moved)[:, :tokens], v, atol=2e-5, rtol=0)
    displaced = model(**(moved | {"positions": inputs["positions"]}))[:, :tokens]  # the tokens without their positions
    assert torch.equal(order, torch.arange(total)) or (displaced - v).abs().max() > 1e-4


def test_a_phase_of_all_tokens_is_none(model, inputs, tokens):
    """It turns q and k of self-attention alike, so only differences count; text attention must not see it."""
    v = model(**inputs)
    everyone = torch.full(inputs["timesteps"].shape, 2.0)
    torch.testing.assert_close(model(**inputs, phase=everyone), v, atol=1e-3, rtol=0)
    assert torch.equal(model(**inputs, phase=torch.zeros_like(everyone)), v)
    everyone[:, :tokens] = 0
    assert (model(**inputs, phase=everyone) - v).abs().max() > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_moving_video_and_reference_together_changes_nothing(model, inputs, tokens, seed):
    cells = torch.randint(1, 10, (3,), generator=torch.Generator().manual_seed(seed))
    shift = (cells * torch.tensor([8 / FPS, 32, 32])).view(1, 3, 1, 1)
    v = model(**inputs)
    torch.testing.assert_close(model(**(inputs | {"positions": inputs["positions"] + shift})), v, atol=1e-3, rtol=0)
    apart = inputs["positions"].clone()
    apart[:, :, tokens:] += shift
    assert (model(**(inputs | {"positions": apart})) - v)[:, :tokens].abs().max() > 1e-3


def test_every_token_is_modulated_by_its_own_timestep(model, inputs, tokens):
    v = model(**inputs)
    noisy = inputs["timesteps"].clone()
    noisy[:, tokens:] = inputs["sigma"][:, None]  # the reference says the video's noise level
    assert (model(**(inputs | {"timesteps": noisy})) - v)[:, :tokens].abs().max() > 1e-3
    one = inputs["timesteps"].clone()
    one[0, 3] = 0.9
    changed = (model(**(inputs | {"timesteps": one})) - v).abs().amax(dim=2)
    assert changed[0, 3] == changed[0].max() > 1e-3 and changed[1].max() < 1e-5


def test_the_text_is_modulated_by_sigma_and_not_by_the_tokens(model, inputs):
    v = model(**inputs)
    other = model(**(inputs | {"sigma": inputs["sigma"] / 2}))
    assert (other - v).abs().max() > 1e-3


def test_a_different_timestep_for_every_token(model, inputs):
    """AdaLN runs on the distinct timesteps only; another sample's may not disturb the look-up."""
    levels = torch.rand(2, inputs["latents"].shape[1], generator=torch.Generator().manual_seed(0))
    v = model(**(inputs | {"timesteps": levels}))
    half = levels.clone()
    half[1] = levels[0]
    torch.testing.assert_close(model(**(inputs | {"timesteps": half}))[0], v[0], atol=2e-5, rtol=0)


def test_masked_tokens_are_as_good_as_absent(model, golden, inputs, tokens):
    """A dropped reference leaves its slots in the batch; nothing in them may be looked at."""
    mask = torch.ones(inputs["timesteps"].shape, dtype=torch.bool)
    mask[0, tokens:] = False
    filled = inputs | {"latents": inputs["latents"].clone()}
    filled["latents"][0, tokens:] = 50 * randn(*golden["ref"].shape[1:])
    v = model(**filled, mask=mask)
    torch.testing.assert_close(v[0, :tokens], golden["velocity_text"][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(v[1], golden["velocity_text_ref"][1], atol=1e-4, rtol=0)


def test_recomputed_blocks_give_the_same_gradient(tiny_a, inputs):
    gradients = []
    for how in ("none", "products", 1, "all"):
        trained = LTXVideo.from_checkpoint(tiny_a)
        set_recompute(trained, how)
        trained(**inputs).square().mean().backward()
        gradients.append([p.grad for p in trained.parameters()])
    for plain, *others in zip(*gradients):
        for recomputed in others:
            torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_gradient_reaches_every_parameter(tiny_a, inputs):
    trained = LTXVideo.from_checkpoint(tiny_a)
    trained(**inputs).square().mean().backward()
    without = [name for name, p in trained.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_constants_made_once_change_no_bit(tiny_a, inputs, monkeypatch):
    """Made at one noise level and used at others, also where every token has a timestep of its own."""
    model = LTXVideo.from_checkpoint(tiny_a).requires_grad_(False)
    own = torch.rand(inputs["timesteps"].shape, generator=torch.Generator().manual_seed(1))
    for dtype, timesteps in ((torch.float32, inputs["timesteps"]), (torch.bfloat16, inputs["timesteps"]), (None, own)):
        model.to(dtype or torch.float32)
        given = as_dtype(inputs, dtype or torch.float32) | {"timesteps": timesteps}
        given["phase"] = own
        constants = model.constants(timesteps, inputs["positions"], own, dtype or torch.float32)
        later = [given | {"sigma": s * given["sigma"], "timesteps": s * timesteps} for s in (1, 0.3)]
        want = [model(**one) for one in later]
        with monkeypatch.context() as patch:
            patch.setattr("model.rope_cos_sin", None)
            got = [model(**one, constants=constants) for one in later]
        assert all(torch.equal(a, b) for a, b in zip(got, want)) and not torch.equal(*want)


def test_one_graph_for_each_shape_of_a_stream(tiny_a, inputs, tokens):
    """The counting backend runs what it is given as it is; all blocks and all steps share its graphs."""
    model, counter = LTXVideo.from_checkpoint(tiny_a).requires_grad_(False), CompileCounter()
    torch._dynamo.reset()
    model.compile_blocks(counter)
    plain = LTXVideo.from_checkpoint(tiny_a).requires_grad_(False)
    text_only = {key: inputs[key][:, :tokens] for key in ("latents", "timesteps")}
    text_only = inputs | text_only | {"positions": inputs["positions"][:, :, :tokens]}
    for step in (1.0, 0.7, 0.2):
        for graphs, stream in ((1, text_only), (2, inputs)):
            now = stream | {"timesteps": step * stream["timesteps"], "sigma": step * stream["sigma"]}
            assert torch.equal(model(**now), plain(**now))
            assert counter.frame_count == (graphs if step == 1 else 2)


def test_compiled_under_ddp_a_block_is_one_graph(tiny_a, inputs):
    """Also where a bucket of gradients is smaller than a block, which would cut it in pieces by PyTorch's default."""
    from torch.nn.parallel import DistributedDataParallel

    torch._dynamo.reset()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, counter = LTXVideo.from_checkpoint(tiny_a), CompileCounter()
        model.compile_blocks(counter)
        plain = LTXVideo.from_checkpoint(tiny_a)
        block = sum(p.nbytes for p in model.transformer_blocks[0].parameters())
        wrapped = DistributedDataParallel(model, bucket_cap_mb=block / 4 / 2**20)
        for each in (wrapped, plain):
            each(**inputs).square().mean().backward()
    finally:
        dist.destroy_process_group()
    assert counter.frame_count == 1
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_first_weights_begin_as_the_identity(tiny_a):
    """Nothing flows through a block yet, so the output does not depend on the text, and the velocity is 0."""
    model = LTXVideo.from_checkpoint(tiny_a)
    heads = model.heads
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(first_weight(name, parameter.shape, 0))
    x, context = torch.randn(1, 5, model.dim), torch.randn(1, 7, model.dim)
    table = torch.zeros(1, heads, 5, model.dim // heads // 2)
    modulation, _ = model.adaln_single(torch.tensor([0.3]), torch.float32)
    prompt, _ = model.prompt_adaln_single(torch.tensor([0.3]), torch.float32)
    row = torch.zeros(1, 5, dtype=torch.long)
    with torch.no_grad():
        for block in model.transformer_blocks:
            assert torch.equal(block(x, context, modulation, prompt, row, (table + 1, table), None), x)
        assert not model.proj_out(x).any()


def test_first_weights_have_glorots_spread_and_no_order():
    name, shape = "transformer_blocks.{}.ff.net.0.proj.weight", torch.Size([400, 100])
    weight = first_weight(name.format(0), shape, seed=0)
    assert abs(weight.std().item() / (2 / 500) ** 0.5 - 1) < 0.02
    assert torch.equal(weight, first_weight(name.format(0), shape, seed=0))
    assert not torch.equal(weight, first_weight(name.format(1), shape, seed=0))
    assert not torch.equal(weight, first_weight(name.format(0), shape, seed=1))

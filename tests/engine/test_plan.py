"""plan.py against what PyTorch itself counts on the tiny model, and against the paper's run worked out by hand."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from conftest import LiveBytes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import Checkpoint
from common.errors import UserError
from config import read_config
from engine.parallel import set_recompute
from engine.plan import CARDS, GIB, Plan, connector_flops, dit_flops, parameters, plan_of, vae_flops
from model import LTXVideo
from text import TextConnector
from train import main, model_and_cache
from vae import VideoVAE

D = 128  # width of the tiny model
PAPER = (121, 480, 832)


@pytest.fixture(scope="module")
def tiny(small):
    return small


@pytest.fixture(scope="module")
def tiny_config(tiny):
    return Checkpoint(tiny).config


@pytest.fixture(scope="module")
def paper(root, released):
    return Plan(read_config(root / "configs" / "paper.toml"), released["config"], PAPER, 1024)


def changed(plan: Plan, **options) -> Plan:
    """The same plan with other options, "section__key" = value."""
    other = copy(plan)
    for name, value in options.items():
        section, key = name.split("__")
        changed = replace(getattr(other.config, section), **{key: value})
        other.config = replace(other.config, **{section: changed})
    return other


def counted(run: Callable) -> int:
    """Operations of a call. The counter knows attention as two matrix products, not as the CPU's fused kernel."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------
# operations


def adaln_flops(levels: int, samples: int) -> int:
    """What dit_flops leaves out: AdaLN runs on the distinct timesteps (9 rows) and once a sample for the text (2)."""
    embedder = 2 * 256 * D + 2 * D * D
    return levels * (embedder + 2 * 9 * D * D) + samples * (embedder + 2 * 2 * D * D)


@pytest.mark.parametrize(("video", "reference", "text"), [(20, 0, 10), (20, 6, 10), (45, 9, 64)])
def test_dit_flops(tiny, tiny_config, video, reference, text):
    model = LTXVideo.from_checkpoint(tiny)
    n = video + reference
    timesteps = torch.cat([torch.full((1, video), 0.5), torch.zeros(1, reference)], dim=1)
    inputs = (torch.randn(1, n, 16), timesteps, torch.tensor([0.5]), torch.randn(1, text, D), torch.rand(1, 3, n, 2))
    got = dit_flops(tiny_config["transformer"], video, reference, text)
    assert counted(lambda: model(*inputs)) == got + adaln_flops(2 if reference else 1, 1)


def test_what_dit_flops_leaves_out_is_nothing_at_scale(released):
    """AdaLN does not grow with the tokens: 0.7 GFLOP beside more than a hundred TFLOP."""
    config = released["config"]["transformer"]
    left_out = adaln_flops(2, 1) * (4096 / D) ** 2
    assert left_out < 1e-5 * dit_flops(config, 6240, 390, 1024)


def test_the_backward_pass_costs_twice_the_forward(tiny):
    """The 3 in flops_per_sample; only the gradient of the latents themselves is not needed."""
    model = LTXVideo.from_checkpoint(tiny)
    inputs = (torch.randn(1, 60, 16), torch.full((1, 60), 0.5), torch.tensor([0.5]), torch.randn(1, 9, D))
    positions = torch.rand(1, 3, 60, 2)
    forward = counted(lambda: model(*inputs, positions))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs, positions).sum().backward()
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=0.01)


@pytest.mark.parametrize("slots", [12, 64])
def test_connector_flops(tiny, tiny_config, slots):
    connector = TextConnector.from_checkpoint(tiny).connector
    got = counted(lambda: connector(torch.randn(1, slots, D), torch.ones(1, slots, dtype=torch.bool)))
    assert got == connector_flops(tiny_config["transformer"], slots)


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 64, 64), (4, 64, 32)])
def test_vae_flops(tiny, tiny_config, frames, height, width):
    vae = VideoVAE.from_checkpoint(tiny)
    encode = counted(lambda: vae.encode(torch.zeros(1, 3, 1, height, width)))
    decode = counted(lambda: vae.decode(torch.zeros(1, 16, frames, height // 8, width // 8)))
    assert (encode, decode) == vae_flops(tiny_config["vae"], frames, height, width)


def test_a_frozen_decoder_costs_two_forwards(tiny):
    """The 2 in flops_per_sample: forward, and the gradient of its input alone."""
    decoder = VideoVAE.from_checkpoint(tiny).requires_grad_(False).decoder
    z = torch.randn(1, 16, 4, 4, 4)
    forward = counted(lambda: decoder(z))
    with FlopCounterMode(display=False) as counter:
        x = decoder.conv_in(z.requires_grad_())
        for block in decoder.up_blocks:  # without recomputation, which is not useful work
            x = block(x)
        decoder.conv_out(x).sum().backward()
    assert counter.get_total_flops() == pytest.approx(2 * forward, rel=0.001)


def test_operations_of_a_sample_of_the_paper_s_run(paper, released):
    """Every part once more, added up by hand: D 4096, 48 blocks, 6,240 + 390 tokens, 1,024 text tokens."""

    def dit(n: int, s: int = 1024, d: int = 4096) -> float:
        attention = 8 * n * d**2 + 4 * n**2 * d
        text = 4 * n * d**2 + 4 * s * d**2 + 4 * n * s * d
        return 48 * (attention + text + 16 * n * d**2 + 4 * n * d * 32) + 2 * n * d * 256

    connector = 8 * (24 * 1024 * 4096**2 + 4 * 1024**2 * 4096 + 2 * 1024 * 4096 * 32)
    encode, decode = vae_flops(released["config"]["vae"], 4, 480, 832)
    want = 3 * (0.8 * dit(6630) + 0.2 * dit(6240)) + connector + 0.8 * encode + 2 * decode * paper.decoded_share()
    assert paper.flops_per_sample() == pytest.approx(want, rel=1e-9)
    assert 3 * dit(6630) == pytest.approx(6 * 13.12e9 * 6630, rel=0.2)  # the rule of thumb, 6 N D
    text_only = changed(paper, faces__pack="", dropout__reference=1.0)
    assert text_only.flops_per_sample() == pytest.approx(3 * dit(6240) + connector, rel=1e-9)


def test_without_reference_there_are_no_reference_tokens(root, released):
    config = read_config(root / "configs" / "ablation-0-base.toml")
    plan = Plan(config, released["config"], PAPER, 1024)
    assert (plan.grid, plan.tokens, plan.reference_tokens) == ((16, 15, 26), 6240, 0)
    transformer = released["config"]["transformer"]
    want = 3 * dit_flops(transformer, 6240, 0, 1024) + connector_flops(transformer, 1024)
    assert plan.flops_per_sample() == pytest.approx(want, rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# parameters and memory


def test_parameters_of_the_released_model(paper, released):
    sizes = released["needed"]

    def of_file(prefix: str) -> int:
        return sum(math.prod(shape) for name, shape in sizes.items() if name.startswith(prefix))

    connector = of_file("model.diffusion_model.video_embeddings_connector.")
    assert parameters(paper.connector) == connector == pytest.approx(1.61e9, rel=0.005)
    assert parameters(paper.dit) == of_file("model.diffusion_model.") - connector == pytest.approx(13.12e9, rel=0.001)
    assert parameters(paper.vae.encoder) == of_file("vae.encoder.") == pytest.approx(0.32e9, rel=0.02)
    assert parameters(paper.vae.decoder) == of_file("vae.decoder.") == pytest.approx(0.41e9, rel=0.02)
    assert all(parameter.is_meta for parameter in (*paper.dit.parameters(), *paper.vae.parameters()))


def test_memory_of_the_paper_s_run_under_fsdp(paper):
    """By hand: 16 bytes a parameter shared by the GPUs, the rest on each."""
    parts, weights = paper.memory(8), 13.12e9
    assert paper.config.parallel.mode == "fsdp"
    states = [parts.pop(f"{name}, fp32") for name in ("DiT weights", "gradients", "AdamW moments")]
    assert states == pytest.approx([4 * weights / 8, 4 * weights / 8, 8 * weights / 8], rel=0.001)
    block = 28 * 4096**2 / 2 + 4 * 4096**2 / 2  # 28 n D^2 + 4 s D^2 operations are two for each weight
    ends = weights - 48 * block
    assert parts.pop("gathered weights and gradients") == pytest.approx(2 * (ends + 2 * block) + 6 * block, rel=0.01)
    rows = 48 * 6630 + 40 * 6630 + 5 * 1024
    assert parts.pop("activations, blocks recomputed") == pytest.approx(2 * 4096 * rows)
    assert parts.pop("gradients in flight, rotary tables") == 2 * 4096 * 8 * 6630
    assert parts.pop("frozen: connector, VAE") == pytest.approx(2 * (1.61e9 + 0.32e9 + 0.41e9), rel=0.005)
    assert parts.pop("frozen: ArcFace, fp32") == 4 * 65e6
    assert parts.pop("decoder under the identity losses") == 2 * paper.decoder_activations()
    assert parts == {}


def test_what_is_shared_shrinks_with_the_gpus_and_the_rest_stays(paper):
    for plan, more, fewer, factor in (
        (paper, 32, 8, 4),
        (paper, 8, 1, 8),
        (paper, 16, 2, 8),
        (changed(paper, parallel__replicas=2), 16, 8, 2),
    ):
        many, few = plan.memory(more), plan.memory(fewer)
        for name, size in few.items():
            shared = name in ("DiT weights, fp32", "gradients, fp32", "AdamW moments, fp32")
            assert many[name] == pytest.approx(size / factor if shared else size), name
    assert changed(paper, parallel__replicas=2).memory(16) == paper.memory(8)


def test_ddp_holds_everything_on_every_gpu(paper):
    ddp = changed(paper, parallel__mode="ddp")
    parts = ddp.memory(8)
    assert parts == ddp.memory(1)
    assert parts["DiT weights, fp32"] + parts["gradients, fp32"] + parts["AdamW moments, fp32"] == pytest.approx(
        16 * 13.12e9, rel=0.001
    )
    assert parts["bf16 copies of weights"] == pytest.approx(2 * 13.12e9, rel=0.001)
    assert "gathered weights and gradients" not in parts
    assert "bf16 copies of weights" not in changed(ddp, parallel__precision="fp32").memory(8)


def test_switches_that_cost_or_save_memory(paper):
    plain = paper.memory(8)
    without = changed(paper, faces__pack="").memory(8)
    assert set(plain) - set(without) == {"frozen: ArcFace, fp32", "decoder under the identity losses"}
    two = changed(paper, parallel__micro_batch=2).memory(8)
    assert two["activations, blocks recomputed"] == 2 * plain["activations, blocks recomputed"]
    decoder = "decoder under the identity losses"
    assert plain[decoder] < two[decoder] < 2 * plain[decoder]  # a window each, but one block of one at a time
    kept = changed(paper, parallel__recompute="none").memory(8)
    assert kept["activations, all kept"] == 48 * 2 * 4096 * (40 * 6630 + 5 * 1024)
    single = changed(paper, parallel__precision="fp32").memory(8)
    assert single["activations, blocks recomputed"] == 2 * plain["activations, blocks recomputed"]
    assert single["DiT weights, fp32"] == plain["DiT weights, fp32"]


@pytest.mark.parametrize(("gpus", "replicas"), [(3, 2), (4, 8), (0, 1)])
def test_gpus_that_cannot_be_shared_out_are_an_error(paper, gpus, replicas):
    with pytest.raises(UserError, match=rf"replicas = {replicas} does not divide {gpus} GPUs"):
        changed(paper, parallel__replicas=replicas).report(gpus, 0.4)


def kept_for_backward(run: Callable, constants: list[torch.Tensor]) -> tuple[int, int]:
    """What autograd keeps of a call, every storage once and without `constants`: numbers, bytes."""
    known = {tensor.untyped_storage().data_ptr() for tensor in constants}
    storages: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = (storage, tensor.element_size())  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(s.nbytes() // size for s, size in storages.values()), sum(s.nbytes() for s, _ in storages.values())


def bytes_of_a_block(n: int, s: int, autocast: bool, mask: bool = False, dim: int = 256, heads: int = 4) -> float:
    config = {"num_attention_heads": heads, "attention_head_dim": dim // heads, "num_layers": 1}
    config |= {"positional_embedding_theta": 1e4, "positional_embedding_max_pos": [20, 2048, 2048]}
    model = LTXVideo(config | {"in_channels": 4, "out_channels": 4})
    block = model.transformer_blocks[0]
    x, context = torch.randn(1, n, dim, requires_grad=True), torch.randn(1, s, dim)
    modulation, prompt = torch.randn(2, 9, dim, requires_grad=True), torch.randn(1, 2, dim, requires_grad=True)
    token_row = torch.arange(n)[None] % 2
    rotary = model.constants(token_row.float(), torch.rand(1, 3, n, 2)).rotary
    seen = torch.ones(1, n, dtype=torch.bool) if mask else None
    shared = [*model.parameters(), context, modulation, prompt, token_row, *rotary]  # by all blocks
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        inputs = (x, context, modulation, prompt, token_row, rotary, seen)
        _, size = kept_for_backward(lambda: block.run(*inputs), shared)
    return size


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # rms_norm of bf16 with a float32 weight
def test_what_autograd_keeps_of_a_block(autocast, mask, tiny_config):
    """The formula in Plan.memory, growing with n and with s, against a block of width 256 in float32."""
    base = bytes_of_a_block(128, 32, autocast, mask)
    per_n = (bytes_of_a_block(256, 32, autocast, mask) - base) / 128 / 256
    per_s = (bytes_of_a_block(128, 96, autocast, mask) - base) / 64 / 256
    assert (per_n / 2, per_s / 2) == pytest.approx((62, 8) if autocast else (80, 10), rel=0.02)

    precision = "bf16" if autocast else "fp32"
    changes = [f"parallel.precision={precision}", "parallel.recompute=none", "parallel.micro_batch=3"]
    config = read_config(None, changes)
    plan = Plan(config, tiny_config, (17, 64, 64), 64)
    n, s = plan.tokens + plan.reference_tokens, 64
    assert plan.activations("none") == pytest.approx(4 * 3 * D * (per_n * n + per_s * s), rel=0.02)


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_what_autograd_keeps_of_the_tiny_model(tiny, tiny_config, recompute):
    """All four blocks and the two ends, batch 2."""
    model = LTXVideo.from_checkpoint(tiny)
    set_recompute(model, recompute)
    changes = ["parallel.precision=fp32", f"parallel.recompute={recompute}", "parallel.micro_batch=2"]
    config = read_config(None, changes)
    plan = Plan(config, tiny_config, (17, 64, 64), 64)
    n = plan.tokens + plan.reference_tokens
    inputs = (torch.randn(2, n, 16), torch.full((2, n), 0.5), torch.full((2,), 0.5), torch.randn(2, 64, D))
    inputs = (*inputs, torch.rand(2, 3, n, 2))
    _, kept = kept_for_backward(lambda: model(*inputs), list(model.parameters()))
    ends = 4 * 2 * n * (4 * D + 2 * 16)  # the last LayerNorm and modulation, latents, velocity
    one_block = 4 * 2 * D * (40 * n + 5 * 64) if recompute == "all" else 0  # in the backward pass
    assert kept + one_block == pytest.approx(plan.activations(recompute) + ends, rel=0.05)


@pytest.mark.parametrize("recompute", ["none", "products", 2, "all"])
@pytest.mark.parametrize("frames, side, batch", [(5, 64, 1), (9, 96, 2), (17, 96, 1)])
def test_the_plan_s_sum_is_the_peak_of_a_step(frames, side, batch, recompute, tiny, tiny_config):
    """Every tensor alive, counted over two steps as train.py makes them, gradients kept as DDP keeps them.

    In float32: the CPU has no fused RMS norm for bf16 and keeps more of a block than a GPU does.
    """
    changes = ["parallel.precision=fp32", f"parallel.recompute={recompute}", "faces.pack="]
    config = read_config(None, [*changes, f"parallel.micro_batch={batch}"])
    plan = Plan(config, tiny_config, (frames, side, side), 64)
    n = plan.tokens + plan.reference_tokens
    model = LTXVideo.from_checkpoint(tiny).train()
    set_recompute(model, recompute)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = (torch.randn(batch, n, 16), torch.full((batch, n), 0.5), torch.full((batch,), 0.5))
    inputs = (*inputs, torch.randn(batch, 64, D), torch.rand(batch, 3, n, 2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes([(p, p.grad) for p in model.parameters()], inputs) as live:
        for _ in range(2):
            model(*inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    planned = plan.memory(1)
    del planned["frozen: connector, VAE"]  # not in this test
    assert live.peak == pytest.approx(sum(planned.values()), rel=0.1)


def test_what_autograd_keeps_of_the_decoder(released):
    """decoder_activations against a narrow decoder of the released shape: between blocks, and the largest block."""
    ltx = deepcopy(released["config"])
    ltx["vae"] |= {"decoder_base_channels": 16, "encoder_base_channels": 8, "latent_channels": 8}
    plan = Plan(read_config(None), ltx, (33, 64, 96), 64)
    torch.manual_seed(0)
    vae = VideoVAE(ltx["vae"]).requires_grad_(False)
    constants = [*vae.parameters(), *vae.buffers()]
    z = torch.randn(1, 8, plan.config.faces.window + 2, 2, 3, requires_grad=True)
    between, _ = kept_for_backward(lambda: vae.decode(z), constants)
    x, largest = vae.decoder.conv_in(z), 0
    for block in vae.decoder.up_blocks:
        inside, _ = kept_for_backward(lambda block=block, x=x: block(x), constants)
        largest = max(largest, inside)
        x = block(x).detach().requires_grad_()
    for batch, together in ((1, 1), (3, 3), (30, 21)):  # 21 windows of 4 latent frames have four million pixels
        got = changed(plan, parallel__micro_batch=batch).decoder_activations()
        assert got == pytest.approx(batch * between + together * largest, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# how many samples are looked at, and the report


def share_below(limit: float, tokens: int) -> float:
    """P(t <= limit) of losses.shifted_logit_normal, by its distribution function."""
    normal, mu = NormalDist(), 0.95 + (tokens - 1024) * 1.1 / 3072
    low, high = (1 / (1 + math.exp(-mu - normal.inv_cdf(p))) for p in (0.005, 0.999))
    u = low + limit * (high - low)
    return 0.9 * normal.cdf(math.log(u / (1 - u)) - mu) + 0.1 * (limit - 1e-3) / (1 - 1e-3)


@pytest.mark.parametrize(("tokens", "least", "gamma"), [(6240, 1e-3, 1.0), (320, 1e-3, 1.0), (1024, 0.5, 2.0)])
def test_share_of_decoded_samples(paper, tokens, least, gamma):
    """Eq. 12 solved for t: SNR/(SNR+1) = w^(1/gamma) at t = 1 / (1 + sqrt(SNR))."""
    plan = changed(paper, faces__min_weight=least, faces__gamma=gamma)
    plan.tokens = tokens
    w = least ** (1 / gamma)
    limit = 1 / (1 + math.sqrt(w / (1 - w)))
    assert plan.decoded_share() == pytest.approx(share_below(limit, tokens), abs=0.005)  # of 100,000 draws
    assert changed(plan, faces__pack="").decoded_share() == 0


def test_report_is_markdown(paper):
    text = paper.report(8, 0.4)
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for head, rule, *rows in tables:
        columns = head.count("|")
        assert set(rule) <= set("|-:") and rows and all(row.count("|") == columns for row in (rule, *rows))
    assert "6,240 video and 390 reference tokens" in text and "13.12 B" in text and "fsdp, 8 GPUs" in text
    parts = paper.memory(8)
    assert f"| **{sum(parts.values()) / GIB:.1f}** |" in text
    assert all(f"| {name} | {size / GIB:.1f} |" in text for name, size in parts.items())
    assert all(f"| 8 x {card} |" in text for card in CARDS) and "H20-96" in CARDS
    assert "4 replicas" in changed(paper, parallel__replicas=4).report(8, 0.4)


def test_the_whole_model_fits_one_card_of_141_gb_in_bf16(paper):
    """By hand: 8 bytes for each of 13.12 B parameters, beside activations and frozen parts; 16 bytes fit nowhere."""
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in paper.report(1, 0.4).splitlines()[-4:]}
    for way, least, most, cards in (
        ("ddp, adamw", 16, 20, {"none"}),
        ("ddp, adamw-bf16", 8, 9.5, {"H20-141", "H200-141"}),
        ("fsdp, adamw-bf16", 8, 9.5, {"H20-141", "H200-141"}),
    ):
        size, holds = rows[way]
        assert least * 13.12e9 < float(size.split()[0]) * GIB < most * 13.12e9
        assert {card.strip() for card in holds.split(",")} == cards
    parts = changed(paper, optim__kind="adamw-bf16", parallel__mode="ddp").memory(1)
    states = [parts.pop(f"{name}, bf16") for name in ("DiT weights", "gradients", "AdamW moments")]
    assert states == pytest.approx([2 * 13.12e9, 2 * 13.12e9, 4 * 13.12e9], rel=0.001)
    same = paper.memory(1)
    assert set(parts) <= set(same) and all(parts[name] == same[name] for name in parts)


def test_bytes_on_disk(paper):
    """By hand: three float32 numbers a parameter, three newest checkpoints, the best, one in the making."""
    (line,) = (line for line in paper.report(8, 0.4, 46e9).splitlines() if line.startswith("on disk"))
    one = 12 * 13.12e9 / GIB
    clip = 2 * 128 * 6240 + 2 * 256 * 4096 + 2**18  # latents, text features, photo
    number = r"(\S+) GiB"
    words = f"about {number} per 1,000 clips; 5 checkpoints of {number}, {number} in all; export {number}"
    got = [float(x) for x in re.search(words, line).groups()]
    assert got == pytest.approx([1000 * clip / GIB, one, 5 * one, 46e9 / GIB], rel=0.001)
    few = changed(paper, data__holdout=0, log__keep=1, optim__ema=0.9, parallel__mode="ddp").disk(46e9)
    assert f"2 checkpoints of {16 * parameters(paper.dit) / GIB:.4g} GiB" in few
    adapters = Plan(read_config(None, ["lora.rank=64", "log.keep=3"]), paper.ltx, PAPER, 1024)
    assert f"4 checkpoints of {12 * adapters.trained / GIB:.4g} GiB" in adapters.disk(46e9)
    assert f"export {2 * adapters.trained / 2**20:.4g} MiB" in adapters.disk(46e9)


def test_operations_of_the_held_out_clips(paper):
    """200 clips at eight levels, with and without reference, 21 times, beside 640,000 samples."""
    ltx, decode = paper.ltx["transformer"], vae_flops(paper.ltx["vae"], 4, 480, 832)[1]
    looks = 21 * 200 * 8 * (dit_flops(ltx, 6240, 390, 1024) + dit_flops(ltx, 6240, 0, 1024) + decode)
    share = looks / (640_000 * (useful := paper.flops_per_sample()))
    assert paper.held_out_share(useful) == pytest.approx(share) and 0.01 < share < 0.05
    assert f"the held-out clips add {share:.1%}" in paper.report(8, 0.4)
    assert "held-out" not in changed(paper, data__holdout=0).report(8, 0.4)


def test_the_plan_of_a_run_whose_cache_is_not_there(root, tmp_path):
    """The tiny model's own size and units, not 832x480 and billions."""
    ckpt = root / "assets" / "tiny.safetensors"
    defaults, tiny = (
        Checkpoint(ckpt).ours["defaults"],
        read_config(root / "configs" / "tiny.toml", ["data.cache=none", "parallel.micro_batch=4"]),
    )
    limit = json.loads((root / "assets" / "gemma" / "tokenizer_config.json").read_text())["model_max_length"]
    ltx, settings = model_and_cache(tiny, ckpt)
    assert {key: settings[key] for key in defaults} == defaults and settings["max_tokens"] == limit
    plan = plan_of(tiny, ltx, settings)
    text = plan.report(1, 0.4, ckpt.stat().st_size)
    assert text.startswith(f"{defaults['width']}x{defaults['height']}, ")
    assert f"DiT {parameters(plan.dit) / 1e6:.2f} M parameters" in text and "| per GPU | MiB |" in text
    total = sum(plan.memory(1).values())
    assert total < GIB and f"**{total / 2**20:.1f}**" in text and "FLOP a sample" in text and " 0.0" not in text
    _, released = model_and_cache(read_config(root / "configs" / "paper.toml"), tmp_path / "missing")
    assert (released["width"], released["frames"], released["max_tokens"]) == (832, 121, 1024)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--gpus", "0", "argument --gpus: 0 is not from 1 to 1,000,000"),
        ("--gpus", "1" + 400 * "0", "argument --gpus: 1000"),
        ("--mfu", "1.5", "--mfu 1.5 is not between 0 and 1"),
    ],
)
def test_a_number_that_no_plan_has_is_one_line(option, value, says, in_process):
    code, _, error = in_process(main, "train.py", "--plan", option, value)
    assert code == 2 and error.startswith(f"error: {says}") and error.count("\n") == 1


def cell(plan: Plan, card: str, column: int, gpus: int = 8, mfu: float = 0.4) -> str:
    (row,) = (line for line in plan.report(gpus, mfu).splitlines() if f"x {card} " in line)
    return row.split("|")[column].strip()


def test_days(paper):
    seconds = 20_000 * 32 * paper.flops_per_sample() / (8 * 148e12 * 0.4)
    everything = changed(paper, parallel__recompute="all")
    assert cell(everything, "H20-96", 3) == f"{seconds / 86400:.1f} days"
    assert float(cell(everything, "H20-96", 3, gpus=32).split()[0]) == pytest.approx(seconds / 86400 / 4, abs=0.06)
    assert float(cell(everything, "H20-96", 3, mfu=0.2).split()[0]) == pytest.approx(seconds / 86400 * 2, abs=0.06)


def test_less_recomputed_is_less_time(paper):
    """By hand: 3 forward passes are useful; a fourth, a tenth of one, none, or of 12 in 48 blocks each runs again."""
    useful, forward = paper.flops_per_sample(), 0.8 * 192.9e12 + 0.2 * 179.8e12  # docs/performance.md
    for how, again in (("all", 1), ("products", 0.1), ("none", 0), (12, 0.25 + 0.75 * 0.1), (100, 1)):
        want = 0.4 * (useful + forward) / (useful + again * forward)
        assert paper.mfu(0.4, how) == pytest.approx(want, rel=1e-3)
        days = 20_000 * 32 * useful / (8 * 148e12 * want) / 86400
        shown = cell(changed(paper, parallel__recompute=how), "H20-96", 3)
        assert float(shown.split()[0]) == pytest.approx(days, abs=0.06)


def test_auto_computes_least_again_of_what_fits(paper):
    """Each way needs more room than the next; with a byte less than it needs, auto takes the next."""
    ways = ["none", "products", *range(1, 48), "all"]
    kept = [paper.activations(how) for how in ways]
    assert kept == sorted(kept, reverse=True) and paper.memory(8) == paper.memory(8, "all")
    for k in (0, 1, 2, 30):
        needed = sum(paper.memory(8, ways[k]).values())
        assert paper.recompute(8, needed + 1) == ways[k] and paper.recompute(8, needed - 1) == ways[k + 1]
    assert paper.recompute(8, 0) == "all"
    assert changed(paper, parallel__recompute=5).recompute(8, 0) == 5  # by hand
    # On each card of the report, by its own memory.
    for card in ("H20-96", "H20-141", "H100-80", "H200-141"):
        how = paper.recompute(8, 0.9 * CARDS[card][1] * 1e9)
        assert cell(paper, card, 4) == str(how)
        assert cell(paper, card, 2) == f"{sum(paper.memory(8, how).values()) / GIB:.0f} GiB"


@pytest.mark.slow
def test_what_fits(paper):
    """The paper's run on 8 H20 needs shards; whole on every card it fits none."""
    assert cell(paper, "H20-96", 2).endswith(" GiB") and "needs" not in cell(paper, "H20-96", 2)
    ddp = changed(paper, parallel__mode="ddp")
    for card in CARDS:
        assert cell(ddp, card, 2).startswith("needs ") and cell(ddp, card, 2).endswith(" GiB")
    for size, verdict in ((70 * GIB, "70 GiB"), (97 * GIB, "needs 97 GiB")):
        plan = changed(paper, parallel__recompute="all")
        plan.memory = lambda gpus, how="", size=size: {"all": size}
        assert cell(plan, "H20-96", 2) == verdict


def test_plan_needs_neither_checkpoint_nor_data_nor_memory(root, tmp_path):
    """`--plan` in a bare folder: seconds, and no more memory than PyTorch itself, for a model of 13 B parameters."""
    script = (
        "import resource, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print('KiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    words = [root / "train.py", root / "configs" / "paper.toml", "--plan", "--gpus", "8"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    report, _, memory = run.stdout.partition("KiB")
    assert "13.12 B parameters" in report and "| 8 x H20-96 | 73 GiB |" in report
    assert int(memory) < 4 * 2**20  # the weights alone are 52 GB; PyTorch with CUDA takes 1.7 GB by itself
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_buckets(tiny_config):
    """Memory of the largest bucket that has clips; operations of the mean clip."""
    config, sizes = read_config(None), [(17, 64, 64), (9, 64, 64), (9, 48, 88), (33, 64, 64)]
    buckets = [dict(zip(("frames", "height", "width"), size)) for size in sizes]
    settings = buckets[0] | {"buckets": buckets, "clips": {1: 30, 0: 10, 2: 20}, "max_tokens": 64}
    plan, alone = plan_of(config, tiny_config, settings), [Plan(config, tiny_config, size, 64) for size in sizes[:3]]
    assert plan.grid == (5, 8, 8) and plan.memory(8) == alone[0].memory(8)
    mean = sum(one.flops_per_sample() * clips / 60 for one, clips in zip(alone, (10, 30, 20)))
    assert plan.mean_flops() == pytest.approx(mean) and mean < 0.8 * plan.flops_per_sample()
    assert "largest of 3 buckets" in plan.report(8, 0.4)
    one_size = plan_of(config, tiny_config, buckets[0] | {"max_tokens": 64})
    assert one_size.mean_flops() == alone[0].flops_per_sample()
    assert "bucket" not in one_size.report(8, 0.4)

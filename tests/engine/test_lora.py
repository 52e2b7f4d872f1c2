"""lora.py against peft on the same tiny model, the released layout, files of every shape, and what merging promises."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_A, write_sparse
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import OUR_METADATA, Checkpoint, distilled_sign
from common.errors import UserError, one_line_errors
from config import read_config
from engine import lora
from engine.lora import LoRA, LoRALinear, attach_lora, merge_lora, new_lora, save_lora
from engine.plan import Plan, dit_flops, weight_flops
from guidance import sample_latents
from model import LTXVideo
from objective import Objective

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
# of a released file: six attentions and two feed-forwards a block
VIDEO = [f"{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0")]
VIDEO += ["ff.net.0.proj", "ff.net.2"]
SOUND = ("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
AUDIO = [f"{a}.{p}" for a in SOUND for p in ("to_q", "to_k", "to_v", "to_out.0")]
AUDIO += ["audio_ff.net.0.proj", "audio_ff.net.2"]


@pytest.fixture(scope="module")
def inputs(golden):
    """Video and clean reference, from the golden vectors."""
    tokens, reference = golden["latent"].shape[1], golden["ref"].shape[1]
    sigma = golden["sigma"]
    return {
        "latents": torch.cat([golden["latent"], golden["ref"]], dim=1),
        "timesteps": torch.cat([sigma[:, None].expand(-1, tokens), torch.zeros(2, reference)], dim=1),
        "sigma": sigma,
        "context": golden["context"],
        "positions": torch.cat([golden["video_positions"], golden["tass_positions"]], dim=2),
    }


def tiny(dtype=torch.float32):
    return LTXVideo.from_checkpoint(TINY_A, dtype=dtype)


def peft_model(adapters, targets=TARGETS):
    """peft's adapters {name: (rank, alpha)} with random A and B on the tiny model, all of them active."""
    torch.manual_seed(0)
    model = tiny()
    for name, (rank, alpha) in adapters.items():
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        model = inject_adapter_in_model(config, model, adapter_name=name)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(list(adapters))
    return model


def write_lora(path, tensors, prefix="diffusion_model.", halves=("lora_A", "lora_B"), alpha=None):
    """peft's tensors as another trainer would name them."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("lora_A", halves[0]).replace("lora_B", halves[1])
        renamed[prefix + name] = tensor.contiguous()
        if alpha is not None:
            renamed[prefix + name.split(".lora_")[0] + ".alpha"] = torch.tensor(float(alpha))
    save_file(renamed, path)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# equal to peft


@pytest.mark.parametrize(
    ("adapters", "prefix", "halves", "alpha_given"),
    [
        ({"a": (4, 4)}, "diffusion_model.", ("lora_A", "lora_B"), False),
        ({"a": (4, 12)}, "transformer.", ("lora_down", "lora_up"), True),
        ({"a": (4, 4), "b": (3, 3)}, "", ("lora_A", "lora_B"), False),
        ({"a": (2, 7), "b": (5, 1)}, "model.diffusion_model.", ("lora_down", "lora_up"), True),
    ],
    ids=["one", "one-alpha", "two", "two-alpha"],
)
@torch.no_grad()
def test_unmerged_and_merged_equal_peft(adapters, prefix, halves, alpha_given, inputs, model, tmp_path):
    theirs = peft_model(adapters)
    files = []
    for name, (_, alpha) in adapters.items():
        tensors = get_peft_model_state_dict(theirs, adapter_name=name)
        assert len(tensors) == 2 * len(lora.find_targets(model, TARGETS))
        path = tmp_path / f"{name}.safetensors"
        files.append(write_lora(path, tensors, prefix, halves, alpha if alpha_given else None))
    want = theirs(**inputs)
    assert (want - model(**inputs)).abs().max() > 0.05  # the adapters do something

    loras = [LoRA(file, model) for file in files]
    got = attach_lora(tiny(), loras)(**inputs)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)

    for module in filter(lambda module: isinstance(module, LoraLayer), theirs.modules()):
        module.merge()
    got = merge_lora(tiny(), loras)(**inputs)
    torch.testing.assert_close(got, theirs(**inputs), atol=1e-4, rtol=0)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_gradients_equal_pefts(inputs, model, tmp_path):
    theirs = peft_model({"a": (4, 4)})
    path = write_lora(tmp_path / "a.safetensors", get_peft_model_state_dict(theirs, adapter_name="a"))
    ours = attach_lora(tiny().requires_grad_(False), [LoRA(path, model)])
    for one in (ours, theirs):
        one(**inputs).square().mean().backward()
    want = {name: p.grad for name, p in theirs.named_parameters() if ".lora_" in name}
    got = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert len(got) == len(want) == 2 * len(lora.find_targets(model, TARGETS))
    for name, gradient in got.items():
        layer, part = name.split(".adapters.0.")
        torch.testing.assert_close(gradient, want[f"{layer}.{part}.a.weight"], atol=1e-6, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in got.values()) > 1e-4


@torch.no_grad()
def test_strength_scales_the_change(inputs, model, tmp_path):
    """The last layer is linear in its weight, so twice the strength is twice the change of the output."""
    theirs = peft_model({"a": (4, 4)}, targets=["proj_out"])
    path = write_lora(tmp_path / "a.safetensors", get_peft_model_state_dict(theirs, adapter_name="a"))
    base, full = model(**inputs), theirs(**inputs)
    for strength in (2.0, 0.25, -1.0):
        for change in (attach_lora, merge_lora):
            got = change(tiny(), [LoRA(path, model, strength)])(**inputs)
            torch.testing.assert_close(got, base + strength * (full - base), atol=1e-5, rtol=1e-5)


def test_what_we_save_peft_loads_and_gives_back_to_the_byte(inputs, model, tmp_path):
    ours = new_lora(tiny(), rank=4, alpha=8.0, targets=TARGETS, seed=3)
    generator = torch.Generator().manual_seed(4)
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():  # numbers that bf16 holds, so that saving rounds nothing
            parameter.copy_((torch.randn(parameter.shape, generator=generator) / 10).bfloat16())
    path = tmp_path / "ours.safetensors"
    save_lora(path, trained, scale=2.0, ours={"placement": "tass"})

    theirs = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS), tiny())
    saved = load_file(path)
    assert all(name.startswith("diffusion_model.transformer_blocks.") for name in saved)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    result = set_peft_model_state_dict(theirs, {n.removeprefix("diffusion_model."): t for n, t in saved.items()})
    assert not result.unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs), ours.eval()(**inputs), atol=1e-5, rtol=0)
    back = {f"diffusion_model.{n}": t.bfloat16() for n, t in get_peft_model_state_dict(theirs).items()}
    assert back.keys() == saved.keys()
    for name, tensor in back.items():
        assert tensor.view(torch.uint8).numpy().tobytes() == saved[name].view(torch.uint8).numpy().tobytes(), name
    assert LoRA(path, model).ours == {"placement": "tass"}


# ----------------------------------------------------------------------------------------------------------------------
# the released layout


def test_a_file_for_both_branches_matches_every_video_layer_and_sets_audio_aside(released, tmp_path):
    """The key list of LTX-2 trainers: 48 blocks, rank 128. It takes no disk, and no weight is read."""
    weights = released["needed"] | released["ignored"]
    shapes = {}
    for block in range(48):
        for layer in (*VIDEO, *AUDIO):
            out, width = weights[f"model.diffusion_model.transformer_blocks.{block}.{layer}.weight"]
            name = f"diffusion_model.transformer_blocks.{block}.{layer}"
            shapes |= {f"{name}.lora_A.weight": [128, width], f"{name}.lora_B.weight": [out, 128]}
    path = write_sparse(tmp_path / "face.safetensors", shapes, {"format": "pt"})
    assert 2.4e9 < path.stat().st_size < 2.6e9  # the released LTX-Best-Face-ID is "about 2.5 GB"
    with torch.device("meta"):
        model = LTXVideo(released["config"]["transformer"])
    file = LoRA(path, model)
    assert file.pairs.keys() == {f"transformer_blocks.{block}.{layer}" for block in range(48) for layer in VIDEO}
    assert (len(file.pairs), file.audio, file.rank) == (480, 1728, 128)
    linear = {name for name in lora.linear_layers(model) if name.startswith("transformer_blocks.")}
    assert {name for name in linear if "to_gate_logits" not in name} == set(file.pairs)
    assert {scale for _, _, scale in file.pairs.values()} == {1.0}


# ----------------------------------------------------------------------------------------------------------------------
# what does not fit is said


def good_pair(model, layer="transformer_blocks.0.attn1.to_q", rank=2):
    out, width = model.get_submodule(layer).weight.shape
    return {f"{layer}.lora_A.weight": torch.ones(rank, width), f"{layer}.lora_B.weight": torch.ones(out, rank)}


Q = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"transformer_blocks.9.attn1.to_q.lora_A.weight": torch.ones(2, 128)},
            "transformer_blocks.9.attn1.to_q.lora_A",
        ),
        ({f"{Q}.hada_w1": torch.ones(2, 128)}, f"{Q}.hada_w1"),
        ({"lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight": torch.ones(2, 128)}, "lora_unet_transformer"),
        ({f"{Q}.lora_A.weight": torch.ones(3, 128)}, f"{Q}.lora_A.weight [3, 128]"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 64)}, f"{Q}.lora_A.weight [2, 64]"),
        ({f"{Q}.lora_B.weight": torch.ones(64, 2)}, f"{Q}.lora_B.weight [64, 2]"),
        ({f"{Q}.lora_B.weight": torch.ones(128, 2, 1)}, f"{Q}.lora_B.weight [128, 2, 1]"),
        ({f"{Q}.lora_A.weight": torch.ones(0, 128), f"{Q}.lora_B.weight": torch.ones(128, 0)}, "[0, 128]"),
        ({f"{Q}.lora_B.weight": None}, f"lora_B of {Q}, is not"),
        ({f"{Q}.lora_down.weight": torch.ones(2, 128)}, f"{Q}.lora_down.weight are for the same place"),
        ({f"{Q}.alpha": torch.ones(2)}, f"{Q}.alpha is not one number"),
        ({f"{Q}.alpha": torch.tensor(float("nan"))}, f"{Q}.alpha is not one number"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change, says, model, tmp_path):
    tensors = {name: tensor for name, tensor in (good_pair(model) | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as error:
        LoRA(tmp_path / "a.safetensors", model)
    assert says in str(error.value) and "a.safetensors" in str(error.value) and "\n" not in str(error.value)
    save_file(good_pair(model), tmp_path / "a.safetensors")
    assert LoRA(tmp_path / "a.safetensors", model).rank == 2  # without the change it is fine


def test_files_that_are_none_are_refused(model, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")  # a pickle
    save_file({"transformer_blocks.0.audio_attn1.to_q.lora_A.weight": torch.ones(2, 8)}, tmp_path / "sound.safetensors")
    for name, says in (
        ("a.pt", "not a whole"),
        ("none.safetensors", "no LoRA at"),
        ("sound.safetensors", "nothing for"),
    ):
        with pytest.raises(UserError, match=says):
            LoRA(tmp_path / name, model)


def test_file_and_strength():
    assert lora.parse_lora("a.safetensors") == ("a.safetensors", 1.0)
    assert lora.parse_lora("a.safetensors:0.5") == ("a.safetensors", 0.5)
    assert lora.parse_lora("C:/a.safetensors:-2") == ("C:/a.safetensors", -2.0)
    assert lora.parse_lora("C:/a.safetensors") == ("C:/a.safetensors", 1.0)
    for text in (":0.5", "a.safetensors:nan", "a.safetensors:inf"):
        with pytest.raises(UserError, match="FILE:STRENGTH"):
            lora.parse_lora(text)


# ----------------------------------------------------------------------------------------------------------------------
# merging


@pytest.fixture(scope="module")
def face(model, tmp_path_factory):
    """A LoRA file with random weights, as another trainer writes it; a change of a few percent."""
    theirs = peft_model({"a": (4, 4)})
    tensors = {name: tensor / 2 for name, tensor in get_peft_model_state_dict(theirs, adapter_name="a").items()}
    return write_lora(tmp_path_factory.mktemp("lora") / "face.safetensors", tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_changes_no_bit(dtype, face, model):
    before = tiny(dtype).state_dict()
    after = merge_lora(tiny(dtype), [LoRA(face, model, 0.0)]).state_dict()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    attached = attach_lora(tiny(dtype), [LoRA(face, model, 0.0)])
    assert not any(isinstance(module, LoRALinear) for module in attached.modules())
    changed = merge_lora(tiny(dtype), [LoRA(face, model)]).state_dict()
    assert not all(torch.equal(tensor, changed[name]) for name, tensor in before.items())  # so it can fail


def test_merging_in_bf16_rounds_once(face, model):
    """W + both changes, in float32, rounded to bf16 at the end: not after each."""
    loras = [LoRA(face, model, 0.3), LoRA(face, model, -0.7)]
    got = merge_lora(tiny(torch.bfloat16), loras)
    stored, base = load_file(face), tiny(torch.bfloat16)
    twice = 0
    for layer in loras[0].pairs:
        weight = base.get_submodule(layer).weight.detach().double()
        a, b = (stored[f"diffusion_model.{layer}.lora_{part}.weight"].double() for part in "AB")
        want = (weight + (0.3 - 0.7) * b @ a).bfloat16()
        same = got.get_submodule(layer).weight == want
        assert same.double().mean() > 0.999, layer  # but for ties that float32 sees and float64 does not
        twice += ((weight + 0.3 * b @ a).bfloat16().double() - 0.7 * b @ a).bfloat16().ne(want).sum()
    assert twice > 1000  # so it can fail


@torch.no_grad()
def test_a_merged_checkpoint_samples_like_the_lora(face, model, golden, tmp_path, monkeypatch, capsys):
    """The command's file, loaded as any checkpoint is: the same weights as merging at load, and the same samples."""
    out = tmp_path / "merged.safetensors"
    words = ["lora.py", "--ckpt", str(TINY_A), "--lora", f"{face}:0.8", "--lora", f"{face}:0.4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with one_line_errors():
        lora.main()
    assert "strength 0.8" in capsys.readouterr().out
    loras = [LoRA(face, model, 0.8), LoRA(face, model, 0.4)]
    loaded, merged = LTXVideo.from_checkpoint(out, dtype=torch.bfloat16), merge_lora(tiny(torch.bfloat16), loras)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name

    problem = {key: golden[key] for key in ("noise", "sigmas", "context", "null_context")}
    problem |= {"positions": golden["video_positions"], "reference": golden["ref"]}
    problem |= {"ref_positions": golden["tass_positions"]}
    exported = sample_latents(LTXVideo.from_checkpoint(out), **problem, s_y=2.0, s_r=2.0)
    beside = sample_latents(attach_lora(tiny(), loras), **problem, s_y=2.0, s_r=2.0)
    plain = sample_latents(model, **problem, s_y=2.0, s_r=2.0)
    assert (exported - beside).abs().mean() < 0.03 * (plain - beside).abs().mean()  # the file's weights are bf16

    before, after = Checkpoint(TINY_A), Checkpoint(out)
    changed = {f"model.diffusion_model.{layer}.weight" for layer in loras[0].pairs}
    assert list(before.tensors) == list(after.tensors)
    assert {n for n in before.tensors if before.read_bytes(n) != after.read_bytes(n)} == changed
    assert {k: v for k, v in after.metadata.items() if k != OUR_METADATA} == {
        k: v for k, v in before.metadata.items() if k != OUR_METADATA
    }
    assert after.ours["loras"] == ["face.safetensors:0.8", "face.safetensors:0.4"]


def test_a_merged_checkpoint_says_how_to_sample_as_its_loras_do(face, model, tmp_path):
    def told(name, **ours):
        save_file(load_file(face), tmp_path / name, {OUR_METADATA: json.dumps(ours)})
        return tmp_path / name

    one = LoRA(told("one", placement="phase", fit="cover", training={"a": 1}, defaults={"s_ref": 3.0}), model)
    two, out = told("two", placement="remote", defaults={"s_ref": 9.0}), tmp_path / "distilled.safetensors"
    lora.merge_file(TINY_A, [one, LoRA(two, model, 0.0)], out)
    lora.merge_file(out, [LoRA(face, model)], tmp_path / "again.safetensors")
    for path in (out, tmp_path / "again.safetensors"):
        ours = Checkpoint(path).ours
        assert (ours["placement"], ours["fit"], ours["defaults"]) == ("phase", "cover", {"s_ref": 3.0})
        assert "training" not in ours
    sign = distilled_sign(tmp_path / "again.safetensors", Checkpoint(tmp_path / "again.safetensors").metadata)
    assert sign == "distilled.safetensors, by its file name" and distilled_sign(out, {}) == "its file name"
    assert distilled_sign(TINY_A, Checkpoint(TINY_A).metadata) is None
    with pytest.raises(UserError, match="different placement, phase and remote"):
        lora.merge_file(TINY_A, [one, LoRA(two, model)], out)


# ----------------------------------------------------------------------------------------------------------------------
# training


@torch.no_grad()
def test_an_untrained_adapter_changes_nothing_and_freezes_the_model(inputs, model):
    adapted = new_lora(tiny(), rank=3, alpha=6.0, targets=TARGETS, dropout=0.5)
    assert torch.equal(adapted(**inputs), model(**inputs))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(lora.find_targets(model, TARGETS)) and all(".adapters.0.lora_" in n for n in trained)
    same = new_lora(tiny(), rank=3, alpha=6.0, targets=TARGETS).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in adapted.state_dict().items())
    other = new_lora(tiny(), rank=3, alpha=6.0, targets=TARGETS, seed=1).state_dict()
    assert not all(torch.equal(tensor, same[name]) for name, tensor in other.items())


def test_targets_are_ends_of_names(model):
    found = lora.find_targets(model, ["attn1.to_q", "proj"])
    blocks = range(len(model.transformer_blocks))
    assert found.keys() == {
        f"transformer_blocks.{k}.{part}" for k in blocks for part in ("attn1.to_q", "ff.net.0.proj")
    }
    with pytest.raises(UserError, match="'o_q'"):
        lora.find_targets(model, ["to_k", "o_q"])


def test_dropout_is_in_training_only_and_follows_the_sample():
    adapter = lora.Adapter(torch.ones(1, 4000), torch.ones(1, 1), 1.0, dropout=0.25)
    x = torch.ones(1, 4000)
    assert adapter.eval()(x).item() == 4000
    adapter.train()
    drawn = []
    for seed, count in ((0, 5), (0, 6), (1, 5), (0, 5)):
        lora.seed_dropout(seed, count)
        drawn.append(adapter(x).item())
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3
    np.testing.assert_allclose(drawn, 4000, rtol=0.1)  # scaled up for what is dropped


def test_weights_in_bf16_beside_adapters_in_float32(inputs):
    """What train.py trains: the frozen model in bf16, gradients to float32 adapters."""
    adapted = new_lora(tiny(torch.bfloat16), rank=2, alpha=2.0, targets=["to_q"])
    low = inputs | {key: inputs[key].bfloat16() for key in ("latents", "context")}
    adapted(**low).float().square().mean().backward()
    kinds = {(p.dtype, p.requires_grad, p.grad is not None) for p in adapted.parameters()}
    assert kinds == {(torch.bfloat16, False, False), (torch.float32, True, True)}


@pytest.mark.parametrize(
    "placement, source_id, phase_scale", [("phase", 2, 1.0), ("phase", 1, 0.5), ("overlap", 2, 1.0)]
)
def test_training_gives_the_phase_to_the_references_tokens(placement, source_id, phase_scale, vae):
    grid, seen = (2, 2, 3), {}
    objective = Objective(vae, None, None, 8, 24.0, None, None)
    objective.placement, objective.source_id, objective.phase_scale = placement, source_id, phase_scale

    def record(latents, timesteps, sigma, context, positions, mask, phase=None):
        seen.update(positions=positions, mask=mask, phase=phase)
        return latents

    has_reference = torch.tensor([True, False])
    z_t, t = torch.zeros(2, 12, 4), torch.tensor([0.5, 0.25])
    objective.velocity(record, z_t, t, torch.zeros(2, 8, 128), torch.zeros(2, 3, 64, 96), has_reference, grid)
    want = torch.cat([torch.zeros(2, 12), torch.full((2, 6), float(source_id * phase_scale))], dim=1)
    assert seen["phase"] is None if placement == "overlap" else torch.equal(seen["phase"], want)
    assert torch.equal(seen["positions"][:, :, 12:], seen["positions"][:, :, :6])  # on the first frame
    assert seen["mask"].sum(1).tolist() == [18, 12]


# ----------------------------------------------------------------------------------------------------------------------
# the plan


def test_the_plan_counts_what_is_trained_and_fits_one_gpu(released):
    config = read_config(ROOT / "configs" / "lora.toml")
    plan = Plan(config, released["config"], (121, 480, 832), 1024)
    sides = [released["needed"][f"model.diffusion_model.transformer_blocks.0.{layer}.weight"] for layer in VIDEO]
    assert plan.trained == 48 * config["lora"]["rank"] * sum(map(sum, sides))
    memory = plan.memory(1)
    assert memory["frozen: DiT"] == 2 * sum(torch.Size(s).numel() for s in dit_shapes(released))
    assert memory["adapters, fp32"] + memory["gradients, fp32"] + memory["AdamW moments, fp32"] == 16 * plan.trained
    assert sum(memory.values()) < 0.9 * 80e9
    assert "1 x H100-80 | fits" in plan.report(1, 0.4) and "adapters of rank 64" in plan.report(1, 0.4)
    full = Plan(read_config(ROOT / "configs" / "paper.toml"), released["config"], (121, 480, 832), 1024)
    assert full.trained == memory["frozen: DiT"] / 2 and sum(full.memory(1).values()) > 210e9
    assert 0.6 < plan.flops_per_sample() / full.flops_per_sample() < 0.8


def dit_shapes(released):
    """Of the DiT's tensors in the released file: what is not the connector's."""
    prefix, connector = "model.diffusion_model.", "model.diffusion_model.video_embeddings_connector."
    named = released["needed"].items()
    return [shape for name, shape in named if name.startswith(prefix) and not name.startswith(connector)]


def test_the_plans_operations_are_those_that_are_done():
    """Counted by PyTorch over a forward and a backward pass of the tiny model, frozen, with adapters."""
    model, n, s = new_lora(tiny(), rank=16, alpha=16.0, targets=TARGETS), 600, 100
    model.patchify_proj.requires_grad_(True)  # so that the first block's input has a gradient, as all others' have
    positions, t = torch.rand(1, 3, n, 2), torch.rand(1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.ones(1, n, 4), t.expand(1, n), t, torch.ones(1, s, 128), positions).sum().backward()
    config = Checkpoint(TINY_A).config["transformer"]
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".adapters." in name)
    want = 3 * dit_flops(config, n, 0, s) - weight_flops(config, n, s) + 6 * adapters * n
    assert counter.get_total_flops() == pytest.approx(want, rel=0.04)  # text k and v have fewer tokens


def test_saved_metadata_is_read_by_the_library(tmp_path):
    adapted = new_lora(tiny(), rank=2, alpha=2.0, targets=["to_q"])
    weights = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    save_lora(tmp_path / "a.safetensors", weights, 1.0, {"placement": "phase", "training": {"optim": {"lr": 1e-4}}})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        ours = json.loads(file.metadata()[OUR_METADATA])
    assert ours["placement"] == "phase" and ours["training"]["optim"]["lr"] == 1e-4

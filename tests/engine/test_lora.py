"""lora.py against peft on the same tiny model, the released layout, files of every shape, and what merging promises."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_A, write_sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import OUR_METADATA, Checkpoint, distilled_sign, file_name
from common.errors import UserError, one_line_errors
from config import ASSETS, ReferenceOptions, read_config
from engine import lora
from engine.lora import new_lora, save_lora
from engine.lora_files import LoRA, describe, merge_lora, merged, parse_lora
from engine.plan import Plan, dit_flops, weight_flops
from guidance import sample_latents
from model import LTXVideo
from objective import Objective
from rope import RefPositions
from text import GEMMA, TextConnector, TextEncoder

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


def adapted(tensors, rank, alpha, targets=TARGETS):
    """The tiny model with our trainable adapters, A and B taken from peft's tensors."""
    ours = new_lora(tiny(), rank, alpha, targets)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[f"{name}.weight"])
    return ours


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
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@torch.no_grad()
def test_unmerged_and_merged_equal_peft(adapters, prefix, halves, alpha_given, inputs, model, tmp_path):
    theirs = peft_model(adapters)
    files, want = [], theirs(**inputs)
    assert (want - model(**inputs)).abs().max() > 0.05  # the adapters do something
    for name, (rank, alpha) in adapters.items():
        tensors = get_peft_model_state_dict(theirs, adapter_name=name)
        assert len(tensors) == 2 * len(lora.find_targets(model, TARGETS))
        path = tmp_path / f"{name}.safetensors"
        files.append(write_lora(path, tensors, prefix, halves, alpha if alpha_given else None))
        if len(adapters) == 1:
            torch.testing.assert_close(adapted(tensors, rank, alpha)(**inputs), want, atol=1e-5, rtol=0)

    loras = [LoRA(file, [model]) for file in files]
    for module in filter(lambda module: isinstance(module, LoraLayer), theirs.modules()):
        module.merge()
    got = merge_lora(tiny(), loras)(**inputs)
    torch.testing.assert_close(got, theirs(**inputs), atol=1e-4, rtol=0)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_gradients_equal_pefts(inputs, model):
    theirs = peft_model({"a": (4, 4)})
    ours = adapted(get_peft_model_state_dict(theirs, adapter_name="a"), 4, 4.0)
    for one in (ours, theirs):
        one(**inputs).square().mean().backward()
    want = {name: p.grad for name, p in theirs.named_parameters() if ".lora_" in name}
    got = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert len(got) == len(want) == 2 * len(lora.find_targets(model, TARGETS))
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[f"{name}.a.weight"], atol=1e-6, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in got.values()) > 1e-4


@torch.no_grad()
def test_strength_scales_the_change(inputs, model, tmp_path):
    """The last layer is linear in its weight, so twice the strength is twice the change of the output."""
    theirs = peft_model({"a": (4, 4)}, targets=["proj_out"])
    path = write_lora(tmp_path / "a.safetensors", get_peft_model_state_dict(theirs, adapter_name="a"))
    base, full = model(**inputs), theirs(**inputs)
    for strength in (2.0, 0.25, -1.0):
        got = merge_lora(tiny(), [LoRA(path, [model], strength)])(**inputs)
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
    assert LoRA(path, [model]).ours == {"placement": "tass"}


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
    file = LoRA(path, [model])
    blocks = [f"model.diffusion_model.transformer_blocks.{block}" for block in range(48)]
    assert file.changes.keys() == {f"{block}.{layer}.weight" for block in blocks for layer in VIDEO}
    assert (len(file.changes), file.audio, file.rank) == (480, 1728, 128)
    layers = dict(model.transformer_blocks.named_modules(prefix="transformer_blocks"))
    linear = {name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)}
    linear = {f"model.diffusion_model.{name}.weight" for name in linear if "to_gate_logits" not in name}
    assert linear == set(file.changes)
    assert {change.scale for change in file.changes.values()} == {1.0}


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
        ({f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None, f"{Q}.weight": torch.ones(2)}, "goes to --ckpt"),
        ({f"{Q}.dora_scale": torch.ones(127)}, f"{Q}.dora_scale [127]"),
        ({f"{Q}.diff": torch.ones(128, 128)}, f"{Q}.lora_A.weight are for the same place"),
        ({f"{Q}.diff_b": torch.ones(127)}, f"{Q}.diff_b [127] does not fit"),
        ({"transformer_blocks.0.scale_shift_table.lora_A.weight": torch.ones(2, 128)}, "scale_shift_table.lora_A"),
        ({"lora_unet_transformer_blocks_0_attn3_to_q.lora_down.weight": torch.ones(2, 128)}, "lora_unet_transformer"),
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
        LoRA(tmp_path / "a.safetensors", [model])
    assert says in str(error.value) and "a.safetensors" in str(error.value) and "\n" not in str(error.value)
    save_file(good_pair(model), tmp_path / "a.safetensors")
    assert LoRA(tmp_path / "a.safetensors", [model]).rank == 2  # without the change it is fine


def test_files_that_are_none_are_refused(model, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")  # a pickle
    save_file({"transformer_blocks.0.audio_attn1.to_q.lora_A.weight": torch.ones(2, 8)}, tmp_path / "sound.safetensors")
    for name, says in (
        ("a.pt", "not a whole"),
        ("none.safetensors", "no LoRA at"),
        ("sound.safetensors", "nothing for"),
    ):
        with pytest.raises(UserError, match=says):
            LoRA(tmp_path / name, [model])


def test_file_and_strength():
    assert parse_lora("a.safetensors") == ("a.safetensors", 1.0)
    assert parse_lora("a.safetensors:0.5") == ("a.safetensors", 0.5)
    assert parse_lora("C:/a.safetensors:-2") == ("C:/a.safetensors", -2.0)
    assert parse_lora("C:/a.safetensors") == ("C:/a.safetensors", 1.0)
    for text in (":0.5", "a.safetensors:nan", "a.safetensors:inf"):
        with pytest.raises(UserError, match="FILE:STRENGTH"):
            parse_lora(text)


# ----------------------------------------------------------------------------------------------------------------------
# dialects

DIALECTS = {  # how a layer's name begins, whether its dots become underscores, the two halves, alpha or not
    "ltx": ("diffusion_model.", False, "lora_A.weight", "lora_B.weight", False),
    "comfy": ("model.diffusion_model.", False, "lora_down.weight", "lora_up.weight", True),
    "kohya": ("lora_unet_", True, "lora_down.weight", "lora_up.weight", True),
    "kohya-model": ("lora_unet_model_", True, "lora_down.weight", "lora_up.weight", True),
    "default": ("transformer.", False, "lora_A.default.weight", "lora_B.default.weight", False),
    "peft": ("base_model.model.", False, "lora_A.weight", "lora_B.weight", False),
    "peft-wrapped": (
        "base_model.model.diffusion_model.",
        False,
        "lora_A.default.weight",
        "lora_B.default.weight",
        False,
    ),
    "diffusers-old": ("", False, "lora.down.weight", "lora.up.weight", False),
}
CONNECTOR = "video_embeddings_connector.transformer_1d_blocks.0"
PROJECTION = "text_embedding_projection.video_aggregate_embed"
MIXED = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.0.proj", f"{CONNECTOR}.attn1.to_v", PROJECTION)


def random_pair(shape, rank=4, seed=0):
    """A (rank, in) and B (out, rank)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) / 10 for size in ((rank, shape[1]), (shape[0], rank))]


def in_dialect(dialect, layer, a, b):
    """One pair as a trainer of that dialect names it."""
    prefix, underscores, down, up, alpha = DIALECTS[dialect]
    name = prefix + (layer.replace(".", "_") if underscores else layer)
    pair = {f"{name}.{down}": a, f"{name}.{up}": b}
    return pair | ({f"{name}.alpha": torch.tensor(float(len(a)))} if alpha else {})


def text_path():
    return TextConnector.from_checkpoint(TINY_A).requires_grad_(False)


def released_weights(*modules):
    return {file_name(n, m.PREFIXES): tensor for m in modules for n, tensor in m.state_dict().items()}


def released_name(layer):
    return f"{layer}.weight" if layer == PROJECTION else f"model.diffusion_model.{layer}.weight"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_dialect_gives_the_same_weights_to_the_bit(dialect, model, connector, tmp_path):
    """DiT, connector and projection. The right weights are computed here from the base's weights."""
    base, tensors = released_weights(model, connector), {}
    want = {}
    for seed, layer in enumerate(MIXED):
        a, b = random_pair(base[released_name(layer)].shape, seed=seed)
        tensors |= in_dialect(dialect, layer, a, b)
        want[released_name(layer)] = torch.addmm(base[released_name(layer)], b, a, alpha=0.5)
    save_file(tensors, tmp_path / "a.safetensors")
    file = LoRA(tmp_path / "a.safetensors", [model, connector], 0.5)
    assert file.changes.keys() == want.keys() and (file.audio, file.ignored) == (0, [])
    got = released_weights(merge_lora(tiny(), [file]), merge_lora(text_path(), [file]))
    for name, tensor in (base | want).items():
        assert torch.equal(got[name], tensor), name
        assert name not in want or not torch.equal(got[name], base[name])


def test_a_kohya_alpha_scales_and_may_be_a_whole_number(model, tmp_path):
    a, b = random_pair((128, 128))
    for alpha in (torch.tensor(8), torch.tensor(8.0), torch.tensor([8.0]).half()):
        save_file(in_dialect("kohya", Q, a, b) | {"lora_unet_" + Q.replace(".", "_") + ".alpha": alpha}, tmp_path / "a")
        got = merge_lora(tiny(), [LoRA(tmp_path / "a", [model])]).get_submodule(Q).weight
        torch.testing.assert_close(got, model.get_submodule(Q).weight + 2.0 * b @ a, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_dora_is_merged_as_peft_merges_it(inputs, model, tmp_path):
    """With peft's names for the magnitude and with the name that other trainers have."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, use_dora=True)
    theirs = inject_adapter_in_model(config, tiny(), adapter_name="a")
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:  # as if trained: no row keeps the length of W + B A
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    saved, want = get_peft_model_state_dict(theirs, adapter_name="a"), theirs(**inputs)
    assert (want - model(**inputs)).abs().max() > 0.05
    for module in theirs.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    for magnitude_name in ("lora_magnitude_vector", "lora_magnitude_vector.default.weight", "dora_scale"):
        tensors = {}
        for name, tensor in saved.items():
            if "magnitude" in name and magnitude_name == "dora_scale":
                tensor = tensor[:, None]  # (out, 1), as trainers other than peft keep it
            tensors[f"diffusion_model.{name}".replace("lora_magnitude_vector", magnitude_name)] = tensor.contiguous()
            if ".lora_A" in name:
                tensors[f"diffusion_model.{name.split('.lora_A')[0]}.alpha"] = torch.tensor(6.0)
        layers = lora.find_targets(model, TARGETS)
        assert sum(name.endswith(f".{magnitude_name}") for name in tensors) == len(layers)
        save_file(tensors, tmp_path / "dora.safetensors")
        got = merge_lora(tiny(), [LoRA(tmp_path / "dora.safetensors", [model])])
        for layer in layers:
            ours, peft = (tree.get_submodule(layer).weight for tree in (got, theirs))
            torch.testing.assert_close(ours, peft, atol=1e-5, rtol=0)
    torch.testing.assert_close(got(**inputs), want, atol=1e-4, rtol=0)
    half = merge_lora(tiny(), [LoRA(tmp_path / "dora.safetensors", [model], 0.5)])  # strength blends W and W'
    middle = (model.get_submodule(Q).weight + theirs.get_submodule(Q).weight) / 2
    torch.testing.assert_close(half.get_submodule(Q).weight, middle, atol=1e-5, rtol=0)


def test_a_dora_magnitude_per_column(model, tmp_path):
    """Some trainers normalize the columns of V. Truth: numpy, in float64, one column at a time."""
    a, b = random_pair((128, 128))
    magnitude = torch.rand(1, 128, generator=torch.Generator().manual_seed(3)) + 0.5
    save_file(in_dialect("kohya", Q, a, b) | {f"lora_unet_{Q.replace('.', '_')}.dora_scale": magnitude}, tmp_path / "a")
    got = merge_lora(tiny(), [LoRA(tmp_path / "a", [model])]).get_submodule(Q).weight.detach().numpy()
    direction = (model.get_submodule(Q).weight.double() + b.double() @ a.double()).numpy()
    for k, column in enumerate(direction.T):
        np.testing.assert_allclose(got[:, k], magnitude[0, k].item() * column / np.sqrt((column**2).sum()), atol=1e-6)


def test_full_differences_of_weights_biases_norms_and_tables(model, connector, tmp_path):
    base, norm = released_weights(model, connector), "transformer_blocks.0.attn1.q_norm"
    names = {
        f"diffusion_model.{Q}.diff": f"model.diffusion_model.{Q}.weight",
        f"lora_unet_{Q.replace('.', '_')}.diff_b": f"model.diffusion_model.{Q}.bias",
        f"diffusion_model.{norm}.diff": f"model.diffusion_model.{norm}.weight",
        "transformer_blocks.1.scale_shift_table.diff": "model.diffusion_model.transformer_blocks.1.scale_shift_table",
        f"diffusion_model.{CONNECTOR}.ff.net.2.diff_b": f"model.diffusion_model.{CONNECTOR}.ff.net.2.bias",
        "text_embedding_projection.aggregate_embed.diff_b": f"{PROJECTION}.bias",
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(base[target].shape, generator=generator) / 10 for name, target in names.items()}
    save_file(tensors, tmp_path / "a")
    file = LoRA(tmp_path / "a", [model, connector], -0.5)
    assert set(file.changes) == set(names.values())
    got = released_weights(merge_lora(tiny(), [file]), merge_lora(text_path(), [file]))
    want = base | {target: base[target] - 0.5 * tensors[name] for name, target in names.items()}
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=0)
        assert torch.equal(tensor, base[name]) == (name not in names.values())
    assert "6 full differences, 2 of these in the text path" in describe(file)


def test_a_file_in_several_dialects_for_both_branches_and_the_text_path(model, connector, tmp_path):
    base, tensors = released_weights(model, connector), {}
    for dialect, layer in zip(("kohya", "ltx", "peft", "diffusers-old"), MIXED):
        tensors |= in_dialect(dialect, layer, *random_pair(base[released_name(layer)].shape))
    for layer in AUDIO[:3]:
        tensors |= in_dialect("ltx", f"transformer_blocks.0.{layer}", *random_pair((8, 8)))
        tensors |= in_dialect("kohya", f"transformer_blocks.1.{layer}", *random_pair((8, 8)))
    tensors[f"diffusion_model.{CONNECTOR}.attn1.to_k.diff_b"] = torch.ones(128)
    tensors["reference_slot_embedding.weight"] = torch.ones(4, 128)
    tensors |= {f"diffusion_model.transformer_blocks.{k}.attn3.to_q.lora_A.weight": torch.ones(2, 2) for k in range(30)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as error:
        LoRA(tmp_path / "a.safetensors", [model, connector])
    text = str(error.value)
    assert "31 of" in text and "reference_slot_embedding.weight" in text and "--lora-ignore-unknown" in text
    assert "diffusion_model.transformer_blocks.*.attn3.to_q.lora_A.weight (30 times)" in text and len(text) < 1000
    file = LoRA(tmp_path / "a.safetensors", [model, connector], ignore_unknown=True)
    assert (len(file.changes), file.audio, len(file.ignored), file.rank) == (5, 15, 31, 4)
    assert describe(file).endswith(
        "at strength 1: 4 layers of rank up to 4, 1 full differences, 3 of these in the text path, "
        "15 tensors of the audio branch set aside, 31 without a place ignored"
    )


def test_an_underscored_name_of_two_layers_is_an_error(tmp_path):
    """No model of this family has one; a module made for it has."""
    module = torch.nn.Module()
    module.PREFIXES = {"": "model.diffusion_model."}
    module.a, module.a_b = (
        torch.nn.ModuleDict({"b_c": torch.nn.Linear(4, 4)}),
        torch.nn.ModuleDict({"c": torch.nn.Linear(4, 4)}),
    )
    save_file(in_dialect("kohya", "a.b_c", *random_pair((4, 4))), tmp_path / "a")
    with pytest.raises(UserError, match=r"lora_unet_a_b_c may be .*a\.b_c or .*a_b\.c"):
        LoRA(tmp_path / "a", [module])
    save_file(in_dialect("ltx", "a.b_c", *random_pair((4, 4))), tmp_path / "a")
    assert list(LoRA(tmp_path / "a", [module]).changes) == ["model.diffusion_model.a.b_c.weight"]


# ----------------------------------------------------------------------------------------------------------------------
# numbers that are none


def long_pair():
    return {f"{Q}.lora_A.weight": torch.randn(2, 128), f"{Q}.lora_B.weight": torch.randn(128, 2)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_bad_element_is_an_error_with_the_tensors_name(value, dtype, model, tmp_path):
    tensors = {name: tensor.to(dtype) for name, tensor in long_pair().items()}
    tensors["transformer_blocks.0.audio_attn1.to_q.lora_A.weight"] = torch.zeros(2, 3, dtype=dtype)
    tensors |= {f"{Q}.dora_scale": torch.ones(128, dtype=dtype), f"{Q}.diff_b": torch.ones(128, dtype=dtype)}
    save_file(tensors, tmp_path / "a")
    LoRA(tmp_path / "a", [model]).require_finite()
    for name, tensor in tensors.items():
        bad = tensor.clone()
        bad.view(-1)[-1] = value
        save_file(tensors | {name: bad}, tmp_path / "a")
        with pytest.raises(UserError, match=f"{name} holds NaN or infinity"):
            LoRA(tmp_path / "a", [model]).require_finite()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_what_is_not_floating_point_is_refused_before_its_shape_is_seen(dtype, model, tmp_path):
    for part, tensor in (("lora_A.weight", torch.ones(7, 7)), ("dora_scale", torch.ones(7)), ("diff", torch.ones(7))):
        pair = {} if part == "diff" else long_pair()
        save_file(pair | {f"{Q}.{part}": tensor.to(dtype)}, tmp_path / "a")
        with pytest.raises(UserError, match=f"{Q}.{part} is stored as .*: a LoRA holds floating-point"):
            LoRA(tmp_path / "a", [model])


LAYERS = (Q, "transformer_blocks.1.scale_shift_table", "proj_out", "x", "audio_x", "")
PARTS = ("lora_A.weight", "lora_B.weight", "alpha", "dora_scale", "diff", "diff_b", "weight")
NAMES = [f"{layer}.{part}" for layer in LAYERS for part in PARTS]
NAMES += ["lora_unet_proj_out.lora_up.weight", "lora_unet_.alpha", "diffusion_model..diff", "a\nb.diff", "\u00e9.alpha"]
SHAPES = [(), (1,), (128,), (128, 1), (1, 128), (2, 128), (128, 2), (4, 2), (2, 128, 1), (0,), (0, 128), (128, 128)]
DTYPES = [torch.float32] * 4 + [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool]
FORMS = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES))
OURS = [None, "{}", "[]", "nope", "[" * 9999, '{"placement": 5}', '{"defaults": {"s_ref": "x"}}', '{"defaults": [1]}']


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(
    tensors=st.dictionaries(st.sampled_from(NAMES), FORMS, max_size=5),
    ours=st.sampled_from(OURS),
    value=st.sampled_from([1.0, 1.0, float("nan"), 6e4]),
    pair=st.booleans(),
    ignore=st.booleans(),
)
def test_any_file_is_read_or_refused_with_a_user_error(tensors, ours, value, pair, ignore, model, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    full = long_pair() if pair else {}
    full |= {name: torch.full(shape, value).to(dtype) for name, (shape, dtype) in tensors.items()}
    save_file(full, path, {OUR_METADATA: ours} if ours else None)
    try:
        file = LoRA(path, [model], 2.0, ignore)
        file.require_finite()
        for target in file.changes:
            assert merged(torch.ones(file.shapes[target]), target, [file]).isfinite().all()
    except UserError as error:
        assert len(str(error)) < 2000


def test_changes_that_overflow_are_errors(model, tmp_path):
    large = {f"{Q}.lora_A.weight": torch.full((2, 128), 1e20), f"{Q}.lora_B.weight": torch.full((128, 2), 1e19)}
    save_file(large, tmp_path / "a")
    with pytest.raises(UserError, match="by more than float32 holds"):
        LoRA(tmp_path / "a", [model]).require_finite()
    save_file(long_pair() | {f"{Q}.alpha": torch.tensor(1e300, dtype=torch.float64)}, tmp_path / "a")
    with pytest.raises(UserError, match="by more than float32 holds"):
        LoRA(tmp_path / "a", [model]).require_finite()
    save_file({f"{Q}.diff": torch.full((128, 128), 1e5)}, tmp_path / "a")
    file = LoRA(tmp_path / "a", [model])
    file.require_finite()
    merge_lora(tiny(torch.bfloat16), [file])
    with pytest.raises(UserError, match=r"beyond the range of torch.float16: lower the strength"):
        merge_lora(tiny(torch.float16), [file])
    for strength in ("1e300", "101", "-1e9", "nan"):
        with pytest.raises(UserError, match="FILE:STRENGTH"):
            parse_lora(f"a.safetensors:{strength}")


def test_a_strange_file_ends_before_gemma_is_read(in_process, monkeypatch, tmp_path):
    import sample

    monkeypatch.setattr(sample.TextEncoder, "from_checkpoint", lambda *_: pytest.fail("Gemma was read"))
    width = Checkpoint(ASSETS / "tiny.safetensors").tensors[f"model.diffusion_model.{Q}.weight"]["shape"][1]
    pair = {f"{Q}.lora_A.weight": torch.ones(2, width), f"{Q}.lora_B.weight": torch.ones(width, 2)}
    pair[f"{Q}.lora_B.weight"][5, 1] = float("nan")
    save_file(pair, tmp_path / "nan.safetensors")
    save_file({"reference_slot_embedding.weight": torch.ones(2, 2)} | pair, tmp_path / "slot.safetensors")
    for name, says in (("nan", f"{Q}.lora_B.weight holds NaN"), ("slot", "reference_slot_embedding.weight")):
        out = tmp_path / f"{name}.mp4"
        path = tmp_path / f"{name}.safetensors"
        for program, main, options in (
            ("sample.py", sample.main, ["--prompt", "x", "--lora", path]),
            ("engine.lora", lora.main, ["--ckpt", ASSETS / "tiny.safetensors", "--lora", path]),
        ):
            code, _, error = in_process(main, program, *options, "--out", out)
            assert code == 2 and says in error and error.count("\n") == 1 and not out.exists()


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
    after = merge_lora(tiny(dtype), [LoRA(face, [model], 0.0)]).state_dict()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    changed = merge_lora(tiny(dtype), [LoRA(face, [model])]).state_dict()
    assert not all(torch.equal(tensor, changed[name]) for name, tensor in before.items())  # so it can fail


def test_merging_in_bf16_rounds_once(face, model):
    """W + both changes, in float32, rounded to bf16 at the end: not after each."""
    loras = [LoRA(face, [model], 0.3), LoRA(face, [model], -0.7)]
    got = merge_lora(tiny(torch.bfloat16), loras)
    stored, base = load_file(face), tiny(torch.bfloat16)
    twice = 0
    for target in loras[0].changes:
        layer = target.removeprefix("model.diffusion_model.").removesuffix(".weight")
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
    words = ["engine.lora", "--ckpt", str(TINY_A), "--lora", f"{face}:0.8", "--lora", f"{face}:0.4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with one_line_errors():
        lora.main()
    assert "strength 0.8" in capsys.readouterr().out
    loras = [LoRA(face, [model], 0.8), LoRA(face, [model], 0.4)]
    loaded, merged = LTXVideo.from_checkpoint(out, dtype=torch.bfloat16), merge_lora(tiny(torch.bfloat16), loras)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name

    problem = {key: golden[key] for key in ("noise", "sigmas", "context", "null_context")}
    problem |= {"positions": golden["video_positions"], "z_ref": golden["ref"]}
    problem |= {"ref_positions": RefPositions(golden["tass_positions"])}
    exported = sample_latents(LTXVideo.from_checkpoint(out), **problem, s_y=2.0, s_r=2.0)
    stored = {name.removeprefix("diffusion_model."): tensor for name, tensor in load_file(face).items()}
    beside = sample_latents(adapted(stored, 4, 4 * 1.2), **problem, s_y=2.0, s_r=2.0)
    plain = sample_latents(model, **problem, s_y=2.0, s_r=2.0)
    assert (exported - beside).abs().mean() < 0.03 * (plain - beside).abs().mean()  # the file's weights are bf16

    before, after = Checkpoint(TINY_A), Checkpoint(out)
    changed = loras[0].changes.keys()
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

    one = LoRA(told("one", placement="phase", fit="cover", training={"a": 1}, defaults={"s_ref": 3.0}), [model])
    two, out = told("two", placement="remote", defaults={"s_ref": 9.0}), tmp_path / "distilled.safetensors"
    lora.merge_file(Checkpoint(TINY_A), [one, LoRA(two, [model], 0.0)], out)
    lora.merge_file(Checkpoint(out), [LoRA(face, [model])], tmp_path / "again.safetensors")
    for path in (out, tmp_path / "again.safetensors"):
        ours = Checkpoint(path).ours
        assert (ours["placement"], ours["fit"], ours["defaults"]) == ("phase", "cover", {"s_ref": 3.0})
        assert "training" not in ours
    sign = distilled_sign(tmp_path / "again.safetensors", Checkpoint(tmp_path / "again.safetensors").metadata)
    assert sign == "distilled.safetensors, by its file name" and distilled_sign(out, {}) == "its file name"
    assert distilled_sign(TINY_A, Checkpoint(TINY_A).metadata) is None
    with pytest.raises(UserError, match="different placement, phase and remote"):
        lora.merge_file(Checkpoint(TINY_A), [one, LoRA(two, [model])], out)


def test_what_is_made_from_the_embedded_model_finds_its_text_encoder(in_process, monkeypatch, tmp_path):
    """A merged file, and a file merged from that one. A checkpoint of another origin needs Gemma 3 12B."""
    import sample

    width = Checkpoint(ASSETS / "tiny.safetensors").tensors[f"model.diffusion_model.{Q}.weight"]["shape"][1]
    pair = {f"{Q}.lora_A.weight": torch.ones(2, width), f"{Q}.lora_B.weight": torch.ones(width, 2) / 100}
    save_file(pair, tmp_path / "a.safetensors")
    base, once, twice = ASSETS / "tiny.safetensors", tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    for ckpt, out in ((base, once), (once, twice)):
        words = ["--ckpt", ckpt, "--lora", tmp_path / "a.safetensors", "--out", out]
        assert in_process(lora.main, "engine.lora", *words)[0] == 0
        assert Checkpoint(out).ours["gemma"] == "embedded"
        assert Checkpoint(out).ours["defaults"] == Checkpoint(base).ours["defaults"]

    def encoder(path, gemma, *_):
        raise UserError(f"the text encoder is {gemma}")

    monkeypatch.setattr(sample.TextEncoder, "from_checkpoint", encoder)
    for ckpt, gemma in ((base, ASSETS / "gemma"), (twice, ASSETS / "gemma"), (TINY_A, GEMMA)):
        words = ["--ckpt", ckpt, "--prompt", "x", "--out", tmp_path / "x.mp4"]
        assert f"the text encoder is {gemma}" in in_process(sample.main, "sample.py", *words)[2]


def test_the_command_applies_layers_of_the_text_path(in_process, monkeypatch, tmp_path):
    """A bias of the projection moves the context of the prompt by as much as computed here; one of the DiT does not."""
    import sample

    contexts = []

    def generate(model, vae, context, null_context, *_, **__):
        contexts.append(context)
        raise UserError("no video is needed")

    monkeypatch.setattr(sample, "generate", generate)
    width = Checkpoint(ASSETS / "tiny.safetensors").tensors[f"{PROJECTION}.bias"]["shape"][0]
    step = torch.linspace(-1, 1, width)
    save_file({f"diffusion_model.{PROJECTION}.diff_b": step}, tmp_path / "text.safetensors")
    save_file({f"diffusion_model.{Q}.diff_b": step}, tmp_path / "dit.safetensors")
    loras = ["--lora", f"{tmp_path}/text.safetensors:0.5"], ["--lora", tmp_path / "dit.safetensors"]
    for options in ([], *loras):
        words = ["--prompt", "A person smiles.", "--out", tmp_path / "x.mp4", *options]
        assert "no video is needed" in in_process(sample.main, "sample.py", *words)[2]
    plain, text, dit = contexts
    assert torch.equal(dit, plain)
    encoder = TextEncoder.from_checkpoint(ASSETS / "tiny.safetensors", ASSETS / "gemma")
    assert torch.equal(encoder.encode(["A person smiles."]), plain)
    encoder.connector.projection.bias.data += 0.5 * step
    torch.testing.assert_close(encoder.encode(["A person smiles."]), text, atol=1e-6, rtol=0)
    assert (text - plain).abs().max() > 0.1


def test_nothing_is_merged_into_a_base_in_fp8(in_process, face, forge, tmp_path):
    name = f"model.diffusion_model.{Q}.weight"
    base = forge(tensors={name: load_file(TINY_A)[name].to(torch.float8_e4m3fn)})
    words = ["--ckpt", base, "--lora", face, "--out", tmp_path / "out.safetensors"]
    code, _, error = in_process(lora.main, "engine.lora", *words)
    assert code == 2 and "is in fp8" in error and not (tmp_path / "out.safetensors").exists()


def test_a_merged_file_never_replaces_its_sources(in_process, face, tmp_path):
    base, linked, file = tmp_path / "base.safetensors", tmp_path / "linked.safetensors", tmp_path / "lora.safetensors"
    base.write_bytes(TINY_A.read_bytes())
    file.write_bytes(face.read_bytes())
    linked.hardlink_to(file)
    for out in (base, file, linked, tmp_path / "." / "lora.safetensors"):
        code, _, error = in_process(lora.main, "engine.lora", "--ckpt", base, "--lora", file, "--out", out)
        assert code == 2 and "would replace" in error and error.count("\n") == 1
    assert base.read_bytes() == TINY_A.read_bytes() and file.read_bytes() == face.read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# training


@torch.no_grad()
def test_an_untrained_adapter_changes_nothing_and_freezes_the_model(inputs, model):
    adapted = new_lora(tiny(), rank=3, alpha=6.0, targets=TARGETS, dropout=0.5)
    assert torch.equal(adapted(**inputs), model(**inputs))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(lora.find_targets(model, TARGETS)) and all(".lora_" in n for n in trained)
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
    base = torch.nn.Linear(4000, 1, bias=False)
    base.weight.data.zero_()
    adapter = lora.LoRALinear(base, torch.ones(1, 4000), torch.ones(1, 1), 1.0, dropout=0.25)
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
    grid = (2, 2, 3)
    reference = ReferenceOptions(placement=placement, source_id=source_id, phase_scale=phase_scale)
    objective = Objective(vae, None, None, 8, 24.0, reference=reference)
    z_t, z_ref, t = torch.zeros(2, 12, 4), torch.zeros(2, 6, 4), torch.tensor([0.5, 0.25])
    tokens = objective.sequence(z_t, z_ref, t, torch.tensor([True, False]), grid)
    want = torch.cat([torch.zeros(2, 12), torch.full((2, 6), float(source_id * phase_scale))], dim=1)
    assert tokens.phase is None if placement == "overlap" else torch.equal(tokens.phase, want)
    assert torch.equal(tokens.positions[:, :, 12:], tokens.positions[:, :, :6])  # on the first frame
    assert tokens.mask.sum(1).tolist() == [18, 12]


# ----------------------------------------------------------------------------------------------------------------------
# the plan


def test_the_plan_counts_what_is_trained_and_fits_one_gpu(released):
    config = read_config(ROOT / "configs" / "lora.toml")
    plan = Plan(config, released["config"], (121, 480, 832), 1024)
    sides = [released["needed"][f"model.diffusion_model.transformer_blocks.0.{layer}.weight"] for layer in VIDEO]
    assert plan.trained == 48 * config.lora.rank * sum(map(sum, sides))
    memory = plan.memory(1)
    assert memory["frozen: DiT"] == 2 * sum(torch.Size(s).numel() for s in dit_shapes(released))
    assert memory["adapters, fp32"] + memory["gradients, fp32"] + memory["AdamW moments, fp32"] == 16 * plan.trained
    assert sum(memory.values()) < 0.9 * 80e9
    assert re.search(r"1 x H100-80 \| \d+ GiB", plan.report(1, 0.4)) and "adapters of rank 64" in plan.report(1, 0.4)
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
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    want = 3 * dit_flops(config, n, 0, s) - weight_flops(config, n, s) + 6 * adapters * n
    assert counter.get_total_flops() == pytest.approx(want, rel=0.04)  # text k and v have fewer tokens


def test_saved_metadata_is_read_by_the_library(tmp_path):
    adapted = new_lora(tiny(), rank=2, alpha=2.0, targets=["to_q"])
    weights = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    save_lora(tmp_path / "a.safetensors", weights, 1.0, {"placement": "phase", "training": {"optim": {"lr": 1e-4}}})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        ours = json.loads(file.metadata()[OUR_METADATA])
    assert ours["placement"] == "phase" and ours["training"]["optim"]["lr"] == 1e-4

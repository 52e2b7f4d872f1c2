"""checkpoint.py: the released layout name by name, loading without a second copy, writing whole or not at all; what is
read of other layouts (fp8, a transformer alone), and what is refused, by name."""

import contextlib
import json
import struct
import subprocess
import sys

import pytest
import torch
from conftest import TINY_A, is_audio, read_metadata, write_sparse
from safetensors.torch import load_file, save_file

from checkpoint import DIT, DTYPES, Checkpoint, file_name, write, write_modules
from common.errors import UserError
from common.ltx_file import Ours, require_supported
from data import FITS
from engine.check import check, require_bf16
from engine.fp8 import FP8Linear, load_fp8, store_in_fp8
from model import LTXVideo
from text import TextConnector
from vae import VideoVAE

MODULES = [LTXVideo, TextConnector, VideoVAE]


def build(config, layers=49):
    """The three modules of a config on the meta device; the released Gemma has 49 hidden states."""
    with torch.device("meta"):
        return [
            LTXVideo(config["transformer"]),
            TextConnector(config["transformer"], layers),
            VideoVAE(config["vae"]),
        ]


def layout(modules):
    """(name in the file, shape) of every tensor that the modules ask for."""
    return [(file_name(n, m.PREFIXES), list(t.shape)) for m in modules for n, t in m.state_dict().items()]


# ---------------------------------------------------------------------------------------------------------------------
# names and shapes


def test_the_released_layout_is_asked_for_exactly(released):
    asked = layout(build(released["config"]))
    assert len(asked) == 1758 == len(dict(asked))  # nothing twice
    assert dict(asked) == released["needed"]  # nothing missing, nothing more, every shape
    assert not dict(asked).keys() & released["ignored"].keys()
    assert not any(is_audio(name) for name in dict(asked))


def test_the_released_file_fits_on_the_meta_device(released, released_file):
    """A header of 4,618 tensors and 46 GB behind it, of which nothing is read."""
    modules = [kind.from_checkpoint(released_file, device="meta") for kind in MODULES]
    assert dict(layout(modules)) == released["needed"]
    assert all(t.is_meta for m in modules for t in m.state_dict().values())
    assert modules[1].layers == 49 and modules[2].scale == (8, 32, 32)
    assert (modules[0].dim, modules[0].heads, len(modules[0].transformer_blocks)) == (4096, 32, 48)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_any_missing_or_misshapen_tensor_is_named(forge, tiny_a, kind, seed, device):
    names = [name for name, _ in layout([kind.from_checkpoint(tiny_a, device="meta")])]
    name = names[torch.randint(len(names), (), generator=torch.Generator().manual_seed(seed))]
    for changed in (None, torch.zeros(7, dtype=torch.bfloat16)):
        path = forge(tensors={name: changed})
        with pytest.raises(UserError) as error:
            kind.from_checkpoint(path, device=device)
        assert name in str(error.value) and str(path) in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_values_are_those_of_the_file(tiny_a, dtype):
    stored = load_file(tiny_a)
    for kind in MODULES:
        module = kind.from_checkpoint(tiny_a, dtype=dtype)
        assert not module.training
        for name, tensor in module.state_dict().items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, stored[file_name(name, kind.PREFIXES)].to(dtype)), name


def test_parameters_stay_parameters_and_buffers_buffers(tiny_a):
    for kind in MODULES:
        module = kind.from_checkpoint(tiny_a)
        fresh = kind.from_checkpoint(tiny_a, device="meta")
        assert [n for n, _ in module.named_parameters()] == [n for n, _ in fresh.named_parameters()]
        assert [n for n, _ in module.named_buffers()] == [n for n, _ in fresh.named_buffers()]
        assert all(p.requires_grad for p in module.parameters())


def test_audio_tensors_never_matter(tiny_a, forge, golden, model, vae, connector):
    """Not a number, other values, or absent: what is computed stays the same to the bit."""
    audio = {name: tensor for name, tensor in load_file(tiny_a).items() if is_audio(name)}
    asked = {name for name, _ in layout([model, vae, connector])}
    assert len(audio) > 100 and audio.keys().isdisjoint(asked)
    assert audio.keys() | asked == load_file(tiny_a).keys()

    def outputs(model, vae, connector):
        timesteps = golden["sigma"][:, None].expand(-1, 18)
        places = golden["video_positions"]
        yield model(golden["latent"], timesteps, golden["sigma"], golden["context"], places)
        yield vae.encode(golden["vae_video"])
        yield vae.decode(golden["vae_latent"])
        yield connector(golden["gemma_hidden"], golden["gemma_mask"])

    want = list(outputs(model, vae, connector))
    generator = torch.Generator().manual_seed(0)
    for change in (
        lambda t: torch.full_like(t, float("nan")),
        lambda t: torch.randn(t.shape, generator=generator).to(t.dtype),
        lambda t: None,
    ):
        path = forge(tensors={name: change(tensor) for name, tensor in audio.items()})
        loaded = [kind.from_checkpoint(path).requires_grad_(False) for kind in (LTXVideo, VideoVAE, TextConnector)]
        for got, expected in zip(outputs(*loaded), want):
            assert torch.equal(got, expected)


# ---------------------------------------------------------------------------------------------------------------------
# fp8

BLOCK = "model.diffusion_model.transformer_blocks.1."  # block 0 stays bf16, as the boundary blocks of the released file
BIG = ["attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v", "ff.net.0.proj", "ff.net.2"]  # square, and not


def in_fp8(layout, dtype=torch.float8_e4m3fn):
    """The tensors of tiny_a with big matrices in fp8, the same dequantized by hand, and metadata to add."""
    stored = load_file(TINY_A)
    by_hand, metadata = {name: tensor.float() for name, tensor in stored.items()}, {}
    for name in BIG:
        layer = BLOCK + name
        weight = by_hand[f"{layer}.weight"]
        scale = weight.abs().amax() / 400
        if "row" in layout:
            scale = weight.abs().amax(dim=1) / 400
        if layout == "plain cast":
            scale = torch.tensor(1.0)
        q = (weight / scale.reshape(-1, 1)).to(dtype)
        stored[f"{layer}.weight"] = q
        by_hand[f"{layer}.weight"] = q.float() * scale.reshape(-1, 1)
        note = {"format": str(dtype).removeprefix("torch.")}
        match layout:
            case "official":
                stored |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(0.3)}
            case "older comfy":
                stored |= {f"{layer}.scale_weight": scale.reshape(1), f"{layer}.scale_input": torch.ones(1)}
                stored["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=dtype)
            case "comfy" | "comfy, row":
                stored[f"{layer}.weight_scale"] = scale
                stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
            case "comfy in the metadata, row as a matrix":
                stored[f"{layer}.weight_scale"] = scale.reshape(-1, 1)
                layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {}) | {layer: note}
                metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return stored, by_hand, metadata


LAYOUTS = ["official", "older comfy", "comfy", "comfy, row", "comfy in the metadata, row as a matrix", "plain cast"]


def velocity(model, golden):
    timesteps = golden["sigma"][:, None].expand(-1, golden["latent"].shape[1])
    return model(golden["latent"], timesteps, golden["sigma"], golden["context"], golden["video_positions"])


def on_meta(checkpoint):
    with torch.device("meta"):
        return LTXVideo(checkpoint.config["transformer"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_layouts_compute_what_is_dequantized_by_hand(layout, dtype, forge, golden, tmp_path, capsys):
    stored, by_hand, metadata = in_fp8(layout, dtype)
    save_file(by_hand, tmp_path / "by_hand.safetensors", read_metadata(TINY_A))
    want = velocity(LTXVideo.from_checkpoint(tmp_path / "by_hand.safetensors"), golden)
    assert (want - velocity(LTXVideo.from_checkpoint(TINY_A), golden)).abs().max() > 1e-3  # fp8 does make a difference
    checkpoint = Checkpoint(forge(tensors=stored, metadata=metadata))
    dequantized = LTXVideo.from_checkpoint(checkpoint)
    assert (velocity(dequantized, golden) - want).abs().max() < 1e-5
    kept = load_fp8(on_meta(checkpoint), checkpoint, "cpu", torch.float32)
    assert (velocity(kept, golden) - want).abs().max() < 1e-5
    layers = {name for name, module in kept.named_modules() if isinstance(module, FP8Linear)}
    assert layers == {f"transformer_blocks.1.{name}" for name in BIG}
    for name in layers:  # the bytes of the file, unchanged
        assert torch.equal(kept.get_submodule(name).weight, stored[f"{DIT}{name}.weight"].view(torch.uint8))
        half = dequantized.get_submodule(name).weight.to(torch.bfloat16)  # rounded once
        assert torch.equal(checkpoint.read(f"{DIT}{name}.weight", dtype=torch.bfloat16), half)
    assert not any(p.requires_grad for p in kept.parameters()) and not kept.training
    check(checkpoint)
    words = capsys.readouterr().out
    kind = {"plain cast": "without scale"}.get(layout, "a scale for each row" if "row" in layout else "with a scale")
    assert f"6 {next(k for k, v in DTYPES.items() if v == dtype)} " in words and kind in words
    with pytest.raises(UserError, match="fp8"):
        require_bf16(checkpoint)
    require_bf16(Checkpoint(TINY_A))


@torch.no_grad()
def test_a_change_of_an_fp8_layer_quantizes_it_again_and_no_other(forge, golden):
    stored, by_hand, _ = in_fp8("official")
    checkpoint = Checkpoint(forge(tensors=stored))
    changed, plain = "transformer_blocks.1.ff.net.2", "patchify_proj"
    shapes = {name: by_hand[f"{DIT}{name}.weight"].shape for name in (changed, plain)}
    delta = {n: 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) for n, shape in shapes.items()}
    changes = {f"{DIT}{n}.weight": lambda weight, n=n: weight + delta[n].to(weight) for n in shapes}
    model = load_fp8(on_meta(checkpoint), checkpoint, "cpu", torch.float32, changes)
    layer, want = model.get_submodule(changed), by_hand[f"{DIT}{changed}.weight"] + delta[changed]
    got = layer.weight.view(torch.float8_e4m3fn).float() * layer.scale
    assert ((got - want).abs() <= torch.maximum(want.abs() / 16, layer.scale * 2**-10) * 1.001).all()
    assert torch.equal(model.patchify_proj.weight, by_hand[f"{DIT}{plain}.weight"] + delta[plain])
    for name in BIG[:-1]:
        kept = model.get_submodule(f"transformer_blocks.1.{name}")
        assert torch.equal(kept.weight, stored[f"{BLOCK}{name}.weight"].view(torch.uint8))


@torch.no_grad()
def test_a_bf16_file_in_fp8_is_the_model_stored_in_fp8(golden):
    checkpoint = Checkpoint(TINY_A)
    direct = load_fp8(on_meta(checkpoint), checkpoint, "cpu", torch.bfloat16)
    detour = store_in_fp8(LTXVideo.from_checkpoint(TINY_A, dtype=torch.bfloat16))
    assert direct.state_dict().keys() == detour.state_dict().keys()
    assert all(torch.equal(tensor, detour.state_dict()[name]) for name, tensor in direct.state_dict().items())


@pytest.fixture(scope="module")
def released_fp8(released, tmp_path_factory):
    """The released fp8 layout: big matrices of the blocks 2 to 45 in F8, with their scales. 29 GB long, on no disk."""
    dtypes, shapes = {}, released["needed"] | released["ignored"]
    for name in list(shapes):
        block = name.removeprefix(f"{DIT}transformer_blocks.").partition(".")[0]
        if block.isdigit() and 2 <= int(block) <= 45 and len(shapes[name]) == 2 and name.endswith(".weight"):
            if "to_gate_logits" in name:
                continue
            dtypes[name] = "F8_E4M3"
            for kind in ("weight_scale", "input_scale"):
                dtypes[name.removesuffix("weight") + kind] = "F32"
                shapes[name.removesuffix("weight") + kind] = []
    path = tmp_path_factory.mktemp("released_fp8") / "ltx-2.3-22b-dev-fp8.safetensors"
    metadata = {"config": json.dumps(released["config"]), "model_version": "2.3.0"}
    return write_sparse(path, shapes, metadata, dtypes)


def test_the_released_fp8_layout_is_found_whole(released, released_fp8, capsys):
    checkpoint = Checkpoint(released_fp8)
    modules = [kind.from_checkpoint(checkpoint, device="meta") for kind in MODULES]
    assert dict(layout(modules)) == released["needed"] and len(released["needed"]) == 1758
    check(checkpoint)
    words = capsys.readouterr().out
    assert "nothing is missing" in words and f"{44 * 10} F8_E4M3 with a scale" in words and "1,758" in words


# ---------------------------------------------------------------------------------------------------------------------
# a transformer alone, with a base


@torch.no_grad()
@pytest.mark.parametrize(
    "prefix, with_config, fp8",
    [
        (DIT, True, False),
        (DIT, False, True),
        ("diffusion_model.", True, True),
        ("transformer.", False, False),
        ("", True, False),
        ("", False, True),
    ],
)
def test_a_transformer_alone_takes_the_rest_from_its_base(prefix, with_config, fp8, forge, tiny_a, tmp_path, golden):
    names = [name for name, _ in layout([LTXVideo.from_checkpoint(tiny_a, device="meta")])]
    stored = in_fp8("official")[0] if fp8 else load_file(tiny_a)
    names += [name for name in stored if name.endswith("_scale")]
    own = {prefix + name.removeprefix(DIT): stored[name] for name in names}
    bias = f"{prefix}proj_out.bias"
    own[bias] = own[bias] + 1  # fine-tuned
    path = tmp_path / "transformer.safetensors"
    config = {"transformer": json.loads(read_metadata(tiny_a)["config"])["transformer"]}
    save_file(own, path, {"config": json.dumps(config)} if with_config else None)
    with pytest.raises(UserError, match=r"transformer alone.*--base"):
        Checkpoint(path)
    checkpoint = Checkpoint(path, base=tiny_a)
    whole = forge(tensors={name: stored[name] for name in names} | {f"{DIT}proj_out.bias": own[bias]})
    got, want = (velocity(LTXVideo.from_checkpoint(source), golden) for source in (checkpoint, whole))
    assert torch.equal(got, want)
    for kind in (VideoVAE, TextConnector):
        want = kind.from_checkpoint(tiny_a).state_dict()
        assert all(torch.equal(t, want[n]) for n, t in kind.from_checkpoint(checkpoint).state_dict().items())
    assert {name for name in checkpoint.tensors if is_audio(name)} == {n for n in load_file(tiny_a) if is_audio(n)}
    del own[bias]  # no tensor of the base's transformer fills the gap
    save_file(own, path)
    with pytest.raises(UserError, match=r"proj_out.bias is missing"):
        LTXVideo.from_checkpoint(Checkpoint(path, base=tiny_a))


def test_a_base_completes_a_transformer_only(tiny_a, tmp_path):
    save_file({"vae.encoder.conv_in.conv.weight": torch.zeros(2)}, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=r"no transformer.*a VAE alone"):
        Checkpoint(tmp_path / "vae.safetensors", base=tiny_a)
    with pytest.raises(UserError, match="no checkpoint at"):
        Checkpoint(tiny_a, base=tmp_path / "none.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# files that cannot be read

QKV = BLOCK + "attn1.to_q.weight"
ROTATED = json.dumps({"format": "int8_tensorwise", "convrot": True})
AS_BYTES = torch.tensor(list(ROTATED.encode()), dtype=torch.uint8)
INT8, NVFP4 = torch.zeros(128, 128, dtype=torch.int8), torch.zeros(128, 64, dtype=torch.uint8)
E4M3 = torch.zeros(128, 128).to(torch.float8_e4m3fn)
MXFP8 = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)


def only(*names, **metadata):
    """A file with tensors of these names and nothing else."""

    def make(forge):
        path = forge()
        save_file({name: torch.zeros(2) for name in names}, path, metadata or None)
        return path

    return make


def raw(change):
    """tiny_a's bytes, changed."""

    def make(forge):
        path = forge()
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def header(change):
    """tiny_a with a changed header and the data as it was."""

    def changed(data):
        (length,) = struct.unpack("<Q", data[:8])
        text = change(json.loads(data[8 : 8 + length]))
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return raw(changed)


def entry(key, value):
    return header(lambda h: h | {QKV: h[QKV] | {key: value}})


def config(text):
    return lambda forge: forge(metadata={"config": text})


WRONG_FILES = {
    "GGUF": (raw(lambda data: b"GGUF" + data), ["a GGUF file", "safetensors"]),
    "pickle in a zip": (raw(lambda data: b"PK\x03\x04" + data), ["pickled", "safetensors"]),
    "pickle": (raw(lambda data: b"\x80\x02" + data), ["pickled", "safetensors"]),
    "LFS pointer": (raw(lambda data: b"version https://git-lfs.github.com/spec/v1\noid"), ["git lfs pull"]),
    "web page": (raw(lambda data: b"<!DOCTYPE html>"), ["web page"]),
    "picture": (raw(lambda data: b"\x89PNG\r\n\x1a\n" + data), ["not a whole safetensors file", "PNG"]),
    "nvfp4": (
        lambda f: f(tensors={QKV: NVFP4, f"{QKV}_scale": E4M3[:, :8].contiguous(), f"{QKV}_scale_2": torch.ones(())}),
        [QKV, "nvfp4", "bf16 or the fp8"],
    ),
    "int8": (lambda f: f(tensors={QKV: INT8, f"{QKV}_scale": torch.ones(())}), [QKV, "int8,", "bf16 or the fp8"]),
    "int8 with rotation": (
        lambda f: f(tensors={QKV: INT8, QKV.replace("weight", "comfy_quant"): AS_BYTES}),
        [QKV, "int8 with rotation", "bf16 or the fp8"],
    ),
    "int8 with rotation, in the metadata": (
        lambda f: f(
            tensors={QKV: INT8},
            metadata={
                "_quantization_metadata": json.dumps({"layers": {QKV[len(DIT) : -7]: json.loads(ROTATED)}}),
            },
        ),
        [QKV, "int8 with rotation"],
    ),
    "mxfp8": (lambda f: f(tensors={QKV: E4M3, QKV.replace("weight", "comfy_quant"): MXFP8}), [QKV, "mxfp8"]),
    "fp8 in tiles": (lambda f: f(tensors={QKV: E4M3, f"{QKV}_scale_inv": torch.ones(1, 1)}), [QKV, "each tile"]),
    "fp8 with half its scales": (
        lambda f: f(tensors={QKV: E4M3, f"{QKV}_scale": torch.ones(64)}),
        [QKV, "scales of shape [64]"],
    ),
    "VAE alone": (only("vae.encoder.conv_in.conv.weight", "vae.decoder.conv_in.conv.weight"), ["a VAE alone"]),
    "VAE alone without prefix": (only("decoder.conv_in.conv.weight", "encoder.conv_in.conv.weight"), ["a VAE alone"]),
    "VAE alone with the config": (
        lambda f: only(
            "vae.encoder.conv_in.conv.weight", model_version="2.3.0", config=read_metadata(TINY_A)["config"]
        )(f),
        ["a VAE alone"],
    ),
    "transformer alone": (
        only(f"{DIT}patchify_proj.weight", f"{DIT}transformer_blocks.0.attn1.to_q.weight"),
        ["a transformer alone", "--base"],
    ),
    "transformer alone with the config": (
        lambda f: only(f"{DIT}patchify_proj.weight", model_version="2.3.0", config=read_metadata(TINY_A)["config"])(f),
        ["a transformer alone", "--base"],
    ),
    "ltx-trainer": (
        only("patchify_proj.weight", "transformer_blocks.0.attn1.to_q.weight", "audio_patchify_proj.weight"),
        ["a transformer alone", "--base"],
    ),
    "diffusers transformer": (only("proj_in.weight", "transformer_blocks.0.attn1.to_q.weight"), ["diffusers"]),
    "diffusers VAE": (only("decoder.mid_block.resnets.0.conv1.conv.weight", "encoder.conv_in.weight"), ["diffusers"]),
    "text projection alone": (only("text_embedding_projection.video_aggregate_embed.weight"), ["text projection"]),
    "audio alone": (only("audio_vae.decoder.conv_in.conv.weight"), ["audio VAE"]),
    "Gemma": (only("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"), ["language model", "--gemma"]),
    "LoRA": (only("diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight"), ["a LoRA", "--lora"]),
    "LoRA of kohya": (only("lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight"), ["a LoRA", "--lora"]),
    "LoRA of old diffusers": (only("transformer_blocks.0.attn1.to_q.lora.down.weight"), ["a LoRA", "--lora"]),
    "differences": (only("diffusion_model.transformer_blocks.0.attn1.to_q.diff"), ["a LoRA", "--lora"]),
    "LTX-2.5": (only("model.diffusion_model.keyframes_abs_pos_embedding"), ["LTX-2.5", "ltx-2.3-22b-dev"]),
    "unrelated": (only("bert.layer.0.weight"), ["unrelated", "bert.layer.0.weight"]),
    "nothing": (lambda f: only()(f), ["unrelated", "nothing"]),
    "cut in the header": (raw(lambda data: data[:2000]), ["not a whole safetensors file", "download it again"]),
    "cut in the data": (raw(lambda data: data[:-1]), ["not a whole safetensors file", "download it again"]),
    "too long": (raw(lambda data: data + b"x"), ["not a whole safetensors file", "download it again"]),
    "header is a list": (header(lambda h: []), ["not a whole safetensors file"]),
    "header is not JSON": (header(lambda h: b'{"a": '), ["header", "JSON"]),
    "header is nested": (header(lambda h: b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), ["header"]),
    "header is not UTF-8": (header(lambda h: b'{"\xff": 1}'), ["header"]),
    "metadata of numbers": (header(lambda h: h | {"__metadata__": {"config": 3}}), ["metadata", "config = 3"]),
    "entry is null": (header(lambda h: h | {QKV: None}), [QKV]),
    "negative shape": (entry("shape", [-128, -128]), [QKV, "shape.0 = -128"]),
    "shape of words": (entry("shape", ["128", 128]), [QKV, "shape.0 = '128'"]),
    "another shape": (entry("shape", [128, 127]), [QKV, "[128, 127]"]),
    "dtype is a number": (entry("dtype", 3), [QKV, "dtype = 3"]),
    "unknown dtype": (entry("dtype", "F4"), [QKV, "stored as F4"]),
    "overlap": (entry("data_offsets", [0, 32768]), ["damaged header", "tensor before it"]),
    "offsets reversed": (entry("data_offsets", [32768, 0]), ["damaged header"]),
    "offsets beyond": (entry("data_offsets", [10**15, 10**15 + 32768]), ["damaged header"]),
    "a third offset": (entry("data_offsets", [0, 1, 2]), [QKV, "data_offsets"]),
    "config is damaged": (config('{"transformer": '), ["lacks the config"]),
    "config is a list": (config("[1]"), ["lacks the config"]),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_file_that_cannot_be_read_is_named(kind, forge):
    make, words = WRONG_FILES[kind]
    path = make(forge)
    with pytest.raises(UserError) as error:
        Checkpoint(path)
    line = str(error.value)
    assert str(path) in line and all(word in line for word in words) and "\n" not in line and len(line) < 700, line
    assert ("download it again" in line) == (kind in ("cut in the header", "cut in the data", "too long"))


SIZES = ["num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "caption_channels"]
SIZES = [f"transformer.{key}" for key in (*SIZES, "connector_num_layers", "connector_num_learnable_registers")]
SIZES += ["vae.patch_size", "vae.latent_channels", "vae.encoder_base_channels", "vae.decoder_base_channels"]


IMPOSSIBLE = [-1, -8, 0, True, 10**9, 2**63, 1.5, float("nan"), float("inf"), "48", None, [], {}]


@pytest.mark.parametrize("key", SIZES)
def test_impossible_sizes_are_refused(key):
    part, leaf = key.split(".")
    for value in IMPOSSIBLE:
        config = json.loads(read_metadata(TINY_A)["config"])
        config[part][leaf] = value
        with pytest.raises(UserError, match=key):
            require_supported(config, "x.safetensors")


@pytest.mark.parametrize("value", [-1, 0, True, 10**9, float("nan")])
def test_an_impossible_size_is_refused_when_the_file_is_opened(value, forge):
    with pytest.raises(UserError, match=r"forged.safetensors: config: transformer.num_layers = "):
        Checkpoint(forge(config={"transformer.num_layers": value}))


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("transformer.in_channels", 5, "differ"),
        ("transformer.attention_head_dim", 33, "multiple of 2"),
        ("transformer.positional_embedding_max_pos", [20, 2048], "positional_embedding_max_pos"),
        ("transformer.positional_embedding_theta", 0, "positional_embedding_theta"),
        ("vae.encoder_blocks", [["compress_all_res", {"multiplier": 16}]] * 9, "vae.encoder_blocks"),
        ("vae.encoder_blocks", [["res_x", {"num_layers": 10**9}]], "num_layers"),
        ("vae.encoder_blocks", [["compress_all", {"multiplier": 2}]], "vae.encoder_blocks"),
        ("vae.decoder_blocks", [["attn", {"num_layers": 1}]], "vae.decoder_blocks"),
        ("vae.decoder_blocks", [["res_x"]], "decoder_blocks"),
        ("vae.decoder_blocks", None, "decoder_blocks"),
        ("vae.in_channels", 4, "vae.in_channels"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(key, value, words, forge):
    with pytest.raises(UserError, match=words):
        Checkpoint(forge(config={key: value}))


@pytest.mark.parametrize(
    "ours, field",
    [
        ([], "nano_st_drc"),
        ({"defaults": []}, "defaults"),
        ({"defaults": {"height": "64"}}, "defaults.height"),
        ({"defaults": {"frames": -1}}, "defaults.frames"),
        ({"defaults": {"fps": 0}}, "defaults.fps"),
        ({"defaults": {"steps": 10**9}}, "defaults.steps"),
        ({"defaults": {"s_text": None}}, "defaults.s_text"),
        ({"placement": 3}, "placement"),
        ({"source_id": 2.5}, "source_id"),
        ({"phase_scale": 1e300}, "phase_scale"),
        ({"fit": 1}, "fit"),
        ({"ref_timestep": True}, "ref_timestep"),
        ({"distilled": {}}, "distilled"),
        ({"training": "long"}, "training"),
        ({"loras": "a.safetensors:1"}, "loras"),
    ],
)
def test_our_entry_is_checked_by_type_and_range(ours, field, forge):
    with pytest.raises(UserError, match=field):
        Checkpoint(forge(metadata={"nano_st_drc": json.dumps(ours)}))


def test_our_entry_keeps_what_is_there_and_nothing_more(forge):
    ours = {"defaults": {"height": 64}, "placement": "phase", "a field of a later version": [1]}
    assert Checkpoint(forge(metadata={"nano_st_drc": json.dumps(ours)})).ours == ours
    assert Checkpoint(TINY_A).ours == {}
    known = Ours.__pydantic_fields__
    assert set(known["fit"].annotation.__args__) == set(FITS)


@pytest.mark.parametrize("where", ["bf16", "fp8", "scale", "vae", "overflow"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_number_that_is_none_is_named(where, value, forge):
    stored, _, _ = in_fp8("official")
    name = BLOCK + "ff.net.2.weight"
    name = {"bf16": f"{DIT}proj_out.bias", "scale": name + "_scale", "vae": "vae.decoder.conv_out.conv.bias"}.get(
        where, name
    )
    if where == "overflow":
        stored[name + "_scale"] = torch.tensor(1e6)  # of finite numbers, beyond float16
    elif where == "fp8":
        stored[name].view(torch.uint8)[1, 2] = 0xFF
    else:
        stored[name].view(-1)[-1:] = value
    checkpoint = Checkpoint(forge(tensors=stored))
    loaders = {
        "plain": lambda: [k.from_checkpoint(checkpoint, dtype=torch.float16) for k in (LTXVideo, VideoVAE)],
        "fp8": lambda: load_fp8(on_meta(checkpoint), checkpoint, "cpu", torch.float32),
    }
    for kind, load in loaders.items():
        if (where, kind) in (("vae", "fp8"), ("overflow", "fp8")):
            continue  # reads no VAE, and no float16
        with pytest.raises(UserError, match=name) as error:
            load()
        assert "NaN or infinity" in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# memory

MEASURE = """
import json, re, sys
import torch
from model import LTXVideo
from text import TextConnector
from vae import VideoVAE

torch.zeros(1).bfloat16().float()

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def read_so_far():
    return int(re.search(r"rchar: (\\d+)", open("/proc/self/io").read())[1])

path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
if fp8 := len(sys.argv) > 3:
    from checkpoint import Checkpoint
    from engine.fp8 import load_fp8

    checkpoint = Checkpoint(path)
    with torch.device("meta"):
        dit = LTXVideo(checkpoint.config["transformer"])
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew here
before, read = status("VmRSS"), read_so_far()
if fp8:
    modules = [load_fp8(dit, checkpoint, "cpu", dtype)]
else:
    modules = [kind.from_checkpoint(path, dtype=dtype) for kind in (LTXVideo, VideoVAE, TextConnector)]
growth, read = status("VmHWM") - before, read_so_far() - read
sizes = [t.numel() * t.element_size() for m in modules for t in m.state_dict().values()]
print(json.dumps({"growth": growth, "read": read, "size": sum(sizes)}))
"""


@pytest.fixture(scope="module")
def quarter_size(released, tmp_path_factory):
    """The released model with every width a quarter and two blocks, beside 300 MB of audio: bytes needed, path."""
    config = json.loads(json.dumps(released["config"]))
    config["transformer"] |= {"num_attention_heads": 8, "connector_num_attention_heads": 8, "caption_channels": 960}
    config["transformer"] |= {"cross_attention_dim": 1024, "num_layers": 2, "in_channels": 32, "out_channels": 32}
    config["vae"] |= {"latent_channels": 32, "encoder_base_channels": 32, "decoder_base_channels": 32}
    needed = dict(layout(build(config)))
    shapes = {"model.diffusion_model.audio_adaln_single.linear.weight": [150_000_000]} | needed
    metadata = {"config": json.dumps(config), "model_version": "2.3.0"}
    path = write_sparse(tmp_path_factory.mktemp("quarter") / "quarter.safetensors", shapes, metadata)
    return path, 2 * sum(torch.Size(shape).numel() for shape in needed.values())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_the_tensors_own_size_and_little_more(quarter_size, root, dtype):
    """The text projection, 1.5 GB at full size, may not lie there twice; the file may not count as memory either.

    Not ru_maxrss: a child starts with its parent's. The margin is the 1 GB of the full model by ratio: areas are a
    sixteenth, so 64 MB.
    """
    path, needed = quarter_size
    command = [sys.executable, "-c", MEASURE, path, dtype]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    print(dtype, measured)
    assert measured["size"] == needed * (1 if dtype == "bfloat16" else 2)
    assert measured["growth"] > 0.9 * measured["size"]  # the measurement sees what is there
    assert measured["growth"] < measured["size"] + 64 * 2**20
    assert needed <= measured["read"] < needed + 8 * 2**20  # three headers, nothing of the audio


@pytest.fixture(scope="module", params=["fp8", "bf16"])
def sixteen_blocks(request, released, tmp_path_factory):
    """A DiT of 270 M weights in 16 blocks: all matrices in fp8 with a scale each, but those of block 0; or in bf16."""
    config = json.loads(json.dumps(released["config"]))
    config["transformer"] |= {"num_attention_heads": 8, "num_layers": 16, "in_channels": 32, "out_channels": 32}
    config["vae"] |= {"latent_channels": 32}
    with torch.device("meta"):
        dit = LTXVideo(config["transformer"])
    shapes, dtypes = dict(layout([dit])), {}
    for name, shape in list(shapes.items()):
        matrix = ".transformer_blocks." in name and name.endswith(".weight") and len(shape) == 2
        if request.param == "fp8" and matrix and ".transformer_blocks.0." not in name:
            dtypes |= {name: "F8_E4M3", f"{name}_scale": "F32"}
            shapes[f"{name}_scale"] = []
    shapes["vae.decoder.conv_in.conv.bias"] = [8]
    metadata = {"config": json.dumps(config), "model_version": "2.3.0"}
    return write_sparse(tmp_path_factory.mktemp("sixteen") / f"{request.param}.safetensors", shapes, metadata, dtypes)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_model_in_fp8_is_never_in_memory_in_bf16(sixteen_blocks, root):
    command = [sys.executable, "-c", MEASURE, sixteen_blocks, "bfloat16", "fp8"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    print(sixteen_blocks.stem, measured)
    assert 270e6 < measured["size"] < 320e6  # block 0 in bf16 is 34 MB
    assert 0.9 * measured["size"] < measured["growth"] < measured["size"] + 64 * 2**20
    assert measured["read"] < sixteen_blocks.stat().st_size + 8 * 2**20


# ---------------------------------------------------------------------------------------------------------------------
# reading and writing files


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path, tiny_a):
    path, tensors = tmp_path / "dtypes.safetensors", {}
    for name, dtype in DTYPES.items():
        bits = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 4), generator=torch.Generator().manual_seed(0))
        tensors[name] = bits.to(dtype)
    tensors |= {"scalar": torch.tensor(3.5), "nothing": torch.zeros(0, 4)}
    save_file(tensors, path, read_metadata(tiny_a))
    checkpoint = Checkpoint(path)
    for name, want in load_file(path).items():
        got = checkpoint.read(name)
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(got.view(torch.uint8) if got.dim() else got, want.view(torch.uint8) if want.dim() else want)
    assert checkpoint.read("BF16", dtype=torch.float64).dtype == torch.float64
    assert checkpoint.read("I32", dtype=torch.float64).dtype == torch.int32  # whole numbers stay so


def test_modules_come_back_as_they_were_written(tiny_a, tmp_path):
    config = json.loads(read_metadata(tiny_a)["config"])
    written = [kind.from_checkpoint(tiny_a) for kind in MODULES]
    path = tmp_path / "again.safetensors"
    write_modules(path, written, config, {"defaults": {"steps": 3}}, dtype=torch.float32)
    checkpoint = Checkpoint(path)
    assert checkpoint.config == config and checkpoint.ours == {"defaults": {"steps": 3}}
    for kind, module in zip(MODULES, written):
        again = kind.from_checkpoint(path).state_dict()
        assert again.keys() == module.state_dict().keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in module.state_dict().items())
    write_modules(path, written, config, {})  # bf16, over the file that is there
    stored = load_file(tiny_a)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in load_file(path).items())


@pytest.mark.parametrize("seed", range(5))
def test_written_bytes_are_read_by_the_library(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors, entries = {}, []
    for k, dtype in enumerate(["BF16", "F32", "F16", "I64", "U8", "F64"] * 2):
        shape = torch.randint(0 if k else 1, 6, (k % 4,), generator=generator).tolist()
        tensor = torch.randint(0, 200, shape, generator=generator).to(DTYPES[dtype])
        name = f"part.{k}.gewicht-ü"
        tensors[name] = tensor
        fetch = (lambda t=tensor: t) if k % 2 else (lambda t=tensor: bytes(t.reshape(-1).view(torch.uint8).tolist()))
        entries.append((name, dtype, shape, fetch))
    strided = torch.randn(4, 6, generator=generator)
    entries.append(("strided", "F32", [6, 4], lambda: strided.T))
    path = tmp_path / "written.safetensors"
    write(path, entries, {"told": "ja, ü"})
    read = load_file(path)
    assert read.keys() == tensors.keys() | {"strided"} and read_metadata(path) == {"told": "ja, ü"}
    assert torch.equal(read.pop("strided"), strided.T)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_a_write_that_fails_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"

    def fail():
        raise RuntimeError("power cut")

    for before in (None, b"the old file"):
        if before:
            path.write_bytes(before)
        with pytest.raises(RuntimeError, match="power cut"):
            write(path, [("a", "F32", [2], lambda: torch.ones(2)), ("b", "F32", [2], fail)], {})
        assert [p.name for p in tmp_path.iterdir()] == ([path.name] if before else [])
        assert before is None or path.read_bytes() == before


def test_a_tensor_of_another_shape_is_not_written(tmp_path):
    with pytest.raises(AssertionError, match="a"):
        write(tmp_path / "x", [("a", "F32", [2], lambda: torch.ones(3))], {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_after_opening_is_a_user_error(forge):
    path = forge()
    checkpoint = Checkpoint(path)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 3)
    with pytest.raises(UserError, match="ends inside the tensor"):
        for name in checkpoint.tensors:
            checkpoint.read(name)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_headers_never_end_in_a_traceback(tiny_a, tmp_path, seed):
    """Random bytes of the length and the header changed, or the file cut: a UserError, or it still fits."""
    generator = torch.Generator().manual_seed(seed)
    data = bytearray(tiny_a.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for place in torch.randint(0, header, (3,), generator=generator).tolist():
        data[place] = int(torch.randint(32, 127, (), generator=generator))
    if seed % 4 == 0:
        data = data[: int(torch.randint(len(data), (), generator=generator))]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        for kind in MODULES:
            kind.from_checkpoint(path, device="meta")


def test_file_name_takes_the_module_with_the_prefix():
    assert file_name("connector.a.weight", TextConnector.PREFIXES).startswith("model.diffusion_model.video_embeddings")
    assert (
        file_name("projection.bias", TextConnector.PREFIXES) == "text_embedding_projection.video_aggregate_embed.bias"
    )
    assert file_name("proj_out.bias", LTXVideo.PREFIXES) == "model.diffusion_model.proj_out.bias"

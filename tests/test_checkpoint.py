"""checkpoint.py: the released layout name by name, loading without a second copy, writing whole or not at all."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import is_audio, read_metadata, write_sparse
from safetensors.torch import load_file, save_file

from checkpoint import DTYPES, Checkpoint, file_name, write, write_modules
from common.errors import UserError
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
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew here
before, read = status("VmRSS"), read_so_far()
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

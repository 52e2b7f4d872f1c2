"""What several test files need: the golden vectors, the tiny modules, and checkpoints made to order."""

import common  # isort: skip  # noqa: F401 (before torch: sets the wait policy of its threads)

import atexit
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import warnings
import weakref
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network; read when transformers is first imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ST_DRC_TRACEBACK"] = "1"  # an unexpected exception keeps its traceback in a test
torch.set_num_threads(2)

# Property tests: no deadline, because machines are slow, and the same examples in every run.
# --hypothesis-profile=search draws new ones.
PATIENT = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, **PATIENT)
hypothesis.settings.register_profile("search", max_examples=1000, print_blob=True, **PATIENT)
hypothesis.settings.load_profile("fixed")

ROOT = Path(__file__).resolve().parent.parent
TINY_A = ROOT / "tests" / "data" / "tiny_a.safetensors"
TINY = ROOT / "assets" / "tiny.safetensors"
AUDIO = ("audio_", "av_ca_", "video_to_audio_", "scale_shift_table_a2v_", "vocoder.")


@cache
def shallow_checkpoint() -> Path:
    """assets/tiny.safetensors with the first two blocks of its DiT alone: a quarter of the time where a test trains."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with safe_open(TINY, "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    config["transformer"]["num_layers"] = 2
    ours = json.loads(metadata["nano_st_drc"]) | {"gemma": "embedded"}
    block = re.compile(r"model\.diffusion_model\.transformer_blocks\.(\d+)\.")
    tensors = {
        name: tensor
        for name, tensor in load_file(TINY).items()
        if not (match := block.match(name)) or int(match[1]) < 2
    }
    save_file(tensors, folder / TINY.name, metadata | {"config": json.dumps(config), "nano_st_drc": json.dumps(ours)})
    return folder / TINY.name


@pytest.fixture
def in_process(monkeypatch, capsys):
    """in_process(main, "sample.py", "--ref", ...) -> (exit code, stdout, stderr) of that command, in this process."""
    from common.errors import one_line_errors

    def run(main, program, *options):
        monkeypatch.setattr(sys, "argv", [program, *map(str, options)])
        code = 0
        try:
            with one_line_errors():
                main()
        except SystemExit as left:
            code = left.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def insightface_embeddings():
    """insightface_embeddings(frames) -> raw embeddings of the largest face of each frame, None without a face.

    By insightface, OpenCV and onnxruntime alone, with the models of assets/faces; frames (n, H, W, 3) RGB bytes.
    """
    import numpy as np
    from insightface.app import FaceAnalysis

    folder, parts = str(ROOT / "assets" / "faces"), ["detection", "recognition"]
    app = FaceAnalysis(name=folder, allowed_modules=parts, providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=-1, det_size=(128, 128))

    def embed(frames):
        rows = []
        for frame in frames:
            with warnings.catch_warnings():  # insightface calls a method that skimage deprecates
                warnings.simplefilter("ignore")
                faces = app.get(np.ascontiguousarray(frame[..., ::-1]))
            areas = [np.prod(face.bbox[2:] - face.bbox[:2]) for face in faces]
            rows.append(faces[int(np.argmax(areas))].embedding if faces else None)
        return rows

    return embed


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def tiny_a():
    """Path of the random checkpoint that the golden vectors were computed with."""
    return TINY_A


@pytest.fixture(scope="session")
def golden():
    return load_file(ROOT / "tests" / "data" / "tiny_a.golden.safetensors")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Path of a random checkpoint in the released layout, of other sizes than assets/: cells of 4 frames of 8 x 8."""
    from checkpoint import write_modules
    from model import LTXVideo
    from text import TextConnector
    from vae import VideoVAE

    encoder = [
        ["res_x", {"num_layers": 1}],
        ["compress_space_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 1}],
        ["compress_time_res", {"multiplier": 1}],
        ["compress_time_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 1}],
    ]
    config = json.loads((ROOT / "configs" / "ltx-2.3.json").read_text())
    config["transformer"] |= {
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "num_layers": 4,
        "in_channels": 16,
        "out_channels": 16,
        "cross_attention_dim": 128,
        "caption_channels": 64,
        "positional_embedding_max_pos": [4, 128, 128],
        "connector_num_attention_heads": 4,
        "connector_attention_head_dim": 32,
        "connector_num_layers": 2,
        "connector_positional_embedding_max_pos": [256],
        "connector_num_learnable_registers": 16,
    }
    config["vae"] |= {
        "latent_channels": 16,
        "encoder_base_channels": 16,
        "decoder_base_channels": 16,
        "encoder_blocks": encoder,
        "decoder_blocks": [[kind.removesuffix("_res"), options] for kind, options in encoder],
    }
    before = torch.get_rng_state()
    torch.manual_seed(0)
    dit, connector = LTXVideo(config["transformer"]), TextConnector(config["transformer"], 5)
    modules = [dit, connector, VideoVAE(config["vae"])]
    for module in modules:
        for name, parameter in module.named_parameters():
            if name.endswith(("scale_shift_table", "learnable_registers")):
                torch.nn.init.normal_(parameter, std=0.5)
    torch.set_rng_state(before)
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    defaults = {"height": 64, "width": 64, "frames": 17, "fps": 12.0, "steps": 30}
    write_modules(path, modules, config, {"weights": "random", "defaults": defaults})
    return path


@pytest.fixture(scope="session")
def released():
    """The released model: its `config`, and the shapes of the `needed` and `ignored` tensors by name."""
    layout = json.loads((ROOT / "tests" / "data" / "ltx-2.3-tensors.json").read_text())
    return layout | {"config": json.loads((ROOT / "configs" / "ltx-2.3.json").read_text())}


@pytest.fixture(scope="session")
def model(tiny_a):
    from model import LTXVideo

    return LTXVideo.from_checkpoint(tiny_a).requires_grad_(False)


@pytest.fixture(scope="session")
def vae(tiny_a):
    from vae import VideoVAE

    return VideoVAE.from_checkpoint(tiny_a).requires_grad_(False)


@pytest.fixture(scope="session")
def connector(tiny_a):
    from text import TextConnector

    return TextConnector.from_checkpoint(tiny_a).requires_grad_(False)


def is_audio(name):
    """Whether a tensor of the released file belongs to the audio branch."""
    return any(sign in name for sign in AUDIO)


def read_metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def forge(tmp_path):
    """forge(tensors={name: tensor or None}, config={"part.key": value}, metadata={...}) -> an altered tiny_a's path."""

    def make(tensors=None, config=None, metadata=None):
        all_tensors = load_file(TINY_A) | (tensors or {})
        entries = read_metadata(TINY_A)
        parts = json.loads(entries["config"])
        for key, value in (config or {}).items():
            part, key = key.split(".")
            parts[part][key] = value
        entries |= {"config": json.dumps(parts)} | (metadata or {})
        path = tmp_path / "forged.safetensors"
        kept = {name: tensor for name, tensor in all_tensors.items() if tensor is not None}
        save_file(kept, path, {key: value for key, value in entries.items() if value is not None})
        return path

    return make


def write_sparse(path, shapes, metadata, dtypes=None):
    """A safetensors file of zeros with a true header and true length, whose data takes no disk; bf16 if `dtypes` of a
    tensor says nothing else."""
    header, end = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        dtype = (dtypes or {}).get(name, "BF16")
        start, end = end, end + {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.fixture(scope="session")
def released_file(released, tmp_path_factory):
    """The whole released layout, 46 GB long, on no disk."""
    path = tmp_path_factory.mktemp("released") / "ltx-2.3.safetensors"
    metadata = {"config": json.dumps(released["config"]), "model_version": "2.3.0"}
    return write_sparse(path, released["needed"] | released["ignored"], metadata)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and somebody still holds: `now`, and the `peak` so far.

    It works on the meta device too, where nothing is computed.
    """

    def __init__(self, *before):
        """`before` are tensors that are there already and count."""
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()
        self.count(before)

    def count(self, tensors):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count(out)
        return out

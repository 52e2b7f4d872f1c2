"""One LTX-2.3 checkpoint: a safetensors file with the model's config in its metadata.

The released file holds the transformer (video and audio), the video VAE, the text projection, an audio VAE and a
vocoder, about 46 GB in bf16. This project needs the 1,758 tensors of the video branch. They are read one at a time,
straight to the device and dtype asked for, into modules that were built on the meta device; so loading takes the
tensors' own size and no more, and nothing of the audio branch is touched.

        8 bytes | JSON header: {"__metadata__": {"config": ...}, name: {dtype, shape, data_offsets}, ...} | data
        length  |

Files are read with plain reads rather than mapped: a map would count the whole file as resident memory.
"""

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import UserError, whole_file

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

PIECE = 4 * 2**20  # elements that are converted at a time

OUR_METADATA = "nano_st_drc"  # what only this project needs to know, as JSON, beside the model's own config

# What the code here takes for granted. Another value means another model, which would load and sample wrongly.
SUPPORTED = {
    "transformer": {
        "_class_name": "AVTransformer3DModel",
        "activation_fn": "gelu-approximate",
        "apply_gated_attention": True,
        "attention_bias": True,
        "caption_proj_before_connector": True,
        "causal_temporal_positioning": True,
        "connector_apply_gated_attention": True,
        "cross_attention_adaln": True,
        "frequencies_precision": "float64",
        "norm_elementwise_affine": False,
        "positional_embedding_type": "rope",
        "qk_norm": "rms_norm",
        "rope_type": "split",
        "text_encoder_norm_type": "per_token_rms",
        "timestep_scale_multiplier": 1000,
        "use_middle_indices_grid": True,
    },
    "vae": {
        "_class_name": "CausalVideoAutoencoder",
        "causal_decoder": False,
        "dims": 3,
        "latent_log_var": "uniform",
        "norm_layer": "pixel_norm",
        "spatial_padding_mode": "zeros",
        "timestep_conditioning": False,
    },
}


class Checkpoint:
    """An open LTX-2.3 checkpoint: `config`, `metadata`, `ours` (this project's own entry) and tensors by name."""

    def __init__(self, path: str | Path):
        """Read and check the header. Raises UserError if the file is missing, damaged, or not LTX-2.3."""
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"no checkpoint at {path}: give --ckpt the path of ltx-2.3-22b-dev.safetensors")
        try:
            with safe_open(self.path, framework="numpy"):  # the library checks that header and length agree
                pass
        except (SafetensorError, ValueError) as error:
            raise UserError(
                f"{path} is not a whole safetensors file ({error}): compare its size with the download page's "
                "and download it again"
            ) from None
        with open(self.path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        self.data_start = 8 + length
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.tensors: dict[str, dict[str, Any]] = header
        config = json_object(self.metadata.get("config"), self.path)
        self.config: dict[str, Any] = Config({part: value for part, value in config.items() if isinstance(value, dict)})
        self.ours: dict[str, Any] = json_object(self.metadata.get(OUR_METADATA), self.path)
        _require_ltx23(self)

    def read_bytes(self, name: str) -> bytearray:
        """One tensor's bytes as they are in the file."""
        start, end = self.tensors[name]["data_offsets"]
        data = bytearray(end - start)
        self._fill(name, 0, data)
        return data

    def _fill(self, name: str, offset: int, data: bytearray) -> None:
        """The tensor's bytes from `offset` on, as many as `data` takes."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.data_start + self.tensors[name]["data_offsets"][0] + offset)
            view, filled = memoryview(data), 0
            while filled < len(data):  # one read returns at most 2 GiB
                count = file.readinto(view[filled:])
                if not count:
                    raise UserError(f"{self.path} ends inside the tensor {name}: download it again")
                filled += count

    def read(self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on `device`; floating-point ones in `dtype` if given. Converted piece by piece, so that its
        stored form never lies whole beside it."""
        entry = self.tensors[name]
        stored = DTYPES[entry["dtype"]]
        wanted = dtype if dtype and stored.is_floating_point else stored
        tensor = torch.empty(entry["shape"], dtype=wanted, device=device)
        offset = 0
        for piece in tensor.view(-1).split(PIECE) if tensor.numel() else ():
            data = bytearray(piece.numel() * stored.itemsize)
            self._fill(name, offset, data)
            piece.copy_(torch.frombuffer(data, dtype=stored))
            offset += len(data)
        return tensor

    def load(
        self,
        module: nn.Module,
        prefixes: dict[str, str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> nn.Module:
        """Give every tensor of a module built on the meta device its value from the file.

        `prefixes` maps the beginning of the module's names to the beginning of the file's. With device "meta" names
        and shapes are checked and no data is read. Raises UserError that names the first missing or misfitting tensor.
        """
        for name, slot in module.state_dict().items():
            source = file_name(name, prefixes)
            problem = self.misfit(source, slot)
            if problem:
                raise UserError(f"{self.path}: {problem}; it does not fit its own config, download it again")
            if torch.device(device).type != "meta":
                _assign(module, name, self.read(source, device, dtype))
        return module.eval()

    def misfit(self, name: str, slot: Tensor) -> str | None:
        """Why the file's tensor `name` cannot fill `slot`, or None if it can."""
        entry = self.tensors.get(name)
        if entry is None:
            return f"tensor {name} is missing"
        if entry["shape"] != list(slot.shape):
            return f"tensor {name} has shape {entry['shape']} where its config says {list(slot.shape)}"
        if entry["dtype"].startswith("F8"):
            return f"tensor {name} is stored in fp8 with scales of its own, which is not read here: take the bf16 file"
        if entry["dtype"] not in ("BF16", "F16", "F32", "F64"):
            return f"tensor {name} is stored as {entry['dtype']}, quantized, which is not read here: take the bf16 file"
        return None


def open_checkpoint(source: "str | Path | Checkpoint") -> Checkpoint:
    """`source` itself where it is an open checkpoint, so that a run parses a header once; else the file, opened."""
    return source if isinstance(source, Checkpoint) else Checkpoint(source)


def distilled_sign(path: str | Path, metadata: dict[str, str]) -> str | None:
    """What says that a checkpoint or LoRA is distilled to few steps without guidance; None if nothing does.

    No tensor tells: a distilled model has the names and shapes of the full one.
    """
    if "distilled" in Path(path).name.lower():
        return "its file name"
    for key in ("model_version", "modelspec.title", "modelspec.architecture"):
        if "distilled" in metadata.get(key, "").lower():
            return f"{key} in its metadata"
    return json_object(metadata.get(OUR_METADATA), Path(path)).get("distilled")


def file_name(name: str, prefixes: dict[str, str]) -> str:
    """A module's tensor name as the checkpoint writes it."""
    ours, theirs = next(pair for pair in prefixes.items() if name.startswith(pair[0]))
    return theirs + name.removeprefix(ours)


def write(
    path: str | Path, tensors: list[tuple[str, str, list[int], Callable[[], Tensor | bytearray]]], metadata: dict
) -> None:
    """Write a safetensors file tensor by tensor: (name, dtype as the format writes it, shape, what to call for it).

    Only one tensor is held at a time, so a 46 GB file needs no 46 GB of memory. The file appears when complete.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape, _ in tensors:
        start, end = end, end + torch.Size(shape).numel() * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data starts on a multiple of 8
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, shape, fetch in tensors:
            data = fetch()
            if isinstance(data, Tensor):
                assert list(data.shape) == list(shape), f"{name}: {list(data.shape)} for {list(shape)}"
                data = data.detach().to("cpu", DTYPES[dtype]).contiguous().flatten().view(torch.uint8).numpy()
            file.write(data)


def write_modules(
    path: str | Path, modules: Iterable[nn.Module], config: dict, ours: dict, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write modules as a checkpoint in the released layout; each module's `PREFIXES` says where its tensors go."""
    entries = []
    for module in modules:
        for name, tensor in module.state_dict().items():
            entries.append(
                (file_name(name, module.PREFIXES), NAMES[dtype], list(tensor.shape), lambda tensor=tensor: tensor)
            )
    metadata = {"config": json.dumps(config), "model_version": "2.3.0", OUR_METADATA: json.dumps(ours)}
    write(path, entries, metadata)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` in the place of a module's parameter or buffer, keeping which of the two it is."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=owner._parameters[leaf].requires_grad)
    else:
        owner._buffers[leaf] = tensor


class Config(dict):
    """A JSON object of the metadata of `path`. What the code needs and the file does not say is the file's fault."""

    path: Path

    def __missing__(self, key: str) -> NoReturn:
        raise UserError(
            f"{self.path} says nothing of {key!r} in its config: it is another model than the released LTX-2.3"
        )


def json_object(text: str | None, path: Path) -> dict[str, Any]:
    def with_path(value: dict) -> Config:
        config = Config(value)
        config.path = path
        return config

    try:
        value = json.loads(text or "{}", object_hook=with_path)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _require_ltx23(checkpoint: Checkpoint) -> None:
    """Raise UserError that says what the file looks like, unless it is the LTX-2.3 that the code here knows."""
    version = checkpoint.metadata.get("model_version", "")
    likeness = _looks_like(checkpoint, version)
    if likeness != "LTX-2.3":
        raise UserError(
            f"{checkpoint.path} is not an LTX-2.3 checkpoint: it looks like {likeness}. "
            "This code needs ltx-2.3-22b-dev.safetensors from https://huggingface.co/Lightricks/LTX-2.3"
        )
    for part, supported in SUPPORTED.items():
        for key, value in supported.items():
            found = checkpoint.config.get(part, {}).get(key)
            if found != value:
                raise UserError(
                    f"{checkpoint.path} says {part}.{key} = {found!r}, and this code is written for {value!r}: "
                    "it is another model than the released LTX-2.3"
                )


def _looks_like(checkpoint: Checkpoint, version: str) -> str:
    """A name for what a safetensors file seems to hold, with the sign that told."""
    names = checkpoint.tensors
    transformer = checkpoint.config.get("transformer", {})
    if any(".lora_" in name for name in names):
        return "a LoRA (its tensors are named .lora_A/.lora_B): give the model it was trained on"
    if version.startswith("2.3") and transformer:
        return "LTX-2.3"
    if version and transformer:
        family = ".".join(version.split(".")[:2])
        reason = "" if transformer.get("cross_attention_adaln") else ", without modulated text attention"
        return f"LTX-{family} (model_version {version}{reason})"
    if transformer.get("_class_name") == "AVTransformer3DModel":
        if transformer.get("cross_attention_adaln"):
            return "an LTX-2 audio-video model of unknown version (its metadata has no model_version)"
        return "LTX-2.0 (its config has no modulated text attention, cross_attention_adaln)"
    if transformer:
        return f"LTX-Video 0.9 or another relative (transformer class {transformer.get('_class_name')})"
    if any(name.startswith("model.diffusion_model.") for name in names):
        return "an LTX-like model whose metadata lacks the config (some trainers and converters drop it)"
    if any(name.startswith("transformer_blocks.") for name in names):
        return "one part of a diffusers folder: give the single file instead"
    first = next(iter(names), "nothing")
    return f"something unrelated ({len(names)} tensors, the first is {first}, and no config in the metadata)"

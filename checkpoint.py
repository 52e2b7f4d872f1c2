"""One LTX-2.3 checkpoint: a safetensors file with the model's config in its metadata.

The released file holds the transformer (video and audio), the video VAE, the text projection, an audio VAE and a
vocoder, about 46 GB in bf16. This project needs the 1,758 tensors of the video branch. They are read one at a time,
straight to the device and dtype of a module that was built on the meta device. Loading therefore takes the memory of
the loaded tensors and no more, and nothing of the audio branch is read.

A weight may be stored in fp8, as q (out, in) with a scale in a tensor beside it; its value is w = q * scale:

        X.weight_scale   in the released fp8 files and those of ComfyUI: one number, or one for each row
        X.scale_weight   in older files of ComfyUI
        none             a plain cast: scale 1

A transformer alone is read together with a base, a second file that supplies the rest: the other tensors, and the
config where the first file has none.
Files are read with plain reads rather than mapped: a map would count the whole file as resident memory.
"""

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError, whole_file
from common.ltx_file import (
    DTYPES,
    OUR_METADATA,
    kind,
    read_config,
    read_formats,
    read_header,
    read_ours,
    require_supported,
)
from common.schema import parse_json

NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("BF16", "F16", "F32", "F64")
FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # the same format in ComfyUI's words
LARGEST_BITS = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}  # of a finite number, without the sign

PIECE = 4 * 2**20  # elements that are converted at a time

DIT = "model.diffusion_model."
DIT_PREFIXES = (DIT, "diffusion_model.", "transformer.", "model.", "")  # of a transformer alone
AUDIO = ("audio_", "av_ca_", "video_to_audio_", "scale_shift_table_a2v_")  # signs of the audio branch in a name


class Checkpoint:
    """An open LTX-2.3 checkpoint: `config`, `metadata`, `ours` (this project's own entry) and `tensors` by name."""

    def __init__(self, path: str | Path, base: str | Path | None = None):
        """Read and check the headers. UserError if a file is missing, damaged, or not LTX-2.3.

        `base` is the file with everything that `path` lacks where `path` holds a transformer alone.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"no checkpoint at {path}: give --ckpt the path of ltx-2.3-22b-dev.safetensors")
        self.metadata, self.tensors, start = read_header(self.path)
        self.config, self.ours = read_config(self.metadata, path), read_ours(self.metadata, path)
        self.layer_formats = read_formats(self.metadata, path)
        # where a tensor's first byte is: file, offset
        self.places = {name: (self.path, start + entry["data_offsets"][0]) for name, entry in self.tensors.items()}
        if base is not None:
            self._add_base(Checkpoint(base))
        other = kind(self.tensors, self.config, self.metadata.get("model_version", ""))
        if other:
            what, instead = other
            raise UserError(f"{path} is not an LTX-2.3 checkpoint: it looks like {what}: {instead}")
        require_supported(self.config, path)
        for name in self.tensors:
            needed = name.endswith(".weight") and not any(sign in name for sign in AUDIO)
            if needed and (problem := self.unreadable(name)):
                raise UserError(f"{path}: {problem}")

    def _add_base(self, base: "Checkpoint") -> None:
        """Take everything but the transformer of the video branch from `base`."""
        prefix = next((p for p in DIT_PREFIXES if f"{p}patchify_proj.weight" in self.tensors), None)
        if prefix is None:
            what, _ = kind(self.tensors, {}, "")
            raise UserError(f"{self.path} holds no transformer to complete from --base: it looks like {what}")
        own = {f"{DIT}{name.removeprefix(prefix)}" if name.startswith(prefix) else name: name for name in self.tensors}
        rest = [
            name
            for name in base.tensors
            if not name.startswith(DIT) or "connector." in name or any(sign in name for sign in AUDIO)
        ]
        self.tensors = {name: base.tensors[name] for name in rest} | {n: self.tensors[o] for n, o in own.items()}
        self.places = {name: base.places[name] for name in rest} | {n: self.places[o] for n, o in own.items()}
        self.config, self.ours = base.config | self.config, base.ours | self.ours
        self.metadata = base.metadata | self.metadata
        self.layer_formats = base.layer_formats | self.layer_formats

    # ---- what is stored how

    def scale_name(self, name: str) -> str | None:
        """The tensor with the scale of an fp8 weight; None for other tensors and for a plain cast."""
        if self.tensors[name]["dtype"] not in FP8 or not name.endswith(".weight"):
            return None
        layer = name.removesuffix("weight")
        return next((n for n in (f"{layer}weight_scale", f"{layer}scale_weight") if n in self.tensors), None)

    def unreadable(self, name: str) -> str | None:
        """Why the stored form of a tensor cannot be read, or None if it can."""
        dtype, rows = self.tensors[name]["dtype"], self.tensors[name]["shape"][:1]
        options, scale = self._quantization(name.removesuffix(".weight")), self.scale_name(name)
        scale_shape = self.tensors[scale]["shape"] if scale else []
        forms = (
            (f"{name}_scale_2" in self.tensors, "nvfp4, two numbers a byte"),
            (dtype == "I8" and "convrot" in options, "int8 with rotation"),
            (dtype == "I8", "int8"),
            (dtype not in FP8 and dtype not in FLOATS, dtype),
            (dtype in FP8 and options.get("format", FP8[dtype]) != FP8[dtype], str(options.get("format"))),
            (f"{name}_scale_inv" in self.tensors, f"{dtype} with a scale for each tile"),
            (scale and self.tensors[scale]["dtype"] not in FLOATS, f"{dtype} with scales in another format"),
            (scale_shape not in ([], [1], [1, 1], rows, [*rows, 1]), f"{dtype} with scales of shape {scale_shape}"),
        )
        form = next((form for holds, form in forms if holds), None)
        return form and f"tensor {name} is stored as {form}, which is not read here: take the bf16 or the fp8 file"

    def _quantization(self, layer: str) -> dict[str, Any]:
        """ComfyUI's note about the format of a layer: a tensor of JSON beside it, or an entry in the metadata."""
        name = f"{layer}.comfy_quant"
        if name in self.tensors:
            return parse_json(dict[str, Any], bytes(self.read_bytes(name)), f"{self.path}: {name}")
        return self.layer_formats.get(layer) or self.layer_formats.get(layer.removeprefix(DIT), {})

    def misfit(self, name: str, slot: Tensor) -> str | None:
        """Why the file's tensor `name` cannot fill `slot`, or None if it can."""
        if name not in self.tensors:
            return f"tensor {name} is missing"
        if problem := self.unreadable(name):
            return problem
        shape = self.tensors[name]["shape"]
        if shape != list(slot.shape):
            return f"tensor {name} has shape {shape} where the config says {list(slot.shape)}"
        return None

    # ---- reading

    def read_bytes(self, name: str) -> bytearray:
        """The bytes of one tensor as they are in the file."""
        start, end = self.tensors[name]["data_offsets"]
        data = bytearray(end - start)
        self._fill(name, 0, data)
        return data

    def _fill(self, name: str, offset: int, data: bytearray) -> None:
        """Fill `data` with the tensor's bytes from `offset` on."""
        path, start = self.places[name]
        with open(path, "rb", buffering=0) as file:
            file.seek(start + offset)
            view, filled = memoryview(data), 0
            while filled < len(data):  # one read returns at most 2 GiB
                count = file.readinto(view[filled:])
                if not count:
                    raise UserError(f"{path} ends inside the tensor {name}: download it again")
                filled += count

    def read(self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on `device`. Floating-point tensors are converted to `dtype`, an fp8 weight times its scale;
        without `dtype` every tensor comes as it is stored.

        The conversion goes piece by piece, so that the stored form is never in memory as a whole beside the result.
        UserError if a number is NaN or infinite, in the file or after the conversion.
        """
        entry = self.tensors[name]
        stored = DTYPES[entry["dtype"]]
        target = dtype if dtype and stored.is_floating_point else stored
        tensor = torch.empty(entry["shape"], dtype=target, device=device)
        offset = 0
        for piece in tensor.view(-1).split(PIECE) if tensor.numel() else ():
            data = bytearray(piece.numel() * stored.itemsize)
            self._fill(name, offset, data)
            piece.copy_(torch.frombuffer(data, dtype=stored).to(device))
            offset += len(data)
            self._require_finite(name, piece)
        if dtype and self.scale_name(name):
            scale = self.scale(name, device).expand(len(tensor), 1)
            count = max(1, PIECE // max(1, tensor[0].numel()))  # rows at a time
            for rows, factors in zip(tensor.split(count), scale.split(count)):
                self._require_finite(name, rows.mul_(factors))  # computed in float32, rounded once to `dtype`
        return tensor

    def scale(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """The scale of an fp8 weight in float32, (1, 1) or (out, 1); ones for a plain cast."""
        scale = self.scale_name(name)
        return self.read(scale, device, torch.float32).view(-1, 1) if scale else torch.ones(1, 1, device=device)

    def _require_finite(self, name: str, numbers: Tensor) -> None:
        """Look at the least and the largest number: one pass, less time than the reading; NaN is both."""
        if numbers.dtype in LARGEST_BITS:
            finite = (numbers.view(torch.uint8) & 0x7F).amax() <= LARGEST_BITS[numbers.dtype]
        elif numbers.is_floating_point():
            finite = torch.stack(torch.aminmax(numbers)).isfinite().all()
        else:
            return
        if not finite:
            raise UserError(f"{self.path}: the tensor {name} holds NaN or infinity: the file is of no use")

    def load(
        self,
        module: nn.Module,
        prefixes: dict[str, str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> nn.Module:
        """Read every tensor of a module that is on the meta device from the file.

        `prefixes` maps the beginning of the module's names to the beginning of the file's. With device "meta" names
        and shapes are checked and no data is read. UserError with the first tensor that is missing or does not fit.
        """
        for name, slot in module.state_dict().items():
            if not slot.is_meta:  # filled before, by load_fp8
                continue
            source = file_name(name, prefixes)
            if problem := self.misfit(source, slot):
                raise UserError(f"{self.path}: {problem}")
            if torch.device(device).type != "meta":
                _assign(module, name, self.read(source, device, dtype))
        return module.eval()


def open_checkpoint(source: "str | Path | Checkpoint") -> Checkpoint:
    """`source` itself where it is an open checkpoint, so that a run parses a header once; else the file, opened."""
    return source if isinstance(source, Checkpoint) else Checkpoint(source)


def distilled_sign(path: str | Path, metadata: dict[str, str]) -> str | None:
    """The sign that a checkpoint or LoRA is distilled to few steps without guidance; None without a sign.

    No tensor tells: a distilled model has the names and shapes of the full one.
    """
    if "distilled" in Path(path).name.lower():
        return "its file name"
    for key in ("model_version", "modelspec.title", "modelspec.architecture"):
        if "distilled" in metadata.get(key, "").lower():
            return f"{key} in its metadata"
    return read_ours(metadata, path).get("distilled")


def file_name(name: str, prefixes: dict[str, str]) -> str:
    """A module's tensor name as the checkpoint writes it."""
    ours, theirs = next(pair for pair in prefixes.items() if name.startswith(pair[0]))
    return theirs + name.removeprefix(ours)


def write(
    path: str | Path, tensors: list[tuple[str, str, list[int], Callable[[], Tensor | bytearray]]], metadata: dict
) -> None:
    """Write a safetensors file from (name, dtype in the format's words, shape, function that returns the data).

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
    """Write modules as a checkpoint in the released layout, each tensor under the prefix in the module's `PREFIXES`."""
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

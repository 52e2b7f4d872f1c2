"""One LTX-2.3 checkpoint: a safetensors file with the model's config in its metadata.

The released file holds the transformer (video and audio), the video VAE, the text projection, an audio VAE and a
vocoder, about 46 GB in bf16. This project needs the 1,758 tensors of the video branch. They are read one at a time,
straight to the device and dtype of a module on the meta device: loading takes the memory of the loaded tensors and no
more. No file is mapped into memory: a map would count the whole file as resident.

A weight may be stored in fp8, as q (out, in) with a scale in a tensor beside it; the weight is w = q * scale:

        X.weight_scale   in the released fp8 files and those of ComfyUI: one number, or one for each row
        X.scale_weight   in older files of ComfyUI
        none             a plain cast: scale 1

A transformer alone is read together with a base, a second file that supplies the other tensors, and the config where
the first file has none.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError, whole_file
from common.ltx_file import DTYPES, OUR_METADATA, Layers, kind, read_config, read_header, read_ours, require_supported
from common.schema import parse_json

Device = str | torch.device
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("BF16", "F16", "F32", "F64")
FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # safetensors' name of a format: ComfyUI's name
LARGEST_BITS = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}  # of a finite number, without the sign
QUANTIZATION = "_quantization_metadata"  # ComfyUI's entry in the metadata
PIECE = 4 * 2**20  # elements that are converted at a time

DIT = "model.diffusion_model."
DIT_PREFIXES = (DIT, "diffusion_model.", "transformer.", "model.", "")  # of a transformer alone
AUDIO = ("audio_", "av_ca_", "video_to_audio_", "scale_shift_table_a2v_")  # signs of the audio branch in a name


class Checkpoint:
    """An open LTX-2.3 checkpoint: `config`, `metadata`, `ours` (this project's own entry) and `tensors` by name."""

    def __init__(self, path: str | Path, base: str | Path | None = None):
        """Read and check the headers; `base` has the rest where `path` holds a transformer alone.

        UserError if a file is missing, damaged, or not LTX-2.3.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"no checkpoint at {path}: give --ckpt the path of ltx-2.3-22b-dev.safetensors")
        self.metadata, self.tensors, start = read_header(self.path)
        self.config, self.ours = read_config(self.metadata, path), read_ours(self.metadata, path)
        self.layers = parse_json(Layers, self.metadata.get(QUANTIZATION, "{}"), f"{path}: {QUANTIZATION}").layers
        # file and offset of each tensor's first byte
        self.places = {name: (self.path, start + entry["data_offsets"][0]) for name, entry in self.tensors.items()}
        if base is not None:
            self._add_base(Checkpoint(base))
        if other := kind(self.tensors, self.config, self.metadata.get("model_version", "")):
            raise UserError(f"{path} is not an LTX-2.3 checkpoint: it looks like {': '.join(other)}")
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
        signs = ("connector.", *AUDIO)
        rest = [name for name in base.tensors if not name.startswith(DIT) or any(sign in name for sign in signs)]
        self.tensors = {name: base.tensors[name] for name in rest} | {n: self.tensors[o] for n, o in own.items()}
        self.places = {name: base.places[name] for name in rest} | {n: self.places[o] for n, o in own.items()}
        self.config, self.ours = base.config | self.config, base.ours | self.ours
        self.metadata = base.metadata | self.metadata
        self.layers = base.layers | self.layers

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
        return self.layers.get(layer) or self.layers.get(layer.removeprefix(DIT), {})

    def misfit(self, name: str, slot: Tensor) -> str | None:
        """Why the file's tensor `name` cannot fill `slot`, or None if it can."""
        if name not in self.tensors:
            return f"tensor {name} is missing"
        shape, needed = self.tensors[name]["shape"], list(slot.shape)
        wrong = f"tensor {name} has shape {shape} where the config says {needed}" if shape != needed else None
        return self.unreadable(name) or wrong

    def read_bytes(self, name: str) -> bytearray:
        """The bytes of one tensor as they are in the file."""
        start, end = self.tensors[name]["data_offsets"]
        return self._read(name, 0, end - start)

    def _read(self, name: str, offset: int, length: int) -> bytearray:
        """`length` bytes of a tensor, from its byte `offset` on."""
        (path, start), data = self.places[name], bytearray(length)
        with open(path, "rb") as file:
            file.seek(start + offset)
            if file.readinto(data) < length:
                raise UserError(f"{path} ends inside the tensor {name}: download it again")
        return data

    def read(self, name: str, device: Device = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on `device`, in `dtype` if it is floating point, an fp8 weight times its scale; else as stored.

        The conversion goes piece by piece, so that the stored form is never in memory as a whole beside the result.
        UserError if a number is NaN or infinite, in the file or after the conversion.
        """
        stored = DTYPES[self.tensors[name]["dtype"]]
        target = dtype if dtype and stored.is_floating_point else stored
        tensor = torch.empty(self.tensors[name]["shape"], dtype=target, device=device)
        offset = 0
        for piece in tensor.view(-1).split(PIECE) if tensor.numel() else ():
            data = self._read(name, offset, piece.numel() * stored.itemsize)
            piece.copy_(torch.frombuffer(data, dtype=stored).to(device))
            offset += len(data)
            self._require_finite(name, piece)
        if dtype and self.scale_name(name):
            scale = self.scale(name, device).expand(len(tensor), 1)
            count = max(1, PIECE // max(1, tensor[0].numel()))  # rows at a time
            for rows, factors in zip(tensor.split(count), scale.split(count)):
                self._require_finite(name, rows.mul_(factors))  # computed in float32, rounded once to `dtype`
        return tensor

    def scale(self, name: str, device: Device = "cpu") -> Tensor:
        """The scale of an fp8 weight in float32, (1, 1) or (out, 1); ones for a plain cast."""
        scale = self.scale_name(name)
        return self.read(scale, device, torch.float32).view(-1, 1) if scale else torch.ones(1, 1, device=device)

    def _require_finite(self, name: str, numbers: Tensor) -> None:
        """By the least and the largest number, in one pass that takes less time than the reading; NaN is both."""
        if numbers.dtype in LARGEST_BITS:
            finite = (numbers.view(torch.uint8) & 0x7F).amax() <= LARGEST_BITS[numbers.dtype]
        elif numbers.is_floating_point():
            finite = torch.stack(torch.aminmax(numbers)).isfinite().all()
        else:
            return
        if not finite:
            raise UserError(f"{self.path}: the tensor {name} holds NaN or infinity: the file is of no use")

    def load(
        self, module: nn.Module, prefixes: dict[str, str], device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """Read every tensor of a module that is on the meta device from the file.

        `prefixes` maps the beginning of the module's names to the beginning of the file's. The device "meta" checks
        names and shapes and reads no data. UserError with the first tensor that is missing or does not fit.
        """
        loaded = {}
        for name, slot in module.state_dict().items():
            if not slot.is_meta:  # filled before, by load_fp8
                continue
            source = file_name(name, prefixes)
            if problem := self.misfit(source, slot):
                raise UserError(f"{self.path}: {problem}")
            if torch.device(device).type != "meta":
                loaded[name] = self.read(source, device, dtype)
        module.load_state_dict(loaded, strict=False, assign=True)
        return module.eval()


def open_checkpoint(source: "str | Path | Checkpoint") -> Checkpoint:
    """`source` itself where it is an open checkpoint, so that a run parses a header once; else the file, opened."""
    return source if isinstance(source, Checkpoint) else Checkpoint(source)


def distilled_sign(path: str | Path, metadata: dict[str, str]) -> str | None:
    """The sign that a checkpoint or LoRA is distilled to few steps without guidance; None without a sign.

    No tensor tells: a distilled model has the names and shapes of the full one.
    """
    keys = ("model_version", "modelspec.title", "modelspec.architecture")
    texts = {"its file name": Path(path).name} | {f"{key} in its metadata": metadata.get(key, "") for key in keys}
    sign = next((place for place, text in texts.items() if "distilled" in text.lower()), None)
    return sign or read_ours(metadata, path).get("distilled")


def file_name(name: str, prefixes: dict[str, str]) -> str:
    """A module's tensor name as the checkpoint writes it."""
    ours, theirs = next(pair for pair in prefixes.items() if name.startswith(pair[0]))
    return theirs + name.removeprefix(ours)


Entry = tuple[str, str, list[int], Callable[[], Tensor | bytearray]]  # name, dtype in the format's words, shape, data


def write(path: str | Path, tensors: list[Entry], metadata: dict[str, str]) -> None:
    """Write a safetensors file; each entry's function returns the data of its tensor.

    Only one tensor is held at a time. The file appears when complete.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, dtype, shape, _ in tensors:
        start, end = end, end + torch.Size(shape).numel() * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data starts on a multiple of 8
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
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
    entries = [
        (file_name(name, module.PREFIXES), NAMES[dtype], list(tensor.shape), lambda tensor=tensor: tensor)
        for module in modules
        for name, tensor in module.state_dict().items()
    ]
    metadata = {"config": json.dumps(config), "model_version": "2.3.0", OUR_METADATA: json.dumps(ours)}
    write(path, entries, metadata)

"""LoRA files in the dialects of many trainers: read, checked against the model, and merged into its weights.

        W' = W + strength * alpha / rank * B A      low rank (Hu et al. 2021); a file without alpha means alpha = rank
        W' = W + strength * (m V / |V| - W)         DoRA (Liu et al. 2024), V = W + alpha / rank * B A; the magnitude m
                                                    and the norm are per row, or per column where m has that shape
        W' = W + strength * D                       full difference, of a weight or of a bias

The name of a tensor is [prefix][layer].[part]. `PART` lists the parts; the prefixes are those of ComfyUI, diffusers and
peft. kohya's trainers write the layer with underscores instead of dots, so the layer is searched among the model's
own. Every change is kept under the released name of the tensor it changes. One mapping therefore serves the DiT, the
connector and the projection, in memory and in a checkpoint.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from checkpoint import AUDIO, DIT, FLOATS, FP8, Checkpoint, file_name
from common.errors import UserError
from common.ltx_file import read_header, read_ours
from model import LTXVideo
from text import TextConnector

PREFIX = re.compile(r"^((base_model\.model|model\.diffusion_model|diffusion_model|transformer)\.)+")
KOHYA, KOHYA_PREFIX = "lora_unet_", re.compile(r"^lora_unet_(model_)?(diffusion_model_)?")
PART = re.compile(
    r"(?P<layer>.+)\.(?:"
    r"(?P<A>lora(?:_A|_A\.default|_down|\.down)\.weight)|(?P<B>lora(?:_B|_B\.default|_up|\.up)\.weight)|"
    r"(?P<alpha>alpha)|(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?)|"
    r"(?P<diff>diff)|(?P<diff_b>diff_b))",
    re.DOTALL,
)
INTEGERS = ("I64", "I32", "I16", "I8", "U8")  # some trainers store alpha as one
LARGEST_STRENGTH = 100.0


@dataclass(frozen=True)
class Change:
    """The change of a tensor by a full difference, or of a weight (out, in) by a pair: names in the file."""

    diff: str = ""  # of the changed tensor's shape
    A: str = ""  # (rank, in)
    B: str = ""  # (out, rank)
    scale: float = 1.0  # alpha / rank
    magnitude: str = ""  # of DoRA: (out), (out, 1) or (1, in)


class LoRA:
    """A LoRA file, checked against modules, which may be on the meta device. Tensors are read when they are merged.

    changes   {released name of a tensor: its change}
    rank      the largest rank
    audio     number of tensors for the audio branch, which are not used
    ignored   names of tensors without a place in the modules
    ours      this project's own metadata, {} in other files
    """

    def __init__(self, path: str | Path, modules: list[nn.Module], strength: float = 1.0, ignore_unknown: bool = False):
        """UserError for a tensor without a place (unless ignored), of a wrong shape, or without its other half."""
        self.path, self.strength = Path(path), strength
        if not self.path.is_file():
            raise UserError(f"no LoRA at {path}: give --lora FILE or FILE:STRENGTH")
        self.metadata, self.tensors, _ = read_header(self.path)
        self.ours = read_ours(self.metadata, self.path)
        named = [(file_name(name, m.PREFIXES), tensor) for m in modules for name, tensor in m.named_parameters()]
        self.shapes = {name: list(tensor.shape) for name, tensor in named}
        try:
            self.file = safe_open(self.path, framework="pt")
        except SafetensorError as error:  # a format of numbers that this version of the library does not know
            raise UserError(f"{path} cannot be read: {error}") from None
        self.rank, self.audio, self.ignored = 0, 0, []
        self.changes = {target: self._change(target, parts) for target, parts in self._parts(ignore_unknown).items()}
        if not self.changes:
            raise UserError(f"{path} holds nothing for the video branch ({self.audio} tensors for the audio branch)")

    def _parts(self, ignore_unknown: bool) -> dict[str, dict[str, str]]:
        """The names in the file by the tensor they change and by part: {released name: {"A": name, "B": name}}."""
        if self.tensors and not any(map(PART.fullmatch, self.tensors)):
            names = f"it has tensors like {next(iter(self.tensors))[:100]}, and none like X.lora_A.weight"
            raise UserError(f"{self.path} is no LoRA that can be read here: {names}; a checkpoint goes to --ckpt")
        layers = _layers(self.shapes)
        parts: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            match = PART.fullmatch(name)
            target = self._target(match["layer"], match.lastgroup, layers) if match else None
            if target is None and any(sign in name for sign in (*AUDIO, "vocoder")):
                self.audio += 1
            elif target is None:
                self.ignored.append(name)
            elif (first := parts.setdefault(target, {}).setdefault(match.lastgroup, name)) != name:
                raise UserError(f"{self.path}: the tensors {first} and {name} are for the same place")
        if self.ignored and not ignore_unknown:
            unknown = f"{len(self.ignored)} of {len(self.tensors)} tensors have no place in the LTX-2.3 video branch"
            raise UserError(
                f"{self.path}: {unknown}: {_shortened(self.ignored)}; --lora-ignore-unknown leaves them out"
            )
        return parts

    def _target(self, layer: str, part: str, layers: dict[str, list[str]]) -> str | None:
        """The released name of the tensor that a part of a layer changes; None if the model has no such tensor."""
        released = layers.get(PREFIX.sub("", KOHYA_PREFIX.sub(KOHYA, layer)), [None])
        if len(released) > 1:
            raise UserError(f"{self.path}: {layer} may be {' or '.join(released)}: rename it in the file, with dots")
        target = f"{released[0]}.{'bias' if part == 'diff_b' else 'weight'}"
        if part == "diff" and target not in self.shapes:
            target = released[0]  # a table or the registers: parameters of their own, not the weight of a layer
        return target if target in self.shapes else None

    def _change(self, target: str, parts: dict[str, str]) -> Change:
        shape, layer = self.shapes[target], target.removesuffix(".weight").removeprefix(DIT)
        for part, name in parts.items():
            stored = self.tensors[name]["dtype"]
            if stored not in (*FLOATS, *FP8, *(INTEGERS if part == "alpha" else ())):
                raise UserError(f"{self.path}: {name} is stored as {stored}: a LoRA holds floating-point numbers")
        if name := parts.get("diff") or parts.get("diff_b"):
            if others := [other for other in parts.values() if other != name]:
                raise UserError(f"{self.path}: the tensors {name} and {others[0]} are for the same place")
            if self._shape(name) != shape:
                raise UserError(f"{self.path}: {name} {self._shape(name)} does not fit {target} {shape}")
            return Change(name)
        if missing := [part for part in ("A", "B") if part not in parts]:
            half = next(iter(parts.values()))
            raise UserError(f"{self.path}: {half} is there and its other half, lora_{missing[0]} of {layer}, is not")
        shapes = {part: self._shape(name) for part, name in parts.items() if part != "alpha"}
        rank, (out, *width) = next(iter(shapes["A"]), 0), shape
        fitting = {"A": [[rank, *width]], "B": [[out, rank]], "magnitude": [[out], [out, 1], [1, *width]]}
        if not (rank and width and all(shapes[part] in fitting[part] for part in shapes)):
            sizes = " beside ".join(f"{parts[part]} {shapes[part]}" for part in shapes)
            forms = "[rank, in] beside [out, rank], and a DoRA magnitude [out], [out, 1] or [1, in]"
            raise UserError(f"{self.path}: {sizes} does not fit the weight {shape} of {layer}: it should be {forms}")
        alpha = self.file.get_tensor(parts["alpha"]).double() if "alpha" in parts else torch.tensor(rank)
        if alpha.numel() != 1 or not math.isfinite(alpha):
            raise UserError(f"{self.path}: {parts['alpha']} is not one number")
        self.rank = max(self.rank, rank)
        return Change("", parts["A"], parts["B"], alpha.item() / rank, parts.get("magnitude", ""))

    def _shape(self, name: str) -> list[int]:
        return self.tensors[name]["shape"]

    def require_finite(self) -> None:
        """Read the whole file once. UserError for NaN or infinity, and for changes too large for float32."""
        largest = {"": 0.0}  # the name of a part that a change lacks
        for name in (name for name in self.tensors if name not in self.ignored):
            largest[name] = _largest(self.file.get_tensor(name))
            if not math.isfinite(largest[name]):
                reason = f"{name} holds NaN or infinity, and every video made with it would be black"
                raise UserError(f"{self.path}: {reason}: take another file, or an earlier one of the same training")
        for target, change in self.changes.items():
            product = largest[change.A] * largest[change.B] * (self._shape(change.A)[0] if change.A else 0)
            bound = max(abs(change.scale) * product, largest[change.diff], largest[change.magnitude])
            if not bound * max(1.0, abs(self.strength)) < torch.finfo(torch.float32).max:
                file = f"{self.path} at strength {self.strength:g}"
                raise UserError(f"{file} changes {target} by more than float32 holds")

    def add_to(self, total: Tensor, target: str, weight: Tensor) -> None:
        """Add the change of the tensor `target` to `total`, in place. `weight` is the tensor without any LoRA, from
        which DoRA's change is computed, so that the order of several LoRAs does not matter."""
        change = self.changes[target]
        if change.diff:
            total.add_(self.file.get_tensor(change.diff).to(total), alpha=self.strength)
            return
        a, b = (self.file.get_tensor(name).to(total) for name in (change.A, change.B))  # (rank, in), (out, rank)
        if not change.magnitude:
            total.addmm_(b, a, alpha=self.strength * change.scale)
            return
        magnitude = self.file.get_tensor(change.magnitude).to(total)
        if magnitude.dim() == 1:
            magnitude = magnitude[:, None]  # (out, 1)
        wide = weight.to(total.dtype)
        direction = torch.addmm(wide, b, a, alpha=change.scale)  # V (out, in)
        across = 1 if magnitude.shape == (len(wide), 1) else 0  # rows; (1, in): columns
        norm = direction.norm(dim=across, keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)
        total.add_(magnitude * direction / norm - wide, alpha=self.strength)


def _layers(shapes: dict[str, list[int]]) -> dict[str, list[str]]:
    """The released names of the layers that a name in a LoRA file may mean, a name with dots or one of kohya's."""
    layers: dict[str, list[str]] = {}
    for layer in dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in shapes):
        name = layer.removeprefix(DIT)
        # LTX-2.0 has one projection, and some trainers keep its name.
        for dotted in {name, name.replace(".video_aggregate_embed", ".aggregate_embed")}:
            for key in (dotted, KOHYA + dotted.replace(".", "_")):
                layers.setdefault(key, []).append(layer)
    return layers


def _shortened(names: list[str], most: int = 12) -> str:
    """Names as one line: those that differ in their block's number only are written once, with * and their count."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(re.sub(r"(?<=[._])\d+(?=[._])", "*", name), []).append(name)
    texts = [f"{p[:100]} ({len(g)} times)" if len(g) > 1 else g[0][:100] for p, g in groups.items()]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more kinds" if len(texts) > most else "")


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; NaN or infinite if a value is. One pass without a copy."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 0.0
    low, high = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)
    return torch.maximum(-low, high).item()


def parse_lora(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH."""
    path, _, tail = text.rpartition(":")
    try:
        strength = float(tail)
    except ValueError:
        return text, 1.0
    if not path or not abs(strength) <= LARGEST_STRENGTH:
        example = f"face.safetensors:0.8, with a strength from -{LARGEST_STRENGTH:g} to {LARGEST_STRENGTH:g}"
        raise UserError(f"--lora {text}: write FILE or FILE:STRENGTH, for instance {example}")
    return path, strength


def open_loras(texts: list[str], checkpoint: Checkpoint, ignore_unknown: bool = False) -> list[LoRA]:
    """The LoRAs in the values of --lora, checked against the checkpoint's DiT, connector and projection, and finite."""
    if not texts:
        return []
    with torch.device("meta"):
        modules = [LTXVideo(checkpoint.config["transformer"]), TextConnector.for_checkpoint(checkpoint)]
    loras = [LoRA(path, modules, strength, ignore_unknown) for path, strength in map(parse_lora, texts)]
    for lora in loras:
        lora.require_finite()
    return loras


def describe(lora: LoRA) -> str:
    """One line: strength, and the numbers of layers and tensors that are changed, set aside and ignored."""
    differences = sum(bool(change.diff) for change in lora.changes.values())
    text_path = sum(name.startswith(tuple(TextConnector.PREFIXES.values())) for name in lora.changes)
    counts = [f"{len(lora.changes) - differences} layers of rank up to {lora.rank}"] if lora.rank else []
    counts += [f"{differences} full differences"] if differences else []
    counts += [f"{text_path} of these in the text path"] if text_path else []
    counts += [f"{lora.audio} tensors of the audio branch set aside"]
    counts += [f"{len(lora.ignored)} without a place ignored"] if lora.ignored else []
    return f"{lora.path} at strength {lora.strength:g}: {', '.join(counts)}"


@torch.no_grad()
def merged(weight: Tensor, target: str, loras: list[LoRA]) -> Tensor:
    """The tensor `target` (its released name) with all LoRAs: added up in float32 at least, rounded once."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    active = [lora for lora in loras if lora.strength and target in lora.changes]
    for lora in active:
        lora.add_to(total, target, weight)
    result = total.to(weight.dtype)
    if not math.isfinite(_largest(result)):
        files = ", ".join(f"{lora.path}:{lora.strength:g}" for lora in active)
        raise UserError(f"with --lora {files}, {target} is beyond the range of {weight.dtype}: lower the strength")
    return result


@torch.no_grad()
def merge_lora(module: nn.Module, loras: list[LoRA]) -> nn.Module:
    """Change a module with `PREFIXES` (DiT or connector) in place, one tensor at a time. Strength 0 changes no bit."""
    for name, parameter in module.named_parameters():
        target = file_name(name, module.PREFIXES)
        if any(lora.strength and target in lora.changes for lora in loras):
            parameter.copy_(merged(parameter, target, loras))
    return module

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
from collections import Counter
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

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
UNDERSCORED = re.compile(r"lora_unet_(?:model_)?(?:diffusion_model_)?")
PART = re.compile(
    r"(?P<layer>.+)\.(?:"
    r"(?P<A>lora_A(?:\.default)?\.weight|lora_down\.weight|lora\.down\.weight)"
    r"|(?P<B>lora_B(?:\.default)?\.weight|lora_up\.weight|lora\.up\.weight)"
    r"|(?P<alpha>alpha)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?)"
    r"|(?P<diff>diff)|(?P<diff_b>diff_b))",
    re.DOTALL,
)
INTEGERS = ("I64", "I32", "I16", "I8", "U8")  # some trainers store alpha as one
LARGEST_STRENGTH = 100.0


@dataclass(frozen=True)
class LowRank:
    """The change of one weight (out, in) by a pair of factors: their names in the file."""

    A: str  # (rank, in)
    B: str  # (out, rank)
    scale: float  # alpha / rank
    magnitude: str | None = None  # of DoRA: (out), (out, 1) or (1, in)


@dataclass(frozen=True)
class Difference:
    """The change of one tensor by a difference of its shape: the difference's name in the file."""

    diff: str


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
        self.shapes = {
            file_name(name, module.PREFIXES): list(parameter.shape)
            for module in modules
            for name, parameter in module.named_parameters()
        }
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
            raise UserError(
                f"{self.path} is no LoRA that can be read here: it has tensors like {next(iter(self.tensors))[:100]}, "
                "and none like X.lora_A.weight; a checkpoint goes to --ckpt"
            )
        dotted, underscored = _layers(self.shapes)
        parts: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            match = PART.fullmatch(name)
            target = self._target(match["layer"], match.lastgroup, dotted, underscored) if match else None
            if target is None and any(sign in name for sign in (*AUDIO, "vocoder")):
                self.audio += 1
            elif target is None:
                self.ignored.append(name)
            elif match.lastgroup in parts.setdefault(target, {}):
                raise UserError(
                    f"{self.path}: the tensors {parts[target][match.lastgroup]} and {name} are for the same place"
                )
            else:
                parts[target][match.lastgroup] = name
        if self.ignored and not ignore_unknown:
            raise UserError(
                f"{self.path}: {len(self.ignored)} of {len(self.tensors)} tensors have no place in the LTX-2.3 video "
                f"branch: {_shortened(self.ignored)}; --lora-ignore-unknown goes on without them"
            )
        return parts

    def _target(self, layer: str, part: str, dotted: dict[str, str], underscored: dict[str, list[str]]) -> str | None:
        """The released name of the tensor that a part of a layer changes; None if the model has no such tensor."""
        if prefix := UNDERSCORED.match(layer):
            layers = underscored.get(layer[prefix.end() :], [])
            if len(layers) > 1:
                raise UserError(f"{self.path}: {layer} may be {' or '.join(layers)}: rename it in the file, with dots")
            released = layers[0] if layers else None
        else:
            while prefix := next((prefix for prefix in PREFIXES if layer.startswith(prefix)), None):
                layer = layer.removeprefix(prefix)
            released = dotted.get(layer)
        target = f"{released}.bias" if part == "diff_b" else f"{released}.weight"
        if part == "diff" and target not in self.shapes:
            target = released  # a table or the registers: parameters of their own, not the weight of a layer
        return target if target in self.shapes else None

    def _change(self, target: str, parts: dict[str, str]) -> LowRank | Difference:
        shape, layer = self.shapes[target], target.removesuffix(".weight").removeprefix(DIT)
        for part, name in parts.items():
            stored = self.tensors[name]["dtype"]
            if stored not in (*FLOATS, *FP8) and not (part == "alpha" and stored in INTEGERS):
                raise UserError(f"{self.path}: {name} is stored as {stored}: a LoRA holds floating-point numbers")
        if name := parts.get("diff") or parts.get("diff_b"):
            if others := [other for other in parts.values() if other != name]:
                raise UserError(f"{self.path}: the tensors {name} and {others[0]} are for the same place")
            if self._shape(name) != shape:
                raise UserError(f"{self.path}: {name} {self._shape(name)} does not fit {target} {shape}")
            return Difference(name)
        if missing := [part for part in ("A", "B") if part not in parts]:
            there = next(iter(parts.values()))
            raise UserError(f"{self.path}: {there} is there and its other half, lora_{missing[0]} of {layer}, is not")
        a, b = self._shape(parts["A"]), self._shape(parts["B"])
        if not (len(a) == len(b) == 2 and [b[0], a[1]] == shape and a[0] == b[1] > 0):
            raise UserError(
                f"{self.path}: {parts['A']} {a} and {parts['B']} {b} do not fit the weight {shape} of {layer}: "
                "they should be [rank, in] and [out, rank]"
            )
        magnitude = parts.get("magnitude")
        if magnitude and self._shape(magnitude) not in ([shape[0]], [shape[0], 1], [1, shape[1]]):
            raise UserError(
                f"{self.path}: {magnitude} {self._shape(magnitude)} does not fit the weight {shape} of {layer}: "
                f"it should be [{shape[0]}], [{shape[0]}, 1] or [1, {shape[1]}]"
            )
        self.rank = max(self.rank, a[0])
        return LowRank(parts["A"], parts["B"], self._alpha(parts, a[0]) / a[0], magnitude)

    def _alpha(self, parts: dict[str, str], rank: int) -> float:
        if "alpha" not in parts:
            return rank
        alpha = self.file.get_tensor(parts["alpha"]).double()
        if alpha.numel() != 1 or not math.isfinite(alpha):
            raise UserError(f"{self.path}: {parts['alpha']} is not one number")
        return alpha.item()

    def _shape(self, name: str) -> list[int]:
        return self.tensors[name]["shape"]

    def require_finite(self) -> None:
        """Read the whole file once. UserError for NaN or infinity, and for changes too large for float32."""
        largest = {}
        for name in self.tensors:
            if name not in self.ignored:
                largest[name] = _largest(self.file.get_tensor(name))
                if not math.isfinite(largest[name]):
                    raise UserError(
                        f"{self.path}: {name} holds NaN or infinity, and every video made with it would be black: "
                        "take another file, or an earlier one of the same training"
                    )
        for target, change in self.changes.items():
            if isinstance(change, LowRank):
                bound = abs(change.scale) * self._shape(change.A)[0] * largest[change.A] * largest[change.B]
                bound = max(bound, largest.get(change.magnitude, 0.0))
            else:
                bound = largest[change.diff]
            if not bound * max(1.0, abs(self.strength)) < torch.finfo(torch.float32).max:
                raise UserError(
                    f"{self.path} at strength {self.strength:g} changes {target} by more than float32 holds"
                )

    def read(self, name: str, like: Tensor) -> Tensor:
        """A tensor of the file on the device and in the dtype of `like`."""
        return self.file.get_tensor(name).to(like)

    def add_to(self, total: Tensor, target: str, weight: Tensor) -> None:
        """Add the change of the tensor `target` to `total`, in place. `weight` is the tensor without any LoRA, from
        which DoRA's change is computed, so that the order of several LoRAs does not matter."""
        change = self.changes[target]
        if isinstance(change, Difference):
            total.add_(self.read(change.diff, total), alpha=self.strength)
            return
        a, b = self.read(change.A, total), self.read(change.B, total)  # (rank, in), (out, rank)
        if change.magnitude is None:
            total.addmm_(b, a, alpha=self.strength * change.scale)
            return
        magnitude = self.read(change.magnitude, total)
        if magnitude.dim() == 1:
            magnitude = magnitude[:, None]  # (out, 1)
        wide = weight.to(total.dtype)
        direction = torch.addmm(wide, b, a, alpha=change.scale)  # V (out, in)
        across = 1 if magnitude.shape[1] == 1 and len(magnitude) == len(wide) else 0  # rows; (1, in): columns
        norm = direction.norm(dim=across, keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)
        total.add_(magnitude * direction / norm - wide, alpha=self.strength)


def _layers(shapes: dict[str, list[int]]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The released names of layers by their names in LoRA files: with dots, and with underscores."""
    dotted: dict[str, str] = {}
    for tensor in shapes:
        layer = tensor.removesuffix(".weight").removesuffix(".bias")
        dotted[layer.removeprefix(DIT)] = layer
    for name, layer in list(dotted.items()):  # LTX-2.0 has one projection, and some trainers keep its name
        dotted.setdefault(name.replace(".video_aggregate_embed", ".aggregate_embed"), layer)
    underscored: dict[str, list[str]] = {}
    for name, layer in dotted.items():
        underscored.setdefault(name.replace(".", "_"), []).append(layer)
    return dotted, underscored


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
        raise UserError(
            f"--lora {text}: write FILE or FILE:STRENGTH, for instance face.safetensors:0.8, with a strength from "
            f"-{LARGEST_STRENGTH:g} to {LARGEST_STRENGTH:g}"
        )
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
    kinds = Counter(type(change) for change in lora.changes.values())
    counts = [f"{kinds[LowRank]} layers of rank up to {lora.rank}"] if kinds[LowRank] else []
    counts += [f"{kinds[Difference]} full differences"] if kinds[Difference] else []
    if text_path := sum(name.startswith(tuple(TextConnector.PREFIXES.values())) for name in lora.changes):
        counts.append(f"{text_path} of these in the text path")
    counts.append(f"{lora.audio} tensors of the audio branch set aside")
    counts += [f"{len(lora.ignored)} without a place ignored"] if lora.ignored else []
    return f"{lora.path} at strength {lora.strength:g}: {', '.join(counts)}"


# ----------------------------------------------------------------------------------------------------------------------
# merging


@torch.no_grad()
def merged(weight: Tensor, target: str, loras: list[LoRA]) -> Tensor:
    """The tensor `target` (its released name) with all LoRAs: added up in float32 at least, rounded once."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    active = [lora for lora in loras if lora.strength and target in lora.changes]
    for lora in active:
        lora.add_to(total, target, weight)
    result = total.to(weight.dtype)
    if not math.isfinite(_largest(result)):
        culprits = ", ".join(f"{lora.path}:{lora.strength:g}" for lora in active)
        raise UserError(f"with --lora {culprits}, {target} is beyond the range of {weight.dtype}: lower the strength")
    return result


@torch.no_grad()
def merge_lora(module: nn.Module, loras: list[LoRA]) -> nn.Module:
    """Change a module with `PREFIXES` (DiT or connector) in place, one tensor at a time. Strength 0 changes no bit."""
    for name, parameter in module.named_parameters():
        target = file_name(name, module.PREFIXES)
        if any(lora.strength and target in lora.changes for lora in loras):
            parameter.copy_(merged(parameter, target, loras))
    return module

"""Low-rank adapters (LoRA): a change of linear layers that is a few hundredths of the model to train and to share.

        y = W x + b + sum over adapters of  strength * alpha / rank * B A x       (Hu et al. 2021, Eq. 3)

        W (out, in)   frozen                       B starts at 0, so an untrained adapter changes nothing
        A (rank, in), B (out, rank)   trained      a file without alpha means alpha = rank

The paper trains all 13 B weights; with the same losses, this is what one GPU can train. Two ways to run them: merged,
W + strength * alpha / rank * B A in float32, cast back once, and as fast as the model alone; or beside W, exact.

    python -m engine.lora --ckpt ltx-2.3-22b-dev.safetensors --lora face.safetensors:0.8 --out merged.safetensors

Files as trainers of LTX-2 write them, `[prefix][layer].lora_A.weight` and `.lora_B.weight` or `.lora_down.weight` and
`.lora_up.weight`, with or without `[layer].alpha`. What they hold for the audio branch is counted and set aside.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from checkpoint import NAMES, OUR_METADATA, Checkpoint, distilled_sign, file_name, write
from common.errors import Parser, UserError, one_line_errors
from common.ltx_file import read_ours
from model import LTXVideo

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
PARTS = {".lora_A.weight": "A", ".lora_down.weight": "A", ".lora_B.weight": "B", ".lora_up.weight": "B"}
PARTS[".alpha"] = "alpha"
AUDIO = ("audio_", "av_ca_", "scale_shift_table_a2v_")  # signs of the audio branch in a name
# How the reference is given, as this project's metadata says it; the paper's way where it does not.
REFERENCE = {"placement": "tass", "source_id": 2, "phase_scale": 1.0, "fit": "letterbox", "ref_timestep": "clean"}

# ----------------------------------------------------------------------------------------------------------------------
# in the model


class Adapter(nn.Module):
    """scale * B A x. The products are computed in x's dtype, whatever dtype A and B are kept and trained in."""

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0):
        super().__init__()
        self.lora_A = nn.Parameter(A)  # (rank, in)
        self.lora_B = nn.Parameter(B)  # (out, rank)
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return self.scale * F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


class LoRALinear(nn.Module):
    """A linear layer with adapters, in its place. The layer may be an FP8Linear."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.adapters = base, nn.ModuleList()

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for adapter in self.adapters:
            y = y + adapter(x)
        return y


def linear_layers(model: nn.Module) -> dict[str, Tensor]:
    """The weights (out, in) that an adapter can change, by the name of their layer."""
    layers = ((name.removesuffix(".base"), m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return {name: layer.weight for name, layer in layers}


def _add_adapter(model: nn.Module, name: str, adapter: Adapter) -> None:
    layer = model.get_submodule(name)
    if not isinstance(layer, LoRALinear):
        layer = LoRALinear(layer).train(layer.training)
        model.set_submodule(name, layer)
    layer.adapters.append(adapter.train(layer.training))


def new_lora(
    model: nn.Module, rank: int, alpha: float, targets: list[str], dropout: float = 0.0, seed: int = 0
) -> nn.Module:
    """Freeze `model` and put an untrained adapter, float32, on each layer in `targets`: what train.py trains."""
    model.requires_grad_(False)
    generator = torch.Generator("cpu").manual_seed(seed)  # one seed, one start, on any device and rank
    for name in find_targets(model, targets):
        weight = model.get_submodule(name).weight
        bound = weight.shape[1] ** -0.5
        A = torch.empty(rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
        B = torch.zeros(weight.shape[0], rank)
        _add_adapter(model, name, Adapter(A.to(weight.device), B.to(weight.device), alpha / rank, dropout))
    return model


def find_targets(model: nn.Module, targets: list[str]) -> dict[str, Tensor]:
    """The layers whose names are or end in one of `targets` ("to_q", "attn1.to_q", ...), with their weights."""
    layers = linear_layers(model)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise UserError(f'lora.targets: no linear layer is called {target!r}; there are "to_q", "ff.net.2", ...')
    return {name: w for name, w in layers.items() if any(f".{name}".endswith(f".{target}") for target in targets)}


def seed_dropout(seed: int, count: int) -> None:
    """Start the adapters' dropout for the micro-batch that begins with the run's sample number `count`.

    So a resumed run drops what the undisturbed one drops; many processes agree with one where a micro-batch is one
    sample.
    """
    state = np.random.SeedSequence([seed, count], spawn_key=(0,)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


# ----------------------------------------------------------------------------------------------------------------------
# files


class LoRA:
    """A LoRA file, checked against a model (on any device, meta too). Pairs are read when they are asked for.

    pairs: {layer: (name of A in the file, name of B, alpha / rank)}; rank: the largest; audio: how many tensors were
    set aside; ours: this project's own metadata, {} in other people's files.
    """

    def __init__(self, path: str | Path, model: nn.Module, strength: float = 1.0):
        """Raises UserError that names the first tensor that has no place in the model or does not fit it."""
        self.path, self.strength = Path(path), strength
        if not self.path.is_file():
            raise UserError(f"no LoRA at {path}: give --lora FILE or FILE:STRENGTH")
        try:
            self.file = safe_open(self.path, framework="pt")
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}): download it again") from None
        self.metadata: dict[str, str] = self.file.metadata() or {}
        self.ours: dict = read_ours(self.metadata, self.path)
        layers, names = linear_layers(model), self.file.keys()
        found: dict[str, dict[str, str]] = {}  # layer -> {"A": name in the file, "B": ..., "alpha": ...}
        self.audio = 0
        for name in names:
            layer, part = _split(name)
            if any(sign in name for sign in AUDIO):
                self.audio += 1
            elif part is None or layer not in layers:
                raise UserError(f"{path}: the tensor {name} belongs to no linear layer of the LTX-2.3 video branch")
            elif part in found.setdefault(layer, {}):
                raise UserError(f"{path}: the tensors {found[layer][part]} and {name} are for the same place")
            else:
                found[layer][part] = name
        if not found:
            raise UserError(f"{path} holds nothing for the video branch ({self.audio} tensors for the audio branch)")
        self.rank, self.pairs = 0, {}
        for layer, names in found.items():
            self.pairs[layer] = self._checked(layer, names, list(layers[layer].shape))

    def _checked(self, layer: str, names: dict[str, str], shape: list[int]) -> tuple[str, str, float]:
        if missing := [part for part in ("A", "B") if part not in names]:
            there = next(iter(names.values()))
            raise UserError(f"{self.path}: {there} is there and its other half, lora_{missing[0]} of {layer}, is not")
        a, b = (self.file.get_slice(names[part]).get_shape() for part in ("A", "B"))
        if not (len(a) == len(b) == 2 and [b[0], a[1]] == shape and a[0] == b[1] > 0):
            raise UserError(
                f"{self.path}: {names['A']} {a} and {names['B']} {b} do not fit the weight {shape} of {layer}: "
                "they should be [rank, in] and [out, rank]"
            )
        self.rank = max(self.rank, a[0])
        if "alpha" not in names:
            return names["A"], names["B"], 1.0
        alpha = self.file.get_tensor(names["alpha"])
        if alpha.numel() != 1 or not math.isfinite(alpha):
            raise UserError(f"{self.path}: {names['alpha']} is not one number")
        return names["A"], names["B"], alpha.item() / a[0]

    def pair(self, layer: str, like: Tensor) -> tuple[Tensor, Tensor, float]:
        """A (rank, in) and B (out, rank) on the device and in the dtype of `like`, and strength * alpha / rank."""
        assert like.is_floating_point(), f"{layer} is stored in {like.dtype}: no LoRA can be merged into it"
        name_a, name_b, scale = self.pairs[layer]
        a, b = (self.file.get_tensor(name).to(like) for name in (name_a, name_b))
        return a, b, self.strength * scale


def _split(name: str) -> tuple[str, str | None]:
    """A file's tensor name as the model's layer and "A", "B" or "alpha" (None if it is none of them)."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    suffix = next((suffix for suffix in PARTS if name.endswith(suffix)), None)
    return name.removeprefix(prefix).removesuffix(suffix or ""), PARTS.get(suffix)


def parse_lora(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH."""
    path, _, tail = text.rpartition(":")
    try:
        strength = float(tail)
    except ValueError:
        return text, 1.0
    if not path or not math.isfinite(strength):
        raise UserError(f"--lora {text}: write FILE or FILE:STRENGTH, for instance face.safetensors:0.8")
    return path, strength


def told_by(ours: dict) -> dict:
    """What this project's entry in the metadata of a checkpoint or LoRA says about how to sample."""
    return {key: ours[key] for key in REFERENCE if key in ours} | ours.get("defaults", {})


def wanted_by(loras: list[LoRA], decided: dict) -> dict:
    """What LoRAs say about how to sample; where two differ, the user has to have `decided`."""
    wanted: dict = {}
    for lora in loras:
        for key, value in told_by(lora.ours).items() if lora.strength else ():
            if key not in decided and wanted.setdefault(key, value) != value:
                raise UserError(
                    f"the LoRAs were trained with different {key}, {wanted[key]} and {value}: "
                    f"leave one out, or decide with --{key.replace('_', '-')} of sample.py"
                )
    return wanted


def merged(weight: Tensor, layer: str, loras: list[LoRA]) -> Tensor:
    """W + the sum of strength * alpha / rank * B A, in float32 at least, cast back once to W's dtype."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for lora in loras:
        if lora.strength and layer in lora.pairs:
            a, b, scale = lora.pair(layer, total)
            total = torch.addmm(total, b, a, alpha=scale)
    return total.to(weight.dtype)


@torch.no_grad()
def merge_lora(model: nn.Module, loras: list[LoRA]) -> nn.Module:
    """Change the model's weights in place, one at a time. A strength of 0 changes no bit."""
    for layer, weight in linear_layers(model).items():
        if any(lora.strength and layer in lora.pairs for lora in loras):
            weight.copy_(merged(weight, layer, loras))
    return model


def attach_lora(model: nn.Module, loras: list[LoRA]) -> nn.Module:
    """Run beside the weights, which stay as they are: exact in any dtype, a little slower."""
    for lora in loras:
        for layer in lora.pairs if lora.strength else ():
            _add_adapter(model, layer, Adapter(*lora.pair(layer, model.get_submodule(layer).weight.detach())))
    return model


def save_lora(
    path: str | Path, weights: dict[str, Tensor], scale: float, ours: dict, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write the adapters of `new_lora`, named as in the model, in the layout that ComfyUI and diffusers load.

    `scale` = alpha / rank is multiplied into B: a file with an alpha of its own is refused by some loaders and read as
    alpha = rank by others. `ours` goes into the metadata.
    """
    entries: list[tuple[str, str, list[int], Callable[[], Tensor]]] = []
    for name, tensor in weights.items():
        layer, _, part = name.partition(".adapters.0.")
        value = tensor.float() * scale if part == "lora_B" else tensor
        name = f"diffusion_model.{layer}.{part}.weight"
        entries.append((name, NAMES[dtype], list(tensor.shape), lambda value=value: value))
    write(path, sorted(entries, key=lambda entry: entry[0]), {OUR_METADATA: json.dumps(ours)})


def merge_file(base: str | Path, loras: list[LoRA], out: str | Path) -> None:
    """The checkpoint `base` with LoRAs merged in, everything else byte for byte, one tensor in memory at a time."""
    source = Checkpoint(base)
    layers = {file_name(f"{name}.weight", LTXVideo.PREFIXES): name for lora in loras for name in lora.pairs}
    wanted = wanted_by(loras, {})
    ours = source.ours | {key: value for key, value in wanted.items() if key in REFERENCE}
    ours["defaults"] = source.ours.get("defaults", {}) | {k: v for k, v in wanted.items() if k not in REFERENCE}
    ours["loras"] = [f"{lora.path.name}:{lora.strength:g}" for lora in loras]
    if sign := distilled_sign(base, source.metadata):
        ours["distilled"] = f"{Path(base).name}, by {sign}"

    def fetch(name: str) -> Tensor | bytearray:
        return merged(source.read(name), layers[name], loras) if name in layers else source.read_bytes(name)

    entries = [
        (name, entry["dtype"], entry["shape"], lambda name=name: fetch(name)) for name, entry in source.tensors.items()
    ]
    write(out, entries, source.metadata | {OUR_METADATA: json.dumps(ours)})


def main() -> None:
    parser = Parser(description="Merge LoRAs into a checkpoint: the released layout, loadable as the base is.")
    parser.add_argument("--ckpt", required=True, help="an LTX-2.3 checkpoint")
    parser.add_argument("--lora", required=True, action="append", metavar="FILE[:STRENGTH]", help="may be repeated")
    parser.add_argument("--out", required=True, help="the checkpoint to write")
    options = parser.parse_args()
    with torch.device("meta"):
        model = LTXVideo(Checkpoint(options.ckpt).config["transformer"])
    loras = [LoRA(path, model, strength) for path, strength in map(parse_lora, options.lora)]
    merge_file(options.ckpt, loras, options.out)
    print(f"wrote {options.out}: {', '.join(map(describe, loras))}")


def describe(lora: LoRA) -> str:
    return (
        f"{lora.path} at strength {lora.strength:g}: {len(lora.pairs)} layers of rank up to {lora.rank}, "
        f"{lora.audio} tensors of the audio branch set aside"
    )


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Low-rank adapters (LoRA): a change of linear layers that is a few hundredths of the model to train and to share.

        y = W x + b + alpha / rank * B A x                              (Hu et al. 2021, Eq. 3)

        W (out, in)   frozen                       B starts at 0, so an untrained adapter changes nothing
        A (rank, in), B (out, rank)   trained

The paper trains all 13 B weights; with the same losses, this is what one GPU can train. For sampling, adapters are
merged into the weights (lora_files.py), which makes the model as fast as without them:

    python -m engine.lora --ckpt ltx-2.3-22b-dev.safetensors --lora face.safetensors:0.8 --out merged.safetensors
"""

import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import NAMES, OUR_METADATA, Checkpoint, write
from common.errors import Parser, UserError, one_line_errors
from common.outputs import refuse_folders, refuse_overwrite
from engine.check import require_bf16
from engine.lora_files import LoRA, describe, merged, open_loras
from engine.recipe import merged_metadata


class LoRALinear(nn.Module):
    """A frozen linear layer, which may be an FP8Linear, and its adapter, computed in the dtype of its input."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(A)  # (rank, in)
        self.lora_B = nn.Parameter(B)  # (out, rank)
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # (..., rank)
        return self.base(x) + self.scale * F.linear(low, self.lora_B.to(x.dtype))  # (..., out)


def find_targets(model: nn.Module, targets: list[str]) -> dict[str, Tensor]:
    """The weights (out, in) of the linear layers whose names are or end in one of `targets` ("attn1.to_q", ...)."""
    layers = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise UserError(f'lora.targets: no linear layer is called {target!r}; there are "to_q", "ff.net.2", ...')
    return {name: w for name, w in layers.items() if f".{name}".endswith(tuple(f".{target}" for target in targets))}


def new_lora(
    model: nn.Module, rank: int, alpha: float, targets: list[str], dropout: float = 0.0, seed: int = 0
) -> nn.Module:
    """Freeze `model` and put an untrained adapter, float32, on each layer in `targets`: what train.py trains."""
    model.requires_grad_(False)
    generator = torch.Generator("cpu").manual_seed(seed)  # one seed, one start, on any device and rank
    for name in find_targets(model, targets):
        layer = model.get_submodule(name)
        out, width = layer.weight.shape
        A = torch.empty(rank, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
        A, B = A.to(layer.weight.device), torch.zeros(out, rank, device=layer.weight.device)
        model.set_submodule(name, LoRALinear(layer, A, B, alpha / rank, dropout).train(layer.training))
    return model


def seed_dropout(seed: int, count: int) -> None:
    """Seed the adapters' dropout for the micro-batch that begins with the run's sample number `count`. A resumed run
    drops what an undisturbed one drops. With micro-batches of one sample, many processes drop what one drops."""
    state = np.random.SeedSequence([seed, count], spawn_key=(0,)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


def save_lora(
    path: str | Path, weights: dict[str, Tensor], scale: float, ours: dict, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write the adapters of `new_lora`, named as in the model, in the layout that ComfyUI and diffusers load. B is
    multiplied by `scale` = alpha / rank, because a file with an alpha of its own is refused by one loader and read as
    alpha = rank by another. `ours` goes into the metadata."""
    entries = []
    for name, tensor in sorted(weights.items()):
        value = tensor.float() * scale if name.endswith(".lora_B") else tensor
        entries.append((f"diffusion_model.{name}.weight", NAMES[dtype], list(tensor.shape), lambda value=value: value))
    write(path, entries, {OUR_METADATA: json.dumps(ours)})


def write_changed(
    out: str | Path, base: Checkpoint, names: Collection[str], change: Callable[[str], Tensor], ours: dict
) -> None:
    """Write `base` with change(name) for each tensor in `names`; the others and the metadata stay byte for byte. One
    tensor is in memory at a time. `ours` goes into the metadata under a key of our own."""

    def fetch(name: str) -> Tensor | bytearray:
        return change(name) if name in names else base.read_bytes(name)

    tensors = [(name, entry["dtype"], entry["shape"], partial(fetch, name)) for name, entry in base.tensors.items()]
    write(out, tensors, base.metadata | {OUR_METADATA: json.dumps(ours)})


def merge_file(base: Checkpoint, loras: list[LoRA], out: str | Path) -> None:
    """Write the checkpoint `base` with LoRAs merged in."""
    targets = {target for lora in loras if lora.strength for target in lora.changes}
    write_changed(out, base, targets, lambda name: merged(base.read(name), name, loras), merged_metadata(base, loras))


def main() -> None:
    parser = Parser(description="Merge LoRAs into a checkpoint: the released layout, loadable as the base is.")
    parser.add_argument("--ckpt", required=True, help="an LTX-2.3 checkpoint")
    parser.add_argument("--lora", required=True, action="append", metavar="FILE[:STRENGTH]", help="may be repeated")
    parser.add_argument("--lora-ignore-unknown", action="store_true", help="leave out tensors that have no place")
    parser.add_argument("--out", required=True, help="the checkpoint to write")
    options = parser.parse_args()
    base = Checkpoint(options.ckpt)
    require_bf16(base)
    loras = open_loras(options.lora, base, options.lora_ignore_unknown)
    refuse_folders(options.out)
    refuse_overwrite([options.out], [base.path, *(lora.path for lora in loras)])
    merge_file(base, loras, options.out)
    print(f"wrote {options.out}: {'; '.join(map(describe, loras))}")


if __name__ == "__main__":
    with one_line_errors():
        main()

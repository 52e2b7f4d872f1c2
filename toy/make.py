"""All models of assets/, trained from nothing but the drawn world: `make tiny`.

    toy/faces.py ──> faces                          detector and recognizer
    toy/judge.py ──> judge.safetensors              the network that measures videos, on drawn clips
    toy/text.py  ──> gemma, projection, connector ─┐
    toy/vae.py   ──> VAE ──────────────────────────┴─> start.safetensors
    toy/cache.py ──> cache of 15,000 clips
    train.py     ──> the DiT, from random weights, flow loss (configs/tiny.toml) ──> tiny.safetensors

    python -m toy.make                     # parts that are there are kept: run it again to continue
    python -m toy.make --parts cache,video --out runs/other
    python -m toy.make --publish           # then replace the models in assets/

Each part is one of the repository's own commands, shown as it runs. The last lines list the minutes of each part.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from checkpoint import file_name, write_modules
from common.device import hardware
from common.errors import Parser, UserError, one_line_errors, write_text
from common.schema import Count, parse_json
from config import ASSETS
from model import LTXVideo
from text import TextConnector
from toy.jobs import run_command, torchrun
from toy.text import LAYERS, TRANSFORMER
from toy.vae import CONFIG, FPS, FRAMES, SIZE
from vae import VideoVAE

HERE = Path(__file__).parent.parent
DEFAULTS = {"height": SIZE, "width": SIZE, "frames": FRAMES, "fps": FPS, "steps": 30, "s_text": 2.0, "s_ref": 3.0}
# Of the DiT, as changes to configs/tiny.toml. A batch of 256 is eight times the work of one of 32.
TRAIN = "model.ckpt={out}/start.safetensors model.gemma={out}/gemma data.cache={out}/cache run.out={out}/video "
TRAIN += "optim.steps=2660 optim.batch=256 optim.lr=2e-3 optim.warmup=150 optim.ema=0.998 log.sample_every=0"
ON_GPU = " parallel.micro_batch=256 parallel.precision=bf16 parallel.compile=true data.workers=8"
PROGRAMS = {  # as typed after `python`
    "faces": "-m toy.faces --out {out}/faces",
    "judge": "-m toy.judge --train {out}/judge.safetensors",
    "text": "-m toy.text --gemma {out}/gemma --out {out}/text.safetensors",
    "vae": "-m toy.vae --out {out}/vae.safetensors",
    "cache": "-m toy.cache --count 15000 --ckpt {out}/start.safetensors --gemma {out}/gemma --faces {faces} "
    "--out {out}/cache",
}
PARTS = (*PROGRAMS, "video")


def read_part(module: nn.Module, path: Path) -> nn.Module:
    """Load the file of toy/vae.py or toy/text.py, which holds this module alone."""
    tensors = load_file(path)
    module.load_state_dict({name: tensors[file_name(name, module.PREFIXES)] for name in module.state_dict()})
    return module


def assemble(
    vae: Path, text: Path, out: Path, transformer: dict[str, Any] = TRANSFORMER, defaults: dict[str, Any] = DEFAULTS
) -> None:
    """One checkpoint in the released layout: trained VAE, trained text path, random DiT of this size."""
    ltx = json.loads((HERE / "configs" / "ltx-2.3.json").read_text())
    ltx["vae"] |= CONFIG
    ltx["transformer"] |= transformer
    torch.manual_seed(0)
    dit = LTXVideo(ltx["transformer"])
    connector = read_part(TextConnector(ltx["transformer"], LAYERS + 1), text)
    modules = [dit, connector, read_part(VideoVAE(ltx["vae"]), vae)]
    write_modules(out, modules, ltx, {"weights": "random", "defaults": defaults})


def commands(part: str, out: Path) -> list[list[str]]:
    """The commands of a part, each as the words after `python`."""
    faces = out / "faces" if (out / "faces").is_dir() else ASSETS / "faces"

    def words(text: str) -> list[str]:
        return [word.format(out=out, faces=faces) for word in text.split()]

    if part in PROGRAMS:
        return [(torchrun() if part == "cache" else []) + words(PROGRAMS[part])]
    changes = words(TRAIN + (ON_GPU if torch.cuda.is_available() else ""))
    train = [str(HERE / "train.py"), str(HERE / "configs" / "tiny.toml"), *(f"--set={change}" for change in changes)]
    return [[*torchrun(), *train], [*train, "--export", str(out / "tiny.safetensors")]]


def make(part: str, out: Path) -> dict[str, int]:
    """Make a part unless it is there. Returns the seconds that each part took."""
    record = out / "seconds.json"
    seconds = parse_json(dict[str, Count], record.read_bytes(), record) if record.is_file() else {}
    if part not in seconds:
        begun = time.perf_counter()
        if part == "cache":
            assemble(out / "vae.safetensors", out / "text.safetensors", out / "start.safetensors")
        for command in commands(part, out):
            run_command(command, f"{part}: ")
        seconds[part] = round(time.perf_counter() - begun)
        write_text(record, json.dumps(seconds, indent=1) + "\n")
    return seconds


def publish(out: Path, assets: Path) -> None:
    """Copy the models to assets/, where sample.py and train.py expect them."""
    if not (out / "tiny.safetensors").is_file():
        raise UserError(f"{out}/tiny.safetensors is not there: make the part video first")
    shutil.copyfile(out / "tiny.safetensors", assets / "tiny.safetensors")
    shutil.copyfile(out / "judge.safetensors", assets / "judge.safetensors")
    for name in ("faces", "gemma"):
        shutil.copytree(out / name, assets / name, dirs_exist_ok=True)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/tiny", help="working folder (%(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="by comma (%(default)s)")
    parser.add_argument("--publish", action="store_true", help="then replace the models in assets/")
    options = parser.parse_args()
    parts, out = options.parts.split(","), Path(options.out)
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--parts has {', '.join(sorted(unknown))}: it takes {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    for part in sorted(parts, key=PARTS.index):
        seconds = make(part, out)
    if options.publish:
        publish(out, ASSETS)
    for part, duration in seconds.items():
        print(f"{part:10}{duration / 60:6.1f} min on {hardware()}")


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Make the cache that train.py reads, out of a list of clips.

    python prepare.py --manifest clips.jsonl --ckpt ltx-2.3-22b-dev.safetensors --out cache
    torchrun --nproc-per-node 8 prepare.py ...            # on 8 GPUs; run it again after any interruption
    python prepare.py show cache                          # what a cache holds, and what to mend: a page
    python prepare.py vip200k --annotations vip200k.json --videos videos --out vip200k.jsonl

clips/manifest.py lists the columns of a manifest.
"""

import common  # isort: skip  # noqa: F401 (before torch: sets the wait policy of its threads)

import argparse
import sys
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from clips.buckets import ENLARGE, read_bucket
from clips.cache import prepare
from clips.show import show
from clips.vip200k import vip200k
from common.cache import CachedClips
from common.device import own_place, resolve_device
from common.errors import Parser, UserError, one_line_errors, whole_file
from common.outputs import refuse_overwrite
from common.schema import Count, PositiveFloat, record, validate
from config import ASSETS
from text import GEMMA


@record
class Numbers:
    """Ranges of the options that are numbers; the VAE and the machine's memory decide about sizes."""

    fps: Annotated[float, Field(ge=0.1, le=1000)] | None
    shard_gb: PositiveFloat
    seed: Count
    enlarge: Annotated[float, Field(ge=1, le=100)] | None
    windows: Annotated[int, Field(ge=1, le=1000)]
    min_similarity: Annotated[float, Field(ge=-1, le=1)] | None
    workers: Annotated[int, Field(ge=1, le=256)]


def main() -> None:
    command, *arguments = sys.argv[1:] or [""]
    if command == "show":
        look(arguments)
    elif command == "vip200k":
        make_manifest(arguments)
    else:
        make_cache(sys.argv[1:])


def make_cache(arguments: list[str]) -> None:
    parser = Parser(prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", required=True, help="CSV or JSONL of clips")
    parser.add_argument("--ckpt", help="an LTX-2.3 checkpoint, for its VAE and text projection (default: the tiny one)")
    parser.add_argument("--gemma", help=f"folder or hub name of Gemma 3 (default: {GEMMA}, or the tiny one)")
    parser.add_argument("--faces", help="insightface model pack, name or folder (default: buffalo_l, or the tiny one)")
    parser.add_argument("--out", required=True, help="folder of the cache")
    sizes = "sizes of clips, HEIGHTxWIDTHxFRAMES, the main one first (default: fifteen around the checkpoint's size)"
    parser.add_argument("--buckets", nargs="+", metavar="SIZE", help=sizes)
    text = f"small clips are enlarged up to this factor, smaller ones left out (default: {ENLARGE})"
    parser.add_argument("--enlarge", type=float, metavar="FACTOR", help=text)
    parser.add_argument("--windows", type=int, default=1, help="most clips to cut out of a long row (%(default)s)")
    parser.add_argument("--height", type=int, help="one size instead of buckets; pixels (default: the checkpoint's)")
    parser.add_argument("--width", type=int, help="pixels, likewise")
    parser.add_argument("--frames", type=int, help="likewise; a multiple of the VAE's cell, and 1")
    parser.add_argument("--fps", type=float, help="frames per second (default: the checkpoint's)")
    where = (
        "for rows without one: a face from another clip of its identity if there is one, or the same clip (%(default)s)"
    )
    parser.add_argument("--reference", choices=["other", "same"], default="other", help=where)
    parser.add_argument("--require-face-in-video", action="store_true", help="leave out clips without one midway")
    text = "leave out clips whose faces have all a lower cosine similarity with the reference"
    parser.add_argument("--min-similarity", type=float, metavar="X", help=text)
    parser.add_argument("--shard-gb", type=float, default=2.0, help="about the size of a shard (%(default)s)")
    parser.add_argument("--device", help="default: this rank's GPU, else cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="decides which frames references are cut from")
    parser.add_argument("--workers", type=int, default=4, help="threads that read videos ahead (%(default)s)")
    options, place = parser.parse_args(arguments), own_place()
    validate(Numbers, {key: getattr(options, key) for key in Numbers.__dataclass_fields__}, "options")
    options.buckets = options.buckets and [read_bucket(text) for text in options.buckets]
    if options.device is None:
        options.device = f"cuda:{place.local_rank}" if torch.cuda.is_available() else "cpu"
    options.device, options.dtype = resolve_device(options)
    if tiny := options.ckpt is None:
        options.ckpt = ASSETS / "tiny.safetensors"
        if place.rank == 0:
            print("no --ckpt: this cache is for the tiny model, and its detector knows drawn faces only")
    options.gemma = options.gemma or (ASSETS / "gemma" if tiny else GEMMA)
    options.faces = options.faces or (ASSETS / "faces" if tiny else "buffalo_l")
    prepare(**vars(options))


def make_manifest(arguments: list[str]) -> None:
    parser = Parser(prog="prepare.py vip200k", description="Write a manifest from VIP-200K's annotations.")
    parser.add_argument("--annotations", required=True, help="the JSON file")
    parser.add_argument("--videos", required=True, help="folder with <YouTube id>.mp4, .webm, ...")
    parser.add_argument("--out", required=True, help="the manifest, .jsonl")
    parser.add_argument("--seed", type=int, default=0, help="decides which of a person's faces is the reference")
    options = parser.parse_args(arguments)
    validate(Count, options.seed, "--seed")
    refuse_overwrite([options.out], [options.annotations])
    for name, count in vip200k(**vars(options)).items():
        print(f"{name:24}{count:>10,}")
    print(f"wrote {options.out}")


def look(arguments: list[str]) -> None:
    text = "Write a page that shows a cache before training: clips, figures, and what to mend."
    parser = Parser(prog="prepare.py show", description=text)
    parser.add_argument("cache", type=Path, help="its folder")
    parser.add_argument("--out", type=Path, help="the page, .html (default: show.html in the cache)")
    parser.add_argument("--seed", type=int, default=0, help="decides which clips are shown by chance")
    options = parser.parse_args(arguments)
    validate(Count, options.seed, "--seed")
    out = options.out or options.cache / "show.html"
    if out.suffix != ".html":
        raise UserError(f"--out {out} does not end in .html")
    clips = CachedClips(options.cache)
    with whole_file(out) as temporary:
        lines = show(clips, temporary, options.seed)
    print(*lines, f"wrote {out}", sep="\n")


if __name__ == "__main__":
    with one_line_errors():
        main()

"""A face photo and a prompt in, a video of that person out.

    python sample.py --ref face.jpg --prompt "A woman in a red coat turns to the camera and smiles."
    python sample.py --ckpt ltx-2.3-22b-dev.safetensors --ref face.jpg --prompt "..."      # full size
    python sample.py --ckpt ltx-2.3-22b-dev.safetensors --lora face.safetensors:0.8 ...    # with a LoRA merged in
    python sample.py --ckpt ltx-2.3-22b-dev.safetensors --check                            # is the file whole?
    torchrun --nproc_per_node=3 sample.py --ckpt ... --ref face.jpg --prompt "..."         # a stream of Eq. 13 each
    torchrun --nproc_per_node=8 sample.py --ckpt ... --batch cases.jsonl --out videos      # many; cases.py, batch.py

Without --ckpt it uses the tiny model in assets/. The order of work keeps memory low: Gemma reads all prompts and is
freed, then VAE and DiT are loaded.
"""

import argparse
import json
import os
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from checkpoint import Checkpoint, open_checkpoint
from common.device import DTYPES, free, resolve_device
from common.errors import Parser, UserError, one_line_errors
from common.media import contact_sheet, read_image, to_tensor, to_uint8, write_video
from config import ASSETS
from data import FITS
from engine.check import check
from engine.fp8 import load_fp8
from engine.lora import LoRA, merge_lora, merged
from engine.offload import offload
from engine.parallel import join_processes
from engine.recipe import PRESETS, begin_with, resolve_loras, resolve_settings
from evaluation.batch import Batch
from evaluation.cases import Case, read_cases
from evaluation.metrics import FaceReader, face_sim
from guidance import generate, needed_streams
from model import LTXVideo
from rope import PLACEMENTS
from text import GEMMA, TextConnector, TextEncoder
from vae import VideoVAE

BAR = "{desc}: {n}/{total} steps {bar:30} {rate_inv_fmt}, {remaining} left"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", help="photo of the face; without it, plain text-to-video")
    parser.add_argument("--prompt", help="what the video shows")
    parser.add_argument("--negative", default="", help="what the unconditional stream is told (default: nothing)")
    parser.add_argument(
        "--batch", metavar="CASES", help="JSONL of id, reference, prompt, seed: a video of each (cases.py)"
    )
    parser.add_argument("--out", help="the video (out/sample.mp4; a contact sheet beside it), or the batch's folder")
    parser.add_argument("--ckpt", help="an LTX-2.3 checkpoint (default: the tiny one in assets/)")
    parser.add_argument("--gemma", help=f"folder or hub name of Gemma 3 (default: {GEMMA})")
    parser.add_argument("--height", type=int, help="pixels (default 480, or the checkpoint's own)")
    parser.add_argument("--width", type=int, help="pixels (default 832, or the checkpoint's own)")
    parser.add_argument("--frames", type=int, help="8k+1 (default 121, or the checkpoint's own)")
    parser.add_argument("--fps", type=float, help="frames per second (default 24, or the checkpoint's own)")
    parser.add_argument("--steps", type=int, help="Euler steps (default 30, or the checkpoint's own)")
    parser.add_argument("--s-text", type=float, help="s_y of Eq. 13, strength of the prompt (default 5.0)")
    parser.add_argument("--s-ref", type=float, help="s_r of Eq. 13, strength of the reference (default 7.5)")
    parser.add_argument("--placement", choices=list(PLACEMENTS), help="where the reference sits (default: tass, Eq. 4)")
    parser.add_argument("--fit", choices=list(FITS), help="how the photo becomes one of the video's shape (letterbox)")
    parser.add_argument("--source-id", type=int, help="for --placement phase (default 2)")
    parser.add_argument("--phase-scale", type=float, help="for --placement phase (default 1)")
    parser.add_argument("--ref-timestep", choices=["clean", "shared"], help="its tokens say t = 0, or the video's t")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="may be repeated")
    parser.add_argument("--preset", choices=list(PRESETS), help="what a LoRA without our metadata was trained with")
    parser.add_argument("--prompt-prefix", help="what the prompt is made to begin with (default: nothing)")
    parser.add_argument(
        "--faces", help="model pack that says how like the photo the faces are (default: the tiny model's own, or none)"
    )
    parser.add_argument("--samples", type=int, default=1, help="videos to make, with seeds SEED, SEED+1, ...")
    parser.add_argument("--seed", type=int, default=0, help="one seed is one video, on every device")
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # under torchrun each process has the GPU of its number
    parser.add_argument("--device", default=gpu if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile a block: a slow start, faster steps")
    parser.add_argument("--fp8", action="store_true", help="DiT weights in 8 bits: half the memory")
    parser.add_argument("--offload", action="store_true", help="DiT weights in host memory, streamed block by block")
    parser.add_argument("--text-on-cpu", action="store_true", help="Gemma in host memory: slower, no GPU memory")
    parser.add_argument("--check", action="store_true", help="only say whether the checkpoint is whole, and its sizes")
    options = parser.parse_args()
    options.out = options.out or ("out/batch" if options.batch else "out/sample.mp4")
    return options


def main() -> None:
    options = parse_arguments()
    ranks = (0, 1)
    if "RANK" in os.environ and not options.batch and not options.check:
        join_processes()
        ranks = dist.get_rank(), dist.get_world_size()
    with redirect_stdout(None) if ranks[0] else nullcontext():
        make(options, ranks)
    if dist.is_initialized():
        dist.destroy_process_group()


def make(options: argparse.Namespace, ranks: tuple[int, int]) -> None:
    """All videos asked for. `ranks`: this process's number, and how many share the streams of each video."""
    # ---- what to make; everything that can be wrong is found before anything slow begins
    path = options.ckpt or ASSETS / "tiny.safetensors"
    checkpoint = Checkpoint(path)
    if options.check:
        return check(checkpoint)
    loras = resolve_loras(options, checkpoint)
    settings = resolve_settings(options, checkpoint, loras)
    for part in (LTXVideo, TextConnector, VideoVAE):
        part.from_checkpoint(path, device="meta")  # every name and shape, before Gemma reads the prompt
    device, dtype = resolve_device(options)
    size, told = (settings["height"], settings["width"]), settings | {"negative": options.negative}
    told |= {"fp8": True} if options.fp8 else {}
    told |= {"checkpoint": Path(path).name, "loras": [f"{lora.path.name}:{lora.strength:g}" for lora in loras]}
    fit, prefix = settings.pop("fit"), settings.pop("prompt_prefix")
    if options.batch:
        cases = read_cases(options.batch)
        batch = Batch(options.out, told)
        jobs, alone = {case: batch.video(case) for case in batch.missing(cases)}, batch.one_case
    else:
        reference = Path(options.ref) if options.ref else None
        count = sum(needed_streams(settings["s_y"], settings["s_r"], reference is not None))
        if ranks[1] > count:
            raise UserError(f"{ranks[1]} processes and {count} streams to share: use --nproc_per_node={count}")
        jobs = {Case("", reference, options.prompt, seed): out for seed, out in resolve_outputs(options)}
        batch, alone = None, nullcontext  # what is wrong ends the run
    sound = []
    for case in jobs:
        with alone(case):
            if batch:
                batch.check(case)
            read_reference(case, *size, fit)
            sound.append(case)
    if not sound:
        return batch.finish(cases)
    if checkpoint.ours.get("weights") == "random":
        print(f"note: the weights in {path} are random, not trained: the video will be noise")
    reader = read_faces(options, device) if any(case.reference for case in sound) and not ranks[0] else None

    # ---- prompts to contexts; Gemma is gone when this is done
    reads_on = torch.device("cpu") if options.text_on_cpu else device
    encoder = TextEncoder.from_checkpoint(path, options.gemma or default_gemma(options), reads_on, dtype)
    contexts = {}  # on the CPU: 8 MB each at full size
    for prompt in tqdm(dict.fromkeys(case.prompt for case in sound), "prompts", disable=len(sound) == 1):
        asked = begin_with(prefix, prompt)
        contexts[prompt] = encoder.encode([asked, options.negative]).cpu().split(1)
    del encoder
    free(device)

    # ---- noise to video
    vae = VideoVAE.from_checkpoint(path, device, dtype)
    model = load_dit(options, path, loras, device, dtype)
    bar = partial(tqdm, unit="step", bar_format=BAR, disable=ranks[0] > 0)
    for case in sound:
        with alone(case):
            photo = read_reference(case, *size, fit)
            context, null_context = (part.to(device) for part in contexts[case.prompt])
            video = generate(
                model,
                vae,
                context,
                null_context,
                to_tensor(photo) if photo else None,
                seed=case.seed,
                progress=partial(bar, desc=case.id or f"seed {case.seed}"),
                ranks=ranks,
                **settings,
            )
            if video is not None:
                write_sample(jobs[case], case, photo, to_uint8(video), told, reader)
    if device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    if batch:
        batch.finish(cases)


def load_dit(
    options: argparse.Namespace, path: str | Path, loras: list[LoRA], device: torch.device, dtype: torch.dtype
) -> LTXVideo:
    """The DiT with its LoRAs, stored and run as --fp8, --offload and --compile say."""
    # A card that is too small for the model in bf16 never sees it in bf16.
    first = "cpu" if options.offload else device
    if options.fp8:
        checkpoint = open_checkpoint(path)
        with torch.device("meta"):
            model = LTXVideo(checkpoint.config["transformer"])
        changes = {layer: partial(merged, layer=layer, loras=loras) for lora in loras for layer in lora.pairs}
        load_fp8(model, checkpoint, first, dtype, changes)
    else:
        model = merge_lora(LTXVideo.from_checkpoint(path, first, dtype), loras)
    model = offload(model, device) if options.offload else model.to(device)
    return model.compile_blocks() if options.compile else model


def read_reference(case: Case, height: int, width: int, fit: str) -> Image.Image | None:
    """The photo in the video's shape; None for plain text-to-video."""
    return FITS[fit](read_image(case.reference), height, width) if case.reference else None


def read_faces(options: argparse.Namespace, device: torch.device) -> FaceReader | None:
    """What compares the video's faces with the photo's, or None where nothing is to do that."""
    pack = options.faces or (None if options.ckpt else ASSETS / "faces")
    return FaceReader(pack, device=device, det_size=None if options.faces else 128) if pack else None


def likeness(reader: FaceReader, photo: Image.Image, frames: np.ndarray) -> str:
    """FaceSim of metrics.py over all frames, in words."""
    reference, faces = reader.read(np.array(photo)[None]), reader.read(frames)
    if not reference.found.any():
        return "no face was found in the photo"
    found = int(faces.found.sum())
    score = face_sim(faces.arc, reference.arc[0], faces.found)
    return f"similarity to the photo {score:.2f} (ArcFace), a face in {found} of {len(frames)} frames"


def write_sample(
    out: Path, case: Case, photo: Image.Image | None, frames: np.ndarray, told: dict, reader: FaceReader | None
) -> None:
    """The video, with all that it was made from in its metadata, then its contact sheet; how like the photo it is."""
    asked = begin_with(told["prompt_prefix"], case.prompt)
    used = told | {"prompt": asked, "seed": case.seed, "ref": str(case.reference) if case.reference else None}
    write_video(out, frames, told["fps"], json.dumps(used))
    contact_sheet(out.with_suffix(".png"), photo, frames)
    print(f"wrote {out} ({len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}) and {out.with_suffix('.png')}")
    if reader and photo:
        print(likeness(reader, photo, frames))


def resolve_outputs(options: argparse.Namespace) -> list[tuple[int, Path]]:
    """Seed and file of each video. The folder is made now, so that a bad one fails before the work."""
    out = Path(options.out)
    if out.suffix.lower() != ".mp4":
        raise UserError(f"--out {out} does not end in .mp4")
    if options.samples < 1:
        raise UserError(f"--samples {options.samples} is not above 0")
    seeds = range(options.seed, options.seed + options.samples)
    outputs = [(seed, out.with_stem(f"{out.stem}-{seed}") if len(seeds) > 1 else out) for seed in seeds]
    for _, video in outputs:
        if options.ref and Path(options.ref).resolve() == video.with_suffix(".png").resolve():
            raise UserError(f"the contact sheet of {video} would replace --ref {options.ref}: name another --out")
        if video.is_dir():
            raise UserError(f"--out {video} is a folder: name a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    return outputs


def default_gemma(options: argparse.Namespace) -> str | Path:
    return GEMMA if options.ckpt else ASSETS / "gemma"


if __name__ == "__main__":
    with one_line_errors():
        main()

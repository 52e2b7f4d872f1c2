"""A face photo and a prompt in, a video of that person out.

    python sample.py --ref face.jpg --prompt "A woman in a red coat turns to the camera and smiles."
    python sample.py --ckpt ltx-2.3-22b-dev.safetensors --ref face.jpg --prompt "..."      # full size
    python sample.py --ckpt ltx-2.3-22b-dev.safetensors --lora face.safetensors:0.8 ...    # with a LoRA merged in
    python sample.py --ckpt ltx-2.3-22b-dev.safetensors --check                            # is the file complete?
    torchrun --nproc_per_node=3 sample.py --ckpt ... --ref face.jpg --prompt "..."         # a process per stream
    torchrun --nproc_per_node=8 sample.py --ckpt ... --batch cases.jsonl --out videos      # a video for each line

Without --ckpt sample.py uses the tiny model in assets/: drawn people on 64x64 pixels. An option whose help names no
default takes the checkpoint's value. If the checkpoint has none: 832x480 (width x height), 121 frames, 24 fps, 30
steps, --s-text 5.0, --s-ref 7.5. The order of work keeps memory low: Gemma reads all prompts and is freed, then VAE
and DiT are loaded.
"""

import common  # isort: skip  # noqa: F401 (before torch: sets the wait policy of its threads)

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

from checkpoint import Checkpoint
from common.device import free, resolve_device
from common.errors import Parser, UserError, one_line_errors, whole
from common.media import contact_sheet, read_image, to_tensor, to_uint8, write_video
from common.outputs import refuse_folders, refuse_overwrite
from common.video import FORMATS
from config import ASSETS
from data import FITS
from engine.check import check
from engine.lora_files import merge_lora
from engine.notes import notes_on_photo, notes_on_prompt, notes_on_recipe
from engine.parallel import join_processes
from engine.recipe import Recipe, add_model_options, begin_with, default_gemma, resolve_loras, resolve_recipe
from engine.sampling import face_reader, likeness, load_dit, require_picture
from evaluation.batch import Batch
from evaluation.cases import Case, read_cases
from evaluation.metrics import FaceReader
from guidance import generate, stream_weights
from model import LTXVideo
from rope import PLACEMENTS
from text import TextConnector, TextEncoder
from vae import VideoVAE

BAR = "{desc}: {n}/{total} steps {bar:30} {rate_inv_fmt}, {remaining} left"


def main() -> None:
    options = parse_arguments()
    ranks = (0, 1)  # processes of a --batch exchange nothing, so each is alone
    if "RANK" in os.environ and not options.batch and not options.check:
        join_processes()
        ranks = dist.get_rank(), dist.get_world_size()
    with redirect_stdout(None) if ranks[0] else nullcontext():  # rank 0 alone prints
        make(options, ranks)
    if dist.is_initialized():
        dist.destroy_process_group()


def make(options: argparse.Namespace, ranks: tuple[int, int]) -> None:
    """Make all videos. `ranks` = (rank, world): this process, and how many share the streams of each video."""
    # ---- the videos to make; all checks that need neither Gemma nor the DiT
    checkpoint = Checkpoint(options.ckpt or ASSETS / "tiny.safetensors", options.base)
    if options.check:
        return check(checkpoint)
    loras = resolve_loras(options, checkpoint)
    recipe = resolve_recipe(options, checkpoint, loras)
    for part in (LTXVideo, TextConnector, VideoVAE):
        part.from_checkpoint(checkpoint, device="meta")  # check names and shapes before Gemma runs
    device, dtype = resolve_device(options)
    metadata = recipe.for_metadata() | {"negative": options.negative, "checkpoint": checkpoint.path.name}
    metadata |= {"fp8": True} if options.fp8 else {}
    metadata |= {"loras": [f"{lora.path.name}:{lora.strength:g}" for lora in loras]}
    if options.batch:
        cases = read_cases(options.batch)
        inputs = [options.batch, checkpoint.path, *(lora.path for lora in loras)]
        batch = Batch(options.out, metadata, cases, inputs)
        outputs = {case: batch.video(case) for case in batch.missing()}
        one_case = batch.one_case  # an error is noted, and the other cases go on
    else:
        batch, one_case = None, nullcontext  # an error ends the run
        outputs = single_outputs(options, recipe, ranks[1])
    ready = []
    for case in outputs:
        with one_case(case):
            if batch:
                batch.check(case)
            read_reference(case, recipe)  # a photo that cannot be read fails here, not after minutes
            ready.append(case)
    if not ready:  # only in a --batch
        return batch.finish()
    seeds = ", ".join(str(case.seed) for case in ready[:8]) + (", ..." if len(ready) > 8 else "")
    print(f"{checkpoint.path.name}: {recipe.line()}, seed {seeds}")
    if checkpoint.ours.get("weights") == "random":
        note(f"the weights in {checkpoint.path} are random, not trained: the video will be noise")
    ref_paths = dict.fromkeys(case.reference for case in ready if case.reference)
    reader = face_reader(options, device) if ref_paths and not ranks[0] else None
    note(*notes_on_recipe(checkpoint, loras, recipe, bool(ref_paths)))
    if reader:
        for ref_path in ref_paths:
            note(*notes_on_photo(read_image(ref_path), reader.detector, checkpoint, recipe), about=ref_path.name)

    # ---- prompts to contexts; Gemma is gone when this is done
    gemma = options.gemma or default_gemma(checkpoint)
    text_device = torch.device("cpu") if options.text_on_cpu else device
    encoder = TextEncoder.from_checkpoint(checkpoint, gemma, text_device, dtype)
    merge_lora(encoder.connector, loras)
    contexts = {}  # on the CPU, of the prompt and the negative one: 16 MiB at full size
    prompts = dict.fromkeys(case.prompt for case in ready)
    for prompt in tqdm(prompts, "prompts", disable=ranks[0] > 0 or len(prompts) == 1):
        positive = begin_with(recipe.prompt_prefix, prompt)
        note(*notes_on_prompt(positive, encoder))
        contexts[prompt] = encoder.encode([positive, options.negative]).cpu().split(1)
    del encoder
    free(device)

    # ---- noise to video
    vae = VideoVAE.from_checkpoint(checkpoint, device, dtype)
    model = load_dit(options, checkpoint, loras, device, dtype)
    bar = partial(tqdm, unit="step", bar_format=BAR, disable=ranks[0] > 0)
    for case in ready:
        with one_case(case):
            ref_image = read_reference(case, recipe)
            context, null_context = (part.to(device) for part in contexts[case.prompt])
            # for_generate: size, frames, fps, steps, s_y, s_r, placement; step cache and interval of guidance.
            video = generate(
                model,
                vae,
                context,
                null_context,
                to_tensor(ref_image) if ref_image else None,
                seed=case.seed,
                progress=partial(bar, desc=case.id or f"seed {case.seed}"),
                ranks=ranks,
                **recipe.for_generate(),
            )
            if video is not None:
                require_picture(video)
                write_sample(outputs[case], case, ref_image, to_uint8(video), metadata, reader)
    if device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    if batch:
        batch.finish()


def note(*lines: str, about: str = "") -> None:
    """Print each note on its own line."""
    for line in lines:
        print(f"note: {f'{about}: ' if about else ''}{line}")


def read_reference(case: Case, recipe: Recipe) -> Image.Image | None:
    """The photo in the video's shape; None for plain text-to-video."""
    if case.reference is None:
        return None
    return FITS[recipe.reference.fit](read_image(case.reference), recipe.height, recipe.width)


def write_sample(
    out: Path,
    case: Case,
    ref_image: Image.Image | None,
    frames: np.ndarray,
    metadata: dict,
    reader: FaceReader | None,
) -> None:
    """Write the video, with the recipe in its metadata, and its contact sheet. Print the similarity to the photo."""
    prompt = begin_with(metadata["prompt_prefix"], case.prompt)
    ref_path = str(case.reference) if case.reference else None
    comment = json.dumps(metadata | {"prompt": prompt, "seed": case.seed, "ref": ref_path})
    write_video(out, frames, metadata["fps"], comment)
    contact_sheet(out.with_suffix(".png"), ref_image, frames, title=prompt)
    print(f"wrote {out} ({len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}) and {out.with_suffix('.png')}")
    if reader and ref_image:
        print(likeness(reader, ref_image, frames))


def single_outputs(options: argparse.Namespace, recipe: Recipe, processes: int) -> dict[Case, Path]:
    """The cases without --batch, and their files. The folder is made here, so an unusable one fails early."""
    out, ref_path = Path(options.out), Path(options.ref) if options.ref else None
    streams = sum(weight != 0 for weight in stream_weights(recipe.s_text, recipe.s_ref, ref_path is not None))
    if processes > streams:
        raise UserError(f"there are {processes} processes for {streams} streams: use --nproc_per_node={streams}")
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out} does not end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    seeds = range(options.seed, options.seed + options.samples)
    outputs = {}
    for seed in seeds:
        video = out.with_stem(f"{out.stem}-{seed}") if len(seeds) > 1 else out
        sheet = video.with_suffix(".png")
        refuse_folders(video, sheet)
        earlier = any(video.with_suffix(ending).exists() for ending in FORMATS)
        if sheet.exists() and not earlier:  # a sheet of ours has its video beside it
            raise UserError(f"{sheet} is there, and the contact sheet would replace it: give another --out")
        outputs[Case("", ref_path, options.prompt, seed)] = video
    inputs = [options.ref, options.ckpt, options.base, *(text.rpartition(":")[0] or text for text in options.lora)]
    refuse_overwrite([name for video in outputs.values() for name in (video, video.with_suffix(".png"))], inputs)
    out.parent.mkdir(parents=True, exist_ok=True)
    return outputs


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", help="photo of the face; without it, plain text-to-video")
    parser.add_argument("--prompt", help="content of the video")
    parser.add_argument("--negative", default="", help="prompt of the unconditional stream (default: empty)")
    parser.add_argument("--batch", metavar="CASES", help="JSONL of id, reference, prompt, seed: one video per line")
    parser.add_argument(
        "--out", help="video, .mp4, .gif or .webp (out/sample.mp4; a contact sheet beside), or folder of a --batch"
    )
    add_model_options(parser)
    parser.add_argument("--height", type=int, help="pixels; a multiple of 32 (tiny model: of 8)")
    parser.add_argument("--width", type=int, help="pixels; a multiple of 32 (tiny model: of 8)")
    parser.add_argument("--frames", type=int, help="8k+1 (tiny model: 4k+1)")
    parser.add_argument("--fps", type=float, help="frames per second")
    parser.add_argument("--steps", type=int, help="Euler steps")
    parser.add_argument("--s-text", type=float, help="s_y of Eq. 13, strength of the prompt")
    parser.add_argument("--s-ref", type=float, help="s_r of Eq. 13, strength of the reference")
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="noise levels with guidance, others compute one stream (default: all)",
    )
    parser.add_argument(
        "--cache", type=float, metavar="SHARE", help="reuse blocks where the first changes less than this, e.g. 0.08"
    )
    parser.add_argument("--placement", choices=list(PLACEMENTS), help="place of the reference (default: tass, Eq. 4)")
    parser.add_argument("--fit", choices=list(FITS), help="how the photo gets the video's shape (default: letterbox)")
    parser.add_argument("--source-id", type=int, help="source number, for --placement phase (default 2)")
    parser.add_argument("--phase-scale", type=float, help="strength, for --placement phase (default 1)")
    parser.add_argument(
        "--ref-timestep", choices=["clean", "shared"], help="reference tokens at t = 0, or the video's t"
    )
    parser.add_argument("--prompt-prefix", help="beginning of every prompt (default: none)")
    parser.add_argument("--samples", type=whole(1, 10_000), default=1, help="videos, with seeds SEED, SEED+1, ...")
    parser.add_argument("--seed", type=int, help="of the noise; the same noise on any device (default 0)")
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # under torchrun each process has the GPU of its number
    parser.add_argument("--device", default=gpu if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile a block: a slow start, faster steps")
    parser.add_argument(
        "--check",
        action="store_true",
        help="print parts and sizes of the checkpoint and whether it is complete; make no video",
    )
    options = parser.parse_args()
    for name in ("ref", "batch", "out", "ckpt", "base", "gemma", "faces"):
        if getattr(options, name) is not None and not getattr(options, name).strip():
            raise UserError(f"--{name} is empty: give a name, or leave it out")
    if options.batch and (options.prompt or options.ref or options.samples != 1 or options.seed is not None):
        raise UserError(
            "--batch has its own references, prompts and seeds: leave out --prompt, --ref, --samples, --seed"
        )
    if not options.batch and not options.check and not (options.prompt or "").strip():
        raise UserError('the prompt is empty: describe the video with --prompt "..."')
    for name in ("prompt", "negative", "prompt_prefix"):
        # Python turns a byte that is not UTF-8 into one of these code points.
        if any("\ud800" <= letter <= "\udfff" for letter in getattr(options, name) or ""):
            raise UserError(f"--{name.replace('_', '-')} is not UTF-8 text")
    options.seed = 0 if options.seed is None else options.seed
    if not 0 <= options.seed < 2**63 - options.samples:
        raise UserError(f"--seed {options.seed} is not between 0 and 2^63")
    options.out = options.out or ("out/batch" if options.batch else "out/sample.mp4")
    return options


if __name__ == "__main__":
    with one_line_errors():
        main()

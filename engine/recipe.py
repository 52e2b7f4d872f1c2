"""The recipe of a video: options before presets, LoRAs, the checkpoint's own metadata, and last the paper."""

import argparse
import math

import torch

from checkpoint import Checkpoint, distilled_sign
from common.errors import UserError
from engine.lora import REFERENCE, LoRA, describe, parse_lora, told_by, wanted_by
from guidance import DISTILLED_SIGMAS
from model import LTXVideo
from vae import check_size, latent_scale

PAPER = {"height": 480, "width": 832, "frames": 121, "fps": 24.0, "steps": 30, "s_text": 5.0, "s_ref": 7.5}
PRESETS = {  # for LoRAs whose metadata does not say what they want
    # LTX-Best-Face-ID. The guidance is our choice, since we know of none documented: equal scales, so two streams.
    "best-face-id": REFERENCE
    | {"placement": "phase", "fit": "cover", "prompt_prefix": "ref_t2v: ", "s_text": 3.0, "s_ref": 3.0}
}
DISTILLED = {"steps": len(DISTILLED_SIGMAS) - 1, "s_text": 1.0, "s_ref": 1.0}  # one stream, with the reference


def begin_with(prefix: str, prompt: str) -> str:
    """The prompt with what a LoRA's prompts begin with, once."""
    return prompt if prompt.startswith(prefix) else prefix + prompt


def resolve_loras(options: argparse.Namespace, checkpoint: Checkpoint) -> list[LoRA]:
    """The LoRA files, checked against the model; their weights are read when they are merged."""
    with torch.device("meta"):
        model = LTXVideo(checkpoint.config["transformer"]) if options.lora else None
    loras = [LoRA(path, model, strength) for path, strength in map(parse_lora, options.lora)]
    for lora in loras:
        print(f"lora: {describe(lora)}")
    return [lora for lora in loras if lora.strength]  # at strength 0 it is as if it had not been named


def resolve_settings(options: argparse.Namespace, checkpoint: Checkpoint, loras: list[LoRA] = ()) -> dict:
    """What `generate` is told, and "fit" and "prompt_prefix". The user's options come first, then what a distilled
    model needs, the preset, what the LoRAs say, the checkpoint's own defaults, the paper's."""
    if options.batch and (options.prompt or options.ref or options.samples != 1):
        raise UserError("--batch has references, prompts and seeds of its own: leave out --prompt, --ref and --samples")
    if not options.batch and (options.prompt is None or not options.prompt.strip()):
        raise UserError('the prompt is empty: say what the video shows with --prompt "..."')
    preset = PRESETS.get(options.preset, {})
    given = {key: v for key in (*PAPER, *REFERENCE, "prompt_prefix") if (v := getattr(options, key)) is not None}
    settings = PAPER | REFERENCE | {"prompt_prefix": ""} | told_by(checkpoint.ours)
    if wanted := wanted_by(loras, preset | given):
        print(f"from the LoRA's metadata: {', '.join(f'{key} {value!r}' for key, value in wanted.items())}")
    settings |= wanted | preset
    signs = {file.path: distilled_sign(file.path, file.metadata) for file in (checkpoint, *loras)}
    if found := [f"{path} is distilled, says {sign}" for path, sign in signs.items() if sign]:
        settings |= DISTILLED
        print(f"{found[0]}: {DISTILLED['steps']} steps of its own schedule, without guidance, unless you say otherwise")
    settings |= given
    if found and settings["steps"] == DISTILLED["steps"]:
        settings["sigmas"] = DISTILLED_SIGMAS
    if preset:
        used = [f"{key} {settings[key]!r}{' (yours)' if key in given else ''}" for key in preset]
        print(f"preset {options.preset}: {', '.join(used)}")
    check_size(latent_scale(checkpoint.config["vae"]), settings["frames"], settings["height"], settings["width"])
    for name in ("fps", "s_text", "s_ref"):
        if not math.isfinite(settings[name]):
            raise UserError(f"--{name.replace('_', '-')} {settings[name]} is not a finite number")
    if not 0 <= options.seed < 2**63 - options.samples:
        raise UserError(f"--seed {options.seed} is not between 0 and 2^63")
    for name in ("fps", "steps"):
        if settings[name] <= 0:
            raise UserError(f"--{name} {settings[name]} is not above 0")
    settings["s_y"], settings["s_r"] = settings.pop("s_text"), settings.pop("s_ref")
    return settings

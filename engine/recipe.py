"""The recipe of a video: options before presets, LoRAs, the checkpoint's own metadata, and last the paper."""

import argparse
import math

from checkpoint import Checkpoint, distilled_sign
from common.errors import UserError
from config import ASSETS
from engine.lora_files import REFERENCE, LoRA, describe, open_loras, settings_of, settings_of_loras
from guidance import DISTILLED_SIGMAS
from vae import latent_scale

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
    """The LoRAs of --lora, checked against the model and finite. One of strength 0 is checked and left out."""
    loras = open_loras(options.lora, checkpoint, options.lora_ignore_unknown)
    for lora in loras:
        print(f"lora: {describe(lora)}")
    return [lora for lora in loras if lora.strength]


def text_encoder(checkpoint: Checkpoint) -> str | None:
    """The text encoder that a checkpoint needs: "embedded" for the model in assets/ and for all that is made from it,
    None for Gemma 3 12B. An export and a merged file carry it as `gemma` in their metadata."""
    embedded = checkpoint.path.resolve() == (ASSETS / "tiny.safetensors").resolve()
    return "embedded" if embedded else checkpoint.ours.get("gemma")


def export_guidance(config: dict, base: Checkpoint) -> dict:
    """The guidance scales that an export carries as defaults: those of the run's config where it changed them, else
    the base model's own, else the paper's."""
    defaults = base.ours.get("defaults", {})
    scales = {key: config["guidance"][key] for key in ("s_text", "s_ref")}
    return {key: defaults.get(key, value) if value == PAPER[key] else value for key, value in scales.items()}


def resolve_settings(options: argparse.Namespace, checkpoint: Checkpoint, loras: list[LoRA] = ()) -> dict:
    """What `generate` is told, and "fit" and "prompt_prefix". The user's options come first, then what a distilled
    model needs, the preset, what the LoRAs say, the checkpoint's own defaults, the paper's."""
    if options.batch and (options.prompt or options.ref or options.samples != 1):
        raise UserError("--batch has references, prompts and seeds of its own: leave out --prompt, --ref and --samples")
    if not options.batch and (options.prompt is None or not options.prompt.strip()):
        raise UserError('the prompt is empty: say what the video shows with --prompt "..."')
    preset = PRESETS.get(options.preset, {})
    given = {key: v for key in (*PAPER, *REFERENCE, "prompt_prefix") if (v := getattr(options, key)) is not None}
    settings = PAPER | REFERENCE | {"prompt_prefix": ""} | settings_of(checkpoint.ours)
    if wanted := settings_of_loras(loras, preset | given):
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
    time, rows, columns = latent_scale(checkpoint.config["vae"])
    for name, step, extra in (("height", rows, 0), ("width", columns, 0), ("frames", time, 1)):
        value = settings[name]
        lower = max((value - extra) // step, 0 if extra else 1) * step + extra
        if value != lower:
            rule = f"{step}k+1" if extra else f"a multiple of {step}"
            raise UserError(f"--{name} {value} is not {rule}: the nearest are {lower} and {lower + step}")
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

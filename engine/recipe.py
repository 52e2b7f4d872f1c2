"""The recipe of a video: size, steps, guidance and reference, out of five sources.

options of the user  >  distilled models  >  --preset  >  LoRA metadata  >  checkpoint metadata  >  config.VIDEO
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint, distilled_sign
from common.device import DTYPES
from common.errors import UserError
from common.sizes import require_memory, require_video_size
from config import ASSETS, VIDEO, Config
from engine.lora_files import LoRA, describe, open_loras
from engine.step_cache import StepCache
from guidance import DISTILLED_SIGMAS
from rope import PLACEMENTS, ReferenceSettings
from text import GEMMA
from vae import latent_scale


def reference_metadata(reference: ReferenceSettings) -> dict[str, Any]:
    """How the reference is given, under the names of the options."""
    names = [field.name for field in fields(ReferenceSettings)]
    return {"ref_timestep" if name == "timestep" else name: getattr(reference, name) for name in names}


REFERENCE = reference_metadata(ReferenceSettings())
OTHERS = {"prompt_prefix": "", "guidance_interval": None, "cache": None}
PRESETS = {  # for LoRAs without metadata of this project
    # LTX-Best-Face-ID. The guidance is our choice, since we know of none documented: equal scales, so two streams.
    "best-face-id": REFERENCE
    | {"placement": "phase", "fit": "cover", "prompt_prefix": "ref_t2v: ", "s_text": 3.0, "s_ref": 3.0}
}
DISTILLED = {"steps": len(DISTILLED_SIGMAS) - 1, "s_text": 1.0, "s_ref": 1.0}  # one stream, with the reference
LARGEST = {"height": 16384, "width": 16384, "frames": 100_000, "steps": 10_000, "fps": 1000}
LARGEST |= {"s_text": 1e4, "s_ref": 1e4, "source_id": 1000, "phase_scale": 1000}


@dataclass(frozen=True)
class Recipe:
    """Everything about a video but its prompt, photo and seed."""

    height: int
    width: int
    frames: int
    fps: float
    steps: int
    s_text: float  # s_y of Eq. 13
    s_ref: float  # s_r of Eq. 13
    reference: ReferenceSettings
    prompt_prefix: str = ""
    sigmas: tuple[float, ...] | None = None  # instead of the schedule of `steps`
    guidance_interval: Sequence[float] | None = None  # noise levels with guidance; None: all
    cache: float | None = None  # threshold of engine/step_cache.py; None: no cache

    def for_generate(self) -> dict[str, Any]:
        """Keyword arguments of guidance.generate."""
        names, others = {"s_text": "s_y", "s_ref": "s_r"}, ("prompt_prefix", "cache")
        arguments = {names.get(key, key): value for key, value in vars(self).items() if key not in others}
        return arguments | {"new_cache": partial(StepCache, self.cache) if self.cache else None}

    def for_metadata(self) -> dict[str, Any]:
        """The same and the prefix of the prompt, as plain values."""
        flat = self.for_generate() | reference_metadata(self.reference) | {"prompt_prefix": self.prompt_prefix}
        flat |= {"cache": self.cache or None, "new_cache": None, "reference": None}
        return {key: value for key, value in flat.items() if value is not None}

    def line(self) -> str:
        return (
            f"{self.width}x{self.height}, {self.frames} frames at {self.fps:g} fps, {self.steps} steps, s_text "
            f"{self.s_text:g}, s_ref {self.s_ref:g}, placement {self.reference.placement}, fit {self.reference.fit}"
        )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of sample.py and of the page in demo/ that name the models and how they are held."""
    parser.add_argument("--ckpt", help="an LTX-2.3 checkpoint (default: the tiny one in assets/)")
    parser.add_argument("--base", help="a whole LTX-2.3 file; it completes a --ckpt that is a transformer alone")
    parser.add_argument("--gemma", help=f"folder or hub name of Gemma 3 (default: {GEMMA}, or the tiny one)")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="LoRA; may be repeated")
    parser.add_argument("--lora-ignore-unknown", action="store_true", help="skip LoRA tensors without a place")
    parser.add_argument("--preset", choices=list(PRESETS), help="settings of a LoRA without nano-ST-DRC metadata")
    pack = "face pack that measures likeness (default: the tiny model's, or buffalo_l if on disk)"
    parser.add_argument("--faces", help=pack)
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--fp8", action="store_true", help="DiT weights in 8 bits, and products on newer cards")
    parser.add_argument("--offload", action="store_true", help="DiT weights in host memory, streamed block by block")
    parser.add_argument("--text-on-cpu", action="store_true", help="Gemma in host memory: slower, no GPU memory")


def begin_with(prefix: str, prompt: str) -> str:
    """The prompt behind the prefix of a LoRA's prompts, once."""
    return prompt if prompt.startswith(prefix) else prefix + prompt


def resolve_loras(options: argparse.Namespace, checkpoint: Checkpoint) -> list[LoRA]:
    """The LoRAs of --lora, checked against the model and finite. One of strength 0 is checked and left out."""
    loras = open_loras(options.lora, checkpoint, options.lora_ignore_unknown)
    for lora in loras:
        print(f"lora: {describe(lora)}")
    return [lora for lora in loras if lora.strength]


def sampling_settings(ours: dict[str, Any]) -> dict[str, Any]:
    """The settings for sampling in this project's metadata of a checkpoint or LoRA."""
    defaults = ours.get("defaults", {})
    settings = {key: ours[key] for key in REFERENCE if key in ours}
    return settings | {key: defaults[key] for key in VIDEO if key in defaults}


def lora_settings(loras: list[LoRA], decided: dict[str, Any]) -> dict[str, Any]:
    """The settings in the metadata of LoRAs, less those `decided`. UserError where two LoRAs differ."""
    settings: dict[str, Any] = {}
    for lora in loras:
        for key, value in sampling_settings(lora.ours).items() if lora.strength else ():
            if key not in decided and settings.setdefault(key, value) != value:
                raise UserError(
                    f"the LoRAs were trained with different {key}, {settings[key]} and {value}: "
                    f"leave one out, or decide with --{key.replace('_', '-')} of sample.py"
                )
    return settings


def merged_metadata(base: Checkpoint, loras: list[LoRA]) -> dict[str, Any]:
    """This project's metadata of `base` with LoRAs merged in. Settings of the LoRAs replace those of the base."""
    settings, sign = lora_settings(loras, {}), distilled_sign(base.path, base.metadata)
    defaults = base.ours.get("defaults", {}) | {key: settings.pop(key) for key in VIDEO if key in settings}
    ours = base.ours | settings | {"defaults": defaults} | encoder_metadata(base)
    ours["loras"] = [f"{lora.path.name}:{lora.strength:g}" for lora in loras]
    return ours | ({"distilled": f"{base.path.name}, by {sign}"} if sign else {})


def text_encoder(checkpoint: Checkpoint) -> str | None:
    """ "embedded" for the model in assets/ and for everything made from it, None where Gemma 3 12B is needed."""
    files = {path.resolve() for path, _ in checkpoint.places.values()}  # its own, and --base
    return "embedded" if (ASSETS / "tiny.safetensors").resolve() in files else checkpoint.ours.get("gemma")


def encoder_metadata(base: Checkpoint) -> dict[str, str]:
    """The entry by which exports and merged files of `base` find their text encoder."""
    return {"gemma": encoder} if (encoder := text_encoder(base)) else {}


def default_gemma(checkpoint: Checkpoint) -> str | Path:
    """The folder or repository of the text encoder that a checkpoint needs."""
    return ASSETS / "gemma" if text_encoder(checkpoint) == "embedded" else GEMMA


def export_guidance(config: Config, base: Checkpoint) -> dict[str, float]:
    """The guidance scales that an export carries as defaults: the run's, or, where those are the paper's, the ones of
    the base model (the tiny model's are lower)."""
    scales = {key: getattr(config.guidance, key) for key in ("s_text", "s_ref")}
    of_base = VIDEO | base.ours.get("defaults", {})
    return {key: of_base[key] if scales.items() <= VIDEO.items() else scales[key] for key in scales}


def resolve_recipe(
    options: argparse.Namespace, checkpoint: Checkpoint, loras: list[LoRA] = (), say: Callable[[str], Any] = print
) -> Recipe:
    """The recipe of a command's options. `say` gets a line where a preset, a LoRA or a distilled model decides."""
    preset = PRESETS.get(options.preset, {})
    defaults = VIDEO | REFERENCE | OTHERS
    chosen = {key: value for key in defaults if (value := getattr(options, key)) is not None}
    settings = defaults | sampling_settings(checkpoint.ours)
    if from_loras := lora_settings(loras, preset | chosen):
        say(f"from the LoRA's metadata: {', '.join(f'{key} {value!r}' for key, value in from_loras.items())}")
    settings |= from_loras | preset
    signs = {file.path: distilled_sign(file.path, file.metadata) for file in (checkpoint, *loras)}
    distilled = next((f"{path} is distilled, says {sign}" for path, sign in signs.items() if sign), None)
    if distilled:
        settings |= DISTILLED
        steps = DISTILLED["steps"]
        say(f"{distilled}: {steps} steps of its own schedule, without guidance, unless options say otherwise")
    settings |= chosen
    if preset:
        used = [f"{key} {settings[key]!r}{' (yours)' if key in chosen else ''}" for key in preset]
        say(f"preset {options.preset}: {', '.join(used)}")
    files = ", ".join(str(file.path) for file in (checkpoint, *loras))
    if settings["placement"] not in PLACEMENTS:
        known = ", ".join(PLACEMENTS)
        raise UserError(f"{files}: placement {settings['placement']!r} is not one of {known}: decide with --placement")
    try:
        check_numbers(settings, latent_scale(checkpoint.config["vae"]))
    except UserError as error:
        option = str(error).split()[0].removeprefix("--").replace("-", "_")
        own = option in chosen or option not in settings
        raise UserError(str(error) if own else f"{error} (from {files})") from None
    sigmas = DISTILLED_SIGMAS if distilled and settings["steps"] == DISTILLED["steps"] else None
    if sigmas and settings["cache"]:
        raise UserError("--cache: the eight steps of a distilled model differ too much to be reused: leave it out")
    return Recipe(
        **{key: settings[key] for key in (*VIDEO, *OTHERS)},
        reference=ReferenceSettings(**{key.removeprefix("ref_"): settings[key] for key in REFERENCE}),
        sigmas=sigmas,
    )


def check_numbers(settings: dict[str, Any], scale: tuple[int, int, int]) -> None:
    """UserError for a size that the VAE cannot take, and for a number out of range."""
    for name, most in LARGEST.items():
        if not abs(settings[name]) <= most:  # NaN as well
            raise UserError(f"--{name.replace('_', '-')} {settings[name]} is not a number up to {most:g}")
    low, high = settings["guidance_interval"] or (0, 1)
    if not 0 <= low < high <= 1:
        raise UserError(f"--guidance-interval {low:g} {high:g}: write two noise levels, 0 <= LOW < HIGH <= 1")
    if not 0 <= (settings["cache"] or 0) <= 1:
        raise UserError(f"--cache {settings['cache']:g} is not between 0 and 1")
    require_video_size(settings, scale)
    frames, height, width = (settings[name] for name in ("frames", "height", "width"))
    what = f"a video of {frames} frames of {width}x{height}"
    require_memory(3 * frames * height * width, what, "take a smaller size or fewer frames")
    for name in ("fps", "steps"):
        if settings[name] <= 0:
            raise UserError(f"--{name} {settings[name]} is not above 0")

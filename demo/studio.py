"""The models behind the page, loaded once; every video is made as sample.py makes it."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, StringConstraints

from checkpoint import Checkpoint
from common.device import resolve_device
from common.images import to_tensor, to_uint8
from common.schema import record
from config import ASSETS, VIDEO
from data import FITS
from engine.lora_files import merge_lora
from engine.notes import notes_on_photo, notes_on_prompt, notes_on_recipe
from engine.recipe import (
    OTHERS,
    REFERENCE,
    Recipe,
    begin_with,
    default_gemma,
    resolve_loras,
    resolve_recipe,
    text_encoder,
)
from engine.sampling import face_reader, likeness, load_dit, require_picture
from guidance import generate
from model import LTXVideo
from rope import PLACEMENTS
from text import TextConnector, TextEncoder
from vae import VideoVAE

MOST_STEPS = 100


@record
class Knobs:
    s_text: Annotated[float, Field(ge=0, le=1e4)]  # s_y of Eq. 13
    s_ref: Annotated[float, Field(ge=0, le=1e4)]  # s_r of Eq. 13
    placement: Literal[tuple(PLACEMENTS)]
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)]


@record
class Content:
    prompt: Annotated[str, StringConstraints(max_length=5000)]
    seed: Annotated[int, Field(ge=0, lt=2**53)]  # JavaScript's numbers are exact up to there


@dataclass(frozen=True)
class Film:
    frames: np.ndarray  # (F, H, W, 3) bytes
    fps: float
    likeness: str  # to the photo, in words; empty without photo or face models


class Studio:
    """Checkpoint, LoRAs, text encoder, DiT, VAE and face models of the page's options."""

    def __init__(self, options: argparse.Namespace):
        defaults = dict.fromkeys((*VIDEO, *REFERENCE, *OTHERS)) | {"compile": False}
        self.options = argparse.Namespace(**defaults | vars(options))
        self.checkpoint = Checkpoint(options.ckpt or ASSETS / "tiny.safetensors", options.base)
        self.loras = resolve_loras(self.options, self.checkpoint)
        self.recipe = resolve_recipe(self.options, self.checkpoint, self.loras)
        for part in (LTXVideo, TextConnector, VideoVAE):
            part.from_checkpoint(self.checkpoint, device="meta")  # check names and shapes before Gemma is loaded
        self.device, dtype = resolve_device(options)
        self.drawn = text_encoder(self.checkpoint) == "embedded"  # a model of the tiny world
        text_device = torch.device("cpu") if options.text_on_cpu else self.device
        gemma = options.gemma or default_gemma(self.checkpoint)
        self.encoder = TextEncoder.from_checkpoint(self.checkpoint, gemma, text_device, dtype)
        merge_lora(self.encoder.connector, self.loras)
        self.encode = lru_cache(maxsize=8)(lambda prompt: self.encoder.encode([prompt, ""]).to(self.device))
        self.vae = VideoVAE.from_checkpoint(self.checkpoint, self.device, dtype)
        self.model = load_dit(self.options, self.checkpoint, self.loras, self.device, dtype)
        self.reader = face_reader(self.options, self.device)

    def recipe_of(self, knobs: Knobs) -> Recipe:
        options = argparse.Namespace(**vars(self.options) | vars(knobs))
        return resolve_recipe(options, self.checkpoint, self.loras, say=lambda line: None)  # said at the start

    def notes(self, photo: Image.Image | None, content: Content, knobs: Knobs) -> Iterator[str]:
        """Reasons why the video may disappoint, as sample.py prints them."""
        recipe = self.recipe_of(knobs)
        yield from notes_on_recipe(self.checkpoint, self.loras, recipe, photo is not None)
        if photo and self.reader:
            yield from notes_on_photo(photo, self.reader.detector, self.checkpoint, recipe)
        yield from notes_on_prompt(begin_with(recipe.prompt_prefix, content.prompt), self.encoder)

    def film(self, photo: Image.Image | None, content: Content, knobs: Knobs, progress: Callable = iter) -> Film:
        """One video; without photo, plain text-to-video."""
        recipe = self.recipe_of(knobs)
        context, null_context = self.encode(begin_with(recipe.prompt_prefix, content.prompt)).split(1)
        ref_image = FITS[recipe.reference.fit](photo, recipe.height, recipe.width) if photo else None
        pixels = to_tensor(ref_image) if photo else None
        how = {"seed": content.seed, "progress": progress} | recipe.for_generate()
        video = generate(self.model, self.vae, context, null_context, pixels, **how)
        require_picture(video)
        frames = to_uint8(video)
        words = likeness(self.reader, ref_image, frames) if photo and self.reader else ""
        return Film(frames, recipe.fps, words)

"""One line each before sampling begins: reasons why the video will not be what its maker expects."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from checkpoint import Checkpoint
from common.images import cover_box, to_tensor
from engine.lora_files import LoRA
from engine.recipe import Recipe, text_encoder
from face import FaceDetector
from text import TextEncoder

SMALL_FACE = 64  # pixels; below it a photo holds too little of a face
FAR = 1.5  # factor between the size of a video and the size that the weights were trained on


def notes_on_recipe(checkpoint: Checkpoint, loras: list[LoRA], recipe: Recipe, with_photo: bool) -> Iterator[str]:
    """Placement, fit and size against those that the weights were trained with."""
    trained = {key: value for file in (checkpoint, *loras) for key, value in file.ours.items()}
    if with_photo and "training" not in trained and not loras:
        cure = "add a LoRA that was trained with one (--lora), or train it (docs/training.md)"
        yield f"{checkpoint.path.name} has never seen a reference image, so the photo has no meaning to it: {cure}"
    reference = {"placement": recipe.reference.placement, "fit": recipe.reference.fit}
    for key, value in reference.items() if with_photo else ():
        if trained.get(key, value) != value:
            yield f"the weights were trained with --{key} {trained[key]}: the video proves nothing about {value}"
    sizes = trained.get("defaults", {})
    for key in ("height", "width", "frames", "fps"):
        value = getattr(recipe, key)
        if not 1 / FAR <= value / sizes.get(key, value) <= FAR:
            yield f"the weights were trained on --{key} {sizes[key]:g}: at {value:g} expect little of the video"


def notes_on_photo(image: Image.Image, detector: FaceDetector, checkpoint: Checkpoint, recipe: Recipe) -> Iterator[str]:
    """The faces in the photo as it is, before the fit."""
    if text_encoder(checkpoint) == "embedded" and not looks_drawn(image):
        effect = "the video will not resemble the person in a real photograph; the similarity is a toy recognizer's"
        yield f"the embedded model knows drawn people only: {effect}"
    _, boxes = detector.faces(to_tensor(image))  # (k, 4) left, top, right, bottom; the largest first
    if not len(boxes):
        yield "no face was found in the photo: take a frontal close-up of one person"
        return
    if len(boxes) > 1:
        yield f"the photo shows {len(boxes)} faces: similarity counts the largest, the model sees all of them"
    left, top, right, bottom = boxes[0].tolist()
    if (side := max(right - left, bottom - top)) < SMALL_FACE:
        yield f"the face in the photo is {side:.0f} pixels large: take a closer one"
    if recipe.reference.fit == "cover":
        x0, y0, x1, y1 = cover_box(*image.size, recipe.width, recipe.height)
        inside = max(0, min(right, x1) - max(left, x0)) * max(0, min(bottom, y1) - max(top, y0))
        if inside < 0.9 * (right - left) * (bottom - top):
            yield "--fit cover cuts the face: --fit letterbox keeps it whole"


def notes_on_prompt(prompt: str, encoder: TextEncoder) -> Iterator[str]:
    """The parts of a prompt that the model does not read."""
    if cut := encoder.cut(prompt):
        yield f'the prompt is {cut[0]} tokens longer than {encoder.max_tokens}; it is read up to "... {cut[1]}"'
    if words := encoder.unknown_words(prompt):
        yield f"words that this model was never taught: {', '.join(words[:12])}"


def looks_drawn(image: Image.Image) -> bool:
    """A drawing has areas of one color; in a photograph the noise of the sensor leaves few equal neighbours."""
    pixels = np.asarray(image.convert("RGB"))
    equal = (pixels[:, 1:] == pixels[:, :-1]).all(-1)
    return bool(equal.size) and equal.mean() > 0.35  # drawn 0.4 to 0.85, photographs 0.01 to 0.3

"""The page's layout and its answers to clicks. Photos and videos travel as data inside the page, not as files."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import base64
import hashlib
import html
import io
import itertools
import secrets
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio import processing_utils
from gradio.data_classes import ImageData
from PIL import Image, ImageDraw

from common.errors import UserError, explain, printable
from common.images import read_image
from common.schema import validate
from common.video import write_video
from demo.studio import MOST_STEPS, Content, Knobs, Studio
from rope import PLACEMENTS
from toy.traits import COLORS
from toy.world import BEHIND, MOVES, person, reference

UPLOAD = 10 * 2**20  # bytes of a photo, at most
SIDE = 1024  # pixels; larger photos are scaled down
PEOPLE = 8
CELL = 256  # least width of a film, and width in a grid, pixels
LABEL = 36  # height of the lines below a film of a grid, pixels
SYSTEM = ["system-ui", "sans-serif"]  # fonts of the visitor's own machine; gradio's come from the network
MONO = ["ui-monospace", "monospace"]
CSS = ".film {min-height: 21em} .film figure {margin: 1.8em 0 0} .film video {width: 100%}"
CSS += " .film figcaption {font-size: .85em}"
CSS += " .people .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr))}"
SCALES = "s_y by s_r"
LAUNCH = {
    "share": False,
    "quiet": True,
    "ssr_mode": False,
    "pwa": False,
    "run_history": False,  # it would keep photos and videos in the browser
    "footer_links": [],
    "max_file_size": UPLOAD,
    "state_session_capacity": 100,  # visitors whose last film is kept in memory
    "theme": gr.themes.Default(font=SYSTEM, font_mono=MONO),
    "css": CSS,
}


async def refuse_address(url: str, *args: Any, **options: Any) -> str:
    raise gr.Error(f"{url} is an address: upload the photo itself")


# A request may name an address in place of an upload, and gradio would fetch it.
processing_utils.async_ssrf_protected_download = refuse_address


# --- Pictures in and out ----------------------------------------------------------------------------------------------


def read_photo(photo: ImageData | None, kept: set[str]) -> Image.Image | None:
    """The photo of a request: an upload, which is deleted unless it is one of `kept`, or data that the page holds."""
    if photo is None:
        return None
    data = photo.url if (photo.url or "").startswith("data:") else None
    path, name = photo.path, photo.orig_name or "the photo"
    try:
        with tempfile.TemporaryDirectory() as folder:
            if data:
                if len(data) > 2 * UPLOAD:
                    raise UserError(f"the photo is larger than {UPLOAD >> 20} MB")
                path = Path(folder) / "photo"
                path.write_bytes(base64.b64decode(data.partition(",")[2]))
            image = read_image(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from None
    finally:
        if not data and path not in kept:
            Path(path).unlink(missing_ok=True)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def as_data(image: Image.Image | None) -> ImageData | None:
    """An image for the page to hold."""
    if image is None:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return ImageData(url="data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())


def scaled(frames: np.ndarray, width: int) -> np.ndarray:
    """Frames (F, H, W, 3) of another width; both sides even, as H.264 needs them."""
    size = width, round(frames.shape[1] * width / frames.shape[2] / 2) * 2
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames])


def player(frames: np.ndarray, fps: float, lines: Iterable[str]) -> str:
    """HTML of a video that plays again and again, with lines below it. Small frames are enlarged."""
    frames = frames if frames.shape[2] >= CELL else scaled(frames, CELL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_video(path, frames, fps)
        data = base64.b64encode(path.read_bytes()).decode()
    video = f'<video src="data:video/mp4;base64,{data}" autoplay loop muted playsinline></video>'
    return f"<figure>{video}<figcaption>{'<br>'.join(map(html.escape, lines))}</figcaption></figure>"


def tiles(cells: list[tuple[str, np.ndarray]], columns: int) -> np.ndarray:
    """Films (F, H, W, 3) in rows, a label below each -> (F, H', W', 3)."""
    parts = []
    for label, frames in cells:
        strip = Image.new("RGB", (CELL, LABEL), "white")
        ImageDraw.Draw(strip).text((3, 3), label, fill="black", font_size=13)
        strips = np.broadcast_to(np.asarray(strip), (len(frames), LABEL, CELL, 3))
        parts.append(np.concatenate([scaled(frames, CELL), strips], 1))
    parts += [np.full_like(parts[0], 255)] * (-len(parts) % columns)  # the last row is as wide as the others
    rows = [np.concatenate(parts[k : k + columns], 2) for k in range(0, len(parts), columns)]
    return np.concatenate(rows, 1)


# --- Answers ----------------------------------------------------------------------------------------------------------


def settings(prompt: str, s_y: float, s_r: float, placement: str, steps: int, seed: int) -> tuple[Content, Knobs]:
    """The page's fields, checked."""
    content = validate(Content, {"prompt": prompt, "seed": seed}, "the page")
    if not content.prompt.strip():
        raise UserError("the prompt is empty: describe the video")
    knobs = {"s_text": s_y, "s_ref": s_r, "placement": placement, "steps": steps}
    return content, validate(Knobs, knobs, "the page")


def grid_of(kind: str, knobs: Knobs) -> list[tuple[str, Knobs]]:
    """The labels and knobs of a grid's films, three in a row. The scales lie around the sliders' own."""
    if kind == "placements":
        return [(name, replace(knobs, placement=name)) for name in PLACEMENTS]
    pairs = itertools.product((0.5, 1, 2), (0, 1, 2))
    films = [replace(knobs, s_text=knobs.s_text * y, s_ref=knobs.s_ref * r) for y, r in pairs]
    return [(f"s_y {film.s_text:g}, s_r {film.s_ref:g}", film) for film in films]


class Answers:
    """The answers to the page's buttons. A job takes the photo and returns notes and results."""

    def __init__(self, studio: Studio):
        self.studio, self.kept = studio, set()  # files of the page, which no request deletes

    def answer(self, photo: ImageData | None, job: Callable[[Image.Image | None], tuple], otherwise: list) -> tuple:
        """The notes and results of a job. After an error: its line in place of the notes, and `otherwise`."""
        try:
            notes, *results = job(read_photo(photo, self.kept))
            return "\n".join(f"note: {note}" for note in notes), *results
        except Exception as error:
            return "error: " + printable(explain(error)[1]), *otherwise

    def hold(self, photo: ImageData | None) -> tuple:
        """An upload becomes data in the page at once, so its file is gone before anything slow begins. The buttons,
        which would send its name, are off until then."""
        on = [gr.Button(interactive=True)] * 2
        return self.answer(photo, lambda image: ([], image, *on), [None, *on])

    def film(self, photo, prompt, s_y, s_r, placement, steps, seed, last, progress=gr.Progress()) -> tuple:
        """Notes, the film, the film of the last setting, and what the next answer compares with. A request may hold
        values of any type: `settings` checks them."""

        def job(image: Image.Image | None) -> tuple:
            content, knobs = settings(prompt, s_y, s_r, placement, steps, seed)
            same = image and hashlib.sha256(image.tobytes()).digest(), content
            notes = list(self.studio.notes(image, content, knobs))
            now = self._player(image, content, knobs, partial(progress.tqdm, desc="this setting"))
            before = last["film"] if last else ""
            if last and last["knobs"] != knobs and last["same"] != same:  # the last film has another photo or seed
                bar = partial(progress.tqdm, desc="the last setting")
                before = self._player(image, content, last["knobs"], bar)
            return notes, now, before, {"film": now, "knobs": knobs, "same": same}

        return self.answer(photo, job, [gr.skip()] * 3)

    def _player(self, image: Image.Image | None, content: Content, knobs: Knobs, bar: Callable) -> str:
        film = self.studio.film(image, content, knobs, bar)
        setting = f"s_y {knobs.s_text:g}, s_r {knobs.s_ref:g}, {knobs.placement}, {knobs.steps} steps"
        return player(film.frames, film.fps, [f"{setting}, seed {content.seed}", film.likeness])

    def grid(self, photo, prompt, s_y, s_r, placement, steps, seed, kind, progress=gr.Progress()) -> tuple:
        """Notes, and one film of all films of a grid."""

        def job(image: Image.Image | None) -> tuple:
            content, knobs = settings(prompt, s_y, s_r, placement, steps, seed)
            choices, cells, notes = grid_of(kind, knobs), [], {}
            for k, (label, choice) in enumerate(choices):
                notes |= dict.fromkeys(self.studio.notes(image, content, choice))
                bar = partial(progress.tqdm, desc=f"{k + 1} of {len(choices)}: {label}")
                film = self.studio.film(image, content, choice, bar)
                cells.append((f"{label}\n{film.likeness.partition(' (')[0]}", film.frames))
            caption = f"seed {content.seed}, {knobs.steps} steps"
            return notes, player(tiles(cells, 3), film.fps, [caption])

        return self.answer(photo, job, [gr.skip()])


def drawn_person(number: int) -> Image.Image:
    """A person whom the tiny model has never seen."""
    return Image.fromarray(reference(person(0, number, "test"), np.random.default_rng(number), 256)[0])


def someone_new() -> Image.Image:
    return drawn_person(secrets.randbelow(10**9))


def caption(motion: str, color: str) -> str:
    """The sentence of the two menus."""
    text = f"A person {MOVES[motion].says[0]} in front of {BEHIND['plain'][0].format(color)}."
    return text.replace("a orange", "an orange")


# --- Layout -----------------------------------------------------------------------------------------------------------


def build(studio: Studio) -> gr.Blocks:
    """The page. The row of drawn people and the menus belong to models of the tiny world only."""
    recipe, answers = studio.recipe, Answers(studio)
    people = [drawn_person(k) for k in range(PEOPLE)] if studio.drawn else []

    def choose(event: gr.SelectData) -> Image.Image:
        return people[event.index]

    in_page = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    one_job = {"concurrency_limit": 1, "concurrency_id": "model"}  # of both buttons together
    film = {"show_label": True, "container": True, "elem_classes": "film"}
    with gr.Blocks(title="nano-ST-DRC", analytics_enabled=False, delete_cache=(60, 3600)) as page:
        gr.Markdown("## nano-ST-DRC: a photo and a prompt in, a video of that person out")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                photo = gr.Image(label="photo", sources=["upload", "clipboard"], height=250)
                photo.preprocess, photo.postprocess = lambda payload: payload, as_data
                if people:
                    photo.value = as_data(people[0]).model_dump()
                    row = {"show_label": False, "buttons": [], "elem_classes": "people"}
                    gallery = gr.Gallery(people, columns=4, height=225, allow_preview=False, **row)
                    gallery.select(choose, None, photo, **in_page)
                    answers.kept = gallery.keep_in_cache
                    gr.Button("someone new", size="sm").click(someone_new, None, photo, **in_page)
                prompt = gr.Textbox(caption("turn left", "teal") if people else "", label="prompt", lines=2)
                if people:
                    with gr.Row():
                        menus = [gr.Dropdown(list(MOVES), value="turn left", label="motion", min_width=120)]
                        menus += [gr.Dropdown(list(COLORS), value="teal", label="background", min_width=120)]
                    for menu in menus:
                        menu.input(caption, menus, prompt, **in_page)
            with gr.Column(scale=5):
                with gr.Row():
                    s_y = gr.Slider(0, 4 * max(1, recipe.s_text), recipe.s_text, step=0.25, label="s_y: text")
                    s_r = gr.Slider(0, 4 * max(1, recipe.s_ref), recipe.s_ref, step=0.25, label="s_r: photo")
                    steps = gr.Slider(1, MOST_STEPS, recipe.steps, step=1, label="steps")
                with gr.Row():
                    label, default = "place of the photo's tokens (tass: the paper's)", recipe.reference.placement
                    placement = gr.Radio(list(PLACEMENTS), value=default, label=label, scale=5)
                    seed = gr.Number(0, precision=0, minimum=0, label="seed", min_width=80)
                with gr.Tab("one setting"):
                    button = gr.Button("make the video", variant="primary")
                    with gr.Row():
                        now = gr.HTML(label="this setting", **film)
                        before = gr.HTML(label="the last setting, same seed", **film)
                with gr.Tab("a grid"):
                    with gr.Row():
                        kind = gr.Radio([SCALES, "placements"], value=SCALES, show_label=False)
                        grid_button = gr.Button("make the grid", variant="primary")
                    grid = gr.HTML(label="one seed, nine settings or all placements", **film)
                notes = gr.Textbox(label="notes", lines=2, interactive=False)
        fields, last = [photo, prompt, s_y, s_r, placement, steps, seed], gr.State()
        off = lambda: (gr.Button(interactive=False), gr.Button(interactive=False))  # noqa: E731 (becomes JavaScript)
        photo.upload(off, None, [button, grid_button], js=True, **in_page)
        photo.upload(answers.hold, photo, [notes, photo, button, grid_button], **in_page)
        results = [notes, now, before, last]
        button.click(answers.film, [*fields, last], results, api_name="film", show_progress_on=[now], **one_job)
        results = [notes, grid]
        grid_button.click(answers.grid, [*fields, kind], results, api_name="grid", show_progress_on=[grid], **one_job)
    return page.queue(max_size=20)

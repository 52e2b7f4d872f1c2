"""How well a model does in the tiny world: identity, prompt, and copying from the reference, counted.

toy/world.py knows the truth of every prompt and every reference, so each claim of the paper's argument can be measured.
Videos of people, references and prompts of the test split are read frame by frame:

    frames ──┬─> metrics.FaceReader ──> cosine with the own reference, the nearest of all references, drift
             ├─> toy/eye.py ──> pose, light, colors ──> motions of the prompt, copying from the reference
             └─> toy/adherence.py ──> colors at the border ──> background of the prompt

    python -m toy.judge                                       # the tiny model of assets/, 64 people
    python -m toy.judge --ckpt FILE --no-reference --shuffle  # two more controls: no photo, another photo
    python -m toy.judge --ckpt FILE --against out/judge/rows.json      # paired differences to an earlier run
    python -m toy.judge --rows new/rows.json --against old/rows.json   # the same without making videos
    python -m toy.judge --write out/toy                       # the cases, for sample.py --batch and eval.py
    python -m toy.judge --train out/judge.safetensors         # the network of toy/eye.py, one hour on one core

Letters: N videos, F frames each, H W their size.
"""

import argparse
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from tqdm import tqdm

from checkpoint import Checkpoint
from common.device import DTYPES, free, resolve_device
from common.errors import Parser, UserError, one_line_errors, whole_file
from common.media import from_bytes, to_tensor, to_uint8
from common.schema import FiniteFloat, Share, parse_json, record
from config import ASSETS, PAPER
from data import FITS
from engine.recipe import Recipe, begin_with, resolve_recipe
from evaluation.metrics import FaceReader, face_sim, identity_drift
from evaluation.report import bootstrap, draw_sheet
from face import embed
from guidance import generate_batch
from model import LTXVideo
from text import TextEncoder
from toy import eye
from toy import world as toy
from toy.adherence import moves, shows_background
from toy.eye import CLASSES, SCENE, Eye
from vae import VideoVAE

GROUPS = {  # of the scene vector, for copying
    "pose": ("yaw", "pitch", "roll", "x", "y", "scale"),
    "expression": ("smile", "open", "closed", "brows"),
    "light": ("light x", "light y", "light strength", "light warmth"),
    "background": ("background red", "background green", "background blue"),
    "shirt": ("shirt red", "shirt green", "shirt blue"),
}
COLUMNS = {  # of a row of `measure` -> heading with the better direction
    "similarity": "similarity ↑",
    "retrieved": "own reference nearest ↑",
    "retrieved_permuted": "next reference nearest",
    "face_rate": "frames with a face ↑",
    "drift": "drift ↓",
    "motion": "motions right ↑",
    "direction": "direction right ↑",
    "background": "background right ↑",
    "skin": "skin ↑",
    **{trait: f"{trait} ↑" for trait in CLASSES},
}
HEADINGS = COLUMNS | {f"copied {group}": f"{group} copied ↓" for group in GROUPS}
LEGEND = (
    "*Copied* ↓ is the slope of the video's scene on its reference's scene: 0 is chance, since references are drawn "
    "independently of prompts; 1 is a copy. *drawn* is the truth: the clips of the same prompts as the renderer draws "
    "them, read by the same instruments."
)
Scene = Annotated[list[FiniteFloat | None], Field(min_length=len(SCENE), max_length=len(SCENE))]


@record
class VideoRow:
    """One video in rows.json."""

    similarity: FiniteFloat
    retrieved: bool
    retrieved_permuted: bool
    face_rate: Share
    drift: FiniteFloat | None  # None: no face in any frame
    motion: bool
    direction: bool | None  # None: the prompt has no motion with a direction
    background: bool
    motions: dict[str, bool]
    skin: bool
    hair: bool
    style: bool
    glasses: bool
    beard: bool
    shown: Scene  # mean over the video's frames; None where the prompt moves the number
    photo: Scene  # truth of the reference
    photo_read: Scene  # the network's reading of the reference


def read_rows(path: str | Path, kind: str = "with reference") -> list[dict[str, Any]]:
    """One kind of video of a rows.json, or the rows of an ablation's result, which has one kind."""
    text = Path(path).read_bytes()
    plain = text.lstrip()[:1] == b"["
    kinds = (
        {kind: parse_json(list[VideoRow], text, path)} if plain else parse_json(dict[str, list[VideoRow]], text, path)
    )
    if kind not in kinds:
        raise UserError(f"{path} has no videos of the kind {kind!r}: it has {', '.join(kinds)}")
    return [vars(row) for row in kinds[kind]]


# ---------------------------------------------------------------------------------------------------------------------
# Cases and videos


def cases(seed: int, count: int, frames: int = 17, fps: float = 12.0, size: int = 64) -> list[dict[str, Any]]:
    """Drawn clips of the test split: people, sentence forms and pairs of motion and color outside training.

    At least half have a motion with a direction (turn, look, tilt, walk).
    """
    chosen, index, others = [], 0, 0
    while len(chosen) < count:
        case = toy.toy_clip(seed, index, frames, size, fps, "test")
        directed = any(toy.MOVES[motion].direction for motion in case["scene"].motions)
        if directed or others < count // 2:
            others += not directed
            chosen.append(case)
        index += 1
    return chosen


def recipe_of(path: str | Path, **changes: float | None) -> Recipe:
    """The recipe that sample.py has for this checkpoint, `changes` being its options; None leaves the default."""
    options = dict.fromkeys((*PAPER, "placement", "source_id", "phase_scale", "fit", "ref_timestep", "prompt_prefix"))
    return resolve_recipe(argparse.Namespace(preset=None, **options | changes), Checkpoint(path))


def make_videos(
    path: str | Path,
    gemma: str | Path,
    clips: list[dict[str, Any]],
    photos: list[np.ndarray] | None,
    seeds: list[int],
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 16,
    title: str = "videos",
) -> np.ndarray:
    """The model's videos (N, F, H, W, 3) of the clips' captions. photos None: plain text-to-video."""
    fit = FITS[recipe.reference.fit]
    encoder = TextEncoder.from_checkpoint(path, gemma, device, dtype)
    contexts = [encoder.encode([begin_with(recipe.prompt_prefix, clip["caption"])]) for clip in clips]
    null_context = encoder.encode([""])
    del encoder
    free(device)
    vae, model = VideoVAE.from_checkpoint(path, device, dtype), LTXVideo.from_checkpoint(path, device, dtype)
    videos, images = [], None
    for first in tqdm(range(0, len(clips), batch), title, unit="batch"):
        part = slice(first, first + batch)
        if photos is not None:
            fitted = [fit(Image.fromarray(photo), recipe.height, recipe.width) for photo in photos[part]]
            images = torch.stack([to_tensor(photo) for photo in fitted])
        context = torch.cat(contexts[part])
        pixels = generate_batch(model, vae, context, null_context, images, seeds=seeds[part], **recipe.for_generate())
        videos += [to_uint8(video) for video in pixels]
    return np.stack(videos)


# ---------------------------------------------------------------------------------------------------------------------
# One row a video


def measure(
    videos: np.ndarray, clips: list[dict[str, Any]], reader: FaceReader, eye: Eye, ref_of: list[int] | None = None
) -> list[dict[str, Any]]:
    """A row for each video (N, F, H, W, 3). ref_of: for each video the clip of its reference (None: its own).

    similarity is metrics.face_sim with the own reference. The mean of e_f / |e_f| over frames with a face has a nearest
    reference (cosine) among those of all clips: "retrieved" says that it is the own one, "retrieved_permuted" that it
    is the next clip's, which happens by chance only. References are embedded at their known landmarks.
    """
    photos = torch.from_numpy(np.stack([clip["reference"] for clip in clips]))
    points = torch.from_numpy(np.stack([clip["reference_landmarks"] for clip in clips])).to(reader.device)
    with torch.no_grad():
        images = from_bytes(photos.to(reader.device)).permute(0, 3, 1, 2)
        e_ref = embed(images, points, reader.arcface).cpu()  # (N, E)
    of_photos = eye.read(photos.numpy())["scene"]
    rows = []
    for k, (frames, clip) in enumerate(zip(videos, clips)):
        faces, seen, scene = reader.read(frames), eye.read(frames), clip["scene"]
        mean = torch.nn.functional.normalize(faces.arc[faces.valid], dim=1).mean(0)
        nearest = int(torch.cosine_similarity(mean[None], e_ref).argmax()) if faces.valid.any() else None
        right = {motion: moves(seen["scene"], motion) for motion in scene.motions}
        directed = [right[motion] for motion in right if toy.MOVES[motion].direction]
        photo = k if ref_of is None else ref_of[k]
        moved = {toy.MOVES[motion].track for motion in scene.motions}
        rows.append(
            {
                "similarity": face_sim(faces.arc, e_ref[k], faces.valid),
                "retrieved": nearest == k,
                "retrieved_permuted": nearest == (k + 1) % len(clips),
                "face_rate": faces.valid.float().mean().item(),
                "drift": identity_drift(faces.arc, faces.valid),
                "motion": all(right.values()),
                "direction": all(directed) if directed else None,
                "background": shows_background(frames, scene),
                "motions": right,
                "skin": abs(float(seen["skin"].mean()) - clip["identity"]["skin"]) < 0.15,
                **{t: most_frequent(seen[t]) == CLASSES[t].index(clip["identity"][t]) for t in CLASSES},
                "shown": [None if n in moved else float(v) for n, v in zip(SCENE, seen["scene"].mean(0))],
                "photo": toy.scene_vector(clips[photo]["reference_scene"])[0].tolist(),
                "photo_read": of_photos[photo].tolist(),
            }
        )
    return rows


def most_frequent(numbers: np.ndarray) -> int:
    return int(np.bincount(numbers).argmax())


# ---------------------------------------------------------------------------------------------------------------------
# Of all videos


def copied(rows: list[dict[str, Any]], group: str) -> float:
    """How far one group of the scene follows the reference, a slope:

        sum_k sum_i (v_ik - mean v_k) (r_ik - mean r_k) / sum_k sum_i (j_ik - mean j_k) (r_ik - mean r_k)

    v is the network's reading of video i (mean over frames), r the truth of its reference, j the network's reading of
    that reference. k runs over the group's numbers, i over the videos whose prompt does not move k. References are
    drawn independently of prompts, so a video that ignores its reference has 0 up to chance. A video that repeats its
    reference has 1, whatever the network's errors.
    """
    return slope(*of_group(rows, group))


def copy_paste(rows: list[dict[str, Any]], group: str, resamples: int = 1000) -> tuple[float, float, float]:
    """`copied` with its 95 % interval over resampled videos."""
    v, r, j = of_group(rows, group)
    again = np.random.default_rng(0).integers(len(rows), size=(resamples, len(rows)))
    low, high = np.nanpercentile([slope(v[i], r[i], j[i]) for i in again], [2.5, 97.5])
    return slope(v, r, j), float(low), float(high)


def of_group(rows: list[dict[str, Any]], group: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """v, r, j of `copied`, each (N, numbers of the group); v is nan where the prompt moves the number."""
    at = [SCENE.index(name) for name in GROUPS[group]]
    v, r, j = (np.array([row[key] for row in rows], float)[:, at] for key in ("shown", "photo", "photo_read"))
    return v, r, j


def slope(v: np.ndarray, r: np.ndarray, j: np.ndarray) -> float:
    there = np.isfinite(v)
    r = np.where(
        there, r - (r * there).sum(0) / np.maximum(there.sum(0), 1), 0
    )  # centered, so that v and j need no centering
    scale = (j * r).sum()
    return float((np.nan_to_num(v) * r).sum() / scale) if scale else float("nan")  # nan: a single video


def summarize(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float, float] | None]:
    """Mean and 95 % bootstrap interval of every column, then copying by group; None where no row has a value."""
    result: dict[str, tuple[float, float, float] | None] = {}
    for key in COLUMNS:
        values = np.array([row[key] for row in rows if row[key] is not None], float)
        ends = bootstrap(values, [str(k) for k in range(len(values))])
        result[key] = (float(values.mean()), *ends) if ends else None
    return result | {f"copied {group}": copy_paste(rows, group) for group in GROUPS}


def table(results: dict[str, dict[str, tuple[float, float, float] | None]]) -> str:
    """Markdown: a line for each number, a column for each kind of video."""
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]
    for key, heading in HEADINGS.items():
        cells = [result[key] for result in results.values()]
        texts = ["" if cell is None else "{:.2f} ({:.2f} to {:.2f})".format(*cell) for cell in cells]
        lines.append(f"| {heading} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def compare(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """Markdown: paired differences rows - others of the same people, prompts and references.

    Standard errors are over videos: of the mean difference, or for slopes of the difference over resampled videos.
    """
    keys = [[(row["photo"], list(row["motions"])) for row in each] for each in (rows, others)]
    if keys[0] != keys[1]:
        raise UserError("--against has other people or prompts: both need the same --seed, --count and kind of video")
    lines = ["| | this | other | difference | standard error | won | lost |", "|---|---:|---:|---:|---:|---:|---:|"]
    for key, heading in HEADINGS.items():
        if key in COLUMNS:
            pairs = [(a[key], b[key]) for a, b in zip(rows, others) if None not in (a[key], b[key])]
            pairs = np.array(pairs, float).reshape(-1, 2)
            means, differences = pairs.mean(0) if len(pairs) else (np.nan, np.nan), pairs[:, 0] - pairs[:, 1]
            error = differences.std(ddof=1) / len(pairs) ** 0.5 if len(pairs) > 1 else np.nan
            better = -differences if "↓" in heading else differences
            counts = f"{(better > 0).sum()} | {(better < 0).sum()}" if "next" not in heading else " | "
        else:
            parts = [of_group(each, key.removeprefix("copied ")) for each in (rows, others)]
            again = np.random.default_rng(0).integers(len(rows), size=(1000, len(rows)))
            means = [slope(*part) for part in parts]
            error = np.nanstd([slope(*(x[i] for x in parts[0])) - slope(*(x[i] for x in parts[1])) for i in again])
            counts = " | "
        cells = [f"{number:.3f}" for number in (*means, means[0] - means[1], error)]
        lines.append(f"| {heading} | {' | '.join(cells)} | {counts} |")
    return "\n".join(lines) + "\n"


def reliability(clips: list[dict[str, Any]], eye: Eye) -> dict[str, tuple[float, float, float]]:
    """The instrument itself, on drawn clips. For each motion: the share recognized of the clips that have it, the share
    claimed of the other clips, the share claimed of clips without any motion. For "background": the share recognized,
    and the share claimed with the next clip's prompt."""
    scenes, portraits = [eye.read(clip["frames"])["scene"] for clip in clips], []
    for k, clip in enumerate(clips):
        still = toy.draw_scene(np.random.default_rng((7, k)), len(clip["frames"]), 12.0, moving=False)
        portraits.append(eye.read(toy.render(clip["identity"], still, clip["frames"].shape[1]))["scene"])
    rates = {}
    for motion in toy.MOVES:
        has = np.array([motion in clip["scene"].motions for clip in clips])
        claimed = np.array([moves(scene, motion) for scene in scenes])
        rates[motion] = rate(claimed[has]), rate(claimed[~has]), rate([moves(s, motion) for s in portraits])
    others = [clip["scene"] for clip in clips[1:] + clips[:1]]
    right = [shows_background(clip["frames"], clip["scene"]) for clip in clips]
    wrong = [shows_background(c["frames"], o) for c, o in zip(clips, others) if c["scene"].color != o.color]
    return rates | {"background": (rate(right), rate(wrong), float("nan"))}


def rate(claims: Any) -> float:
    return float(np.mean(claims)) if len(claims) else float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# Command


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="a checkpoint of the tiny world (default: the one in assets/)")
    parser.add_argument("--gemma", default=str(ASSETS / "gemma"), help="folder of its Gemma (%(default)s)")
    parser.add_argument("--count", type=int, default=64, help="people (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other people, prompts and noise (%(default)s)")
    parser.add_argument("--no-reference", action="store_true", help="also without any photo")
    parser.add_argument("--shuffle", action="store_true", help="also with the next case's photo")
    parser.add_argument("--s-text", type=float, help="s_y of Eq. 13 (default: the checkpoint's)")
    parser.add_argument("--s-ref", type=float, help="s_r of Eq. 13 (default: the checkpoint's)")
    parser.add_argument("--steps", type=int, help="Euler steps (default: the checkpoint's)")
    parser.add_argument("--batch", type=int, default=16, help="videos made at a time (%(default)s)")
    parser.add_argument("--faces", default=str(ASSETS / "faces"), help="model pack (%(default)s)")
    parser.add_argument("--det-size", type=int, default=128, help="side of the detector's input (%(default)s)")
    parser.add_argument("--eye", default=str(ASSETS / "judge.safetensors"), help="the network (%(default)s)")
    parser.add_argument("--out", default="out/judge", help="folder for the table, the rows, the sheet (%(default)s)")
    parser.add_argument("--against", nargs="+", metavar="FILE", help="rows.json of another run: paired differences")
    parser.add_argument("--rows", nargs="+", metavar="FILE", help="with --against: rows of this run, instead of videos")
    parser.add_argument("--write", metavar="FOLDER", help="write the cases for sample.py --batch; nothing else")
    parser.add_argument("--train", metavar="FILE", help="train the network and write it; nothing else")
    parser.add_argument("--minutes", type=float, default=60, help="of --train (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bfloat16 on a GPU, float32 on a CPU")
    options = parser.parse_args()
    for name, least in (("count", 2), ("batch", 1), ("seed", 0), ("det_size", 32)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} is too small: at least {least}")
    if not 0 < options.minutes < 1e6:
        raise UserError(f"--minutes {options.minutes} is not a time")
    if options.rows and not options.against:
        raise UserError("--rows needs --against")
    return options


def main() -> None:
    options = parse_arguments()
    others = [row for path in options.against or () for row in read_rows(path)]
    if options.rows:
        return print(compare([row for path in options.rows for row in read_rows(path)], others) + "\n" + LEGEND)
    device, dtype = resolve_device(options)
    if options.train:
        return train(options, device)
    path, out = options.ckpt or ASSETS / "tiny.safetensors", Path(options.out)
    if options.write:
        return write_cases(Path(options.write), options, recipe_of(path))
    network = Eye.from_file(options.eye, device)
    recipe = recipe_of(path, s_text=options.s_text, s_ref=options.s_ref, steps=options.steps)
    reader = FaceReader(options.faces, device=device, det_size=options.det_size)
    clips = cases(options.seed, options.count, recipe.frames, recipe.fps, recipe.height)
    photos = [clip["reference"] for clip in clips]
    following = [*range(1, len(clips)), 0]
    kinds = {"with reference": (photos, None)}
    if options.shuffle:
        kinds["another's reference"] = [photos[k] for k in following], following
    if options.no_reference:
        kinds["no reference"] = None, None
    seeds = [options.seed * len(clips) + k for k in range(len(clips))]
    rows = {}
    for kind, (shown, ref_of) in kinds.items():
        videos = make_videos(path, options.gemma, clips, shown, seeds, recipe, device, dtype, options.batch, kind)
        rows[kind] = measure(videos, clips, reader, network, ref_of)
        if kind == "with reference":
            out.mkdir(parents=True, exist_ok=True)
            draw_sheet(out / "sheet.png", [picture(*triple) for triple in zip(clips[:12], videos, rows[kind])])
    rows["drawn"] = measure(np.stack([clip["frames"] for clip in clips]), clips, reader, network)
    text = table({kind: summarize(of_kind) for kind, of_kind in rows.items()})
    text += f"\n{LEGEND} Chance for the nearest reference is 1 in {len(clips)}.\n"
    if others:
        text += f"\nThis run against {', '.join(options.against)}:\n\n{compare(rows['with reference'], others)}"
    text += "\n| drawn clips | recognized | claimed wrongly | claimed of a portrait |\n|---|---:|---:|---:|\n"
    for name, rates in reliability(clips, network).items():
        text += f"| {name} | " + " | ".join("" if np.isnan(r) else f"{r:.2f}" for r in rates) + " |\n"
    with whole_file(out / "summary.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    with whole_file(out / "rows.json") as temporary:
        temporary.write_text(json.dumps(rows))
    print(f"{text}\nwrote summary.md, rows.json and sheet.png into {out}")


def write_cases(folder: Path, options: argparse.Namespace, recipe: Recipe) -> None:
    """Portraits and cases.jsonl of the same people, prompts and seeds, for sample.py --batch and eval.py."""
    folder.mkdir(parents=True, exist_ok=True)
    clips, lines = cases(options.seed, options.count, recipe.frames, recipe.fps, recipe.height), []
    for k, clip in enumerate(clips):
        with whole_file(folder / f"{k:03}.png") as temporary:
            Image.fromarray(clip["reference"]).save(temporary)
        case = {"id": f"{k:03}", "reference": f"{k:03}.png", "prompt": clip["caption"]}
        lines.append(json.dumps(case | {"seed": options.seed * options.count + k}))
    with whole_file(folder / "cases.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print(f"wrote {len(lines)} portraits and {folder / 'cases.jsonl'}")


def train(options: argparse.Namespace, device: torch.device) -> None:
    network = eye.train(options.train, 60 * options.minutes, options.seed, device)
    clean, worse = (eye.accuracy(network, options.seed + 1, 500, worsened) for worsened in (False, True))
    print("| test split | drawn | worsened |\n|---|---:|---:|")
    for name in clean:
        print(f"| {name} | {clean[name]:.3f} | {worse[name]:.3f} |")
    print(f"wrote {options.train}: R^2 of numbers, share right of {', '.join(CLASSES)}")


def picture(clip: dict[str, Any], frames: np.ndarray, row: dict[str, Any]) -> tuple[str, Image.Image, np.ndarray]:
    """A line of the sheet."""
    title = f"{clip['caption']}   similarity {row['similarity']:.2f}"
    picks = np.linspace(0, len(frames) - 1, 6).round().astype(int)
    return title, Image.fromarray(clip["reference"]), frames[picks]


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Identity, prompt and copying of a model in the tiny world, counted.

toy/world.py knows the truth of every prompt and every reference, so each claim of the paper's argument can be measured.
Videos of people, references and prompts of the test split are read frame by frame:

    frames ──┬─> metrics.FaceReader ──> cosine with the own reference, nearest of all references, drift
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
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from tqdm import tqdm

from checkpoint import Checkpoint
from common.device import DTYPES, free, resolve_device
from common.errors import SEED, Parser, UserError, one_line_errors, whole, whole_file, write_text
from common.images import require_file
from common.media import from_bytes, to_tensor, to_uint8
from common.outputs import refuse_folders
from common.schema import FiniteFloat, NonNegativeFloat, Share, parse_json, record
from config import ASSETS, VIDEO
from data import FITS
from engine.recipe import OTHERS, REFERENCE, Recipe, begin_with, resolve_recipe
from evaluation.metrics import FaceReader, face_sim, identity_drift
from evaluation.report import bootstrap, draw_sheet
from face import embed
from guidance import generate_batch
from model import LTXVideo
from text import TextEncoder
from toy import eye
from toy import world as toy
from toy.adherence import grain, moves, shows_background, shows_shirt
from toy.eye import CLASSES, SCENE, Eye
from vae import VideoVAE

Clips = list[dict[str, Any]]  # of world.toy_clip
Rows = list[dict[str, Any]]  # of `measure`, with the fields of VideoRow
Summary = dict[str, tuple[float, float, float] | None]  # mean and 95 % interval of each number

OWN = "with reference"  # the kind of video that is compared between runs
# Parts of the scene vector in its order, for copying.
SIZES = {"pose": 6, "expression": 4, "light": 4, "background": 3, "shirt": 3}
GROUPS = {group: SCENE[end - SIZES[group] : end] for group, end in zip(SIZES, itertools.accumulate(SIZES.values()))}
LEGEND = (
    "*Copied* ↓ is the slope of the video's scene on its reference's scene: 0 is chance, since references are drawn "
    "independently of prompts; 1 is a copy. *drawn* is the truth: the clips of the same prompts as the renderer draws "
    "them, read by the same instruments."
)
Scene = Annotated[list[FiniteFloat | None], Field(min_length=len(SCENE), max_length=len(SCENE))]


@record
class VideoRow:
    """One video in rows.json. A title is the heading of a column, with the better direction."""

    similarity: FiniteFloat = Field(title="similarity ↑")
    retrieved: bool = Field(title="own reference nearest ↑")
    retrieved_permuted: bool = Field(title="next reference nearest")
    face_rate: Share = Field(title="frames with a face ↑")
    drift: FiniteFloat | None = Field(title="drift ↓")  # None: fewer than two frames with a face
    motion: bool = Field(title="motions right ↑")
    direction: bool | None = Field(title="direction right ↑")  # None: the prompt has no motion with a direction
    background: bool = Field(title="background right ↑")
    shirt: bool | None = Field(title="shirt right ↑")  # None: the prompt does not name it
    grain: NonNegativeFloat | None = Field(title="grain of plain backgrounds ↓")  # None: the background is not plain
    skin: bool = Field(title="skin ↑")
    hair: bool = Field(title="hair ↑")
    style: bool = Field(title="style ↑")
    glasses: bool = Field(title="glasses ↑")
    beard: bool = Field(title="beard ↑")
    motions: dict[str, bool]
    shown: Scene  # mean over the video's frames; None where the prompt moves the number
    photo: Scene  # truth of the reference
    photo_read: Scene  # the network's reading of the reference


COLUMNS = {name: field.title for name, field in VideoRow.__pydantic_fields__.items() if field.title}
HEADINGS = COLUMNS | {f"copied {group}": f"{group} copied ↓" for group in GROUPS}


def read_rows(*paths: str | Path) -> Rows:
    """Videos with their own reference, out of rows.json or out of results of an ablation, which have no other kind."""
    rows = []
    for path in paths:
        require_file(path, "rows")
        text = Path(path).read_bytes()
        if text.lstrip().startswith(b"["):
            kinds = {OWN: parse_json(list[VideoRow], text, path)}
        else:
            kinds = parse_json(dict[str, list[VideoRow]], text, path)
        if not kinds.get(OWN):
            raise UserError(f"{path} has no videos of the kind {OWN!r}: it has {', '.join(kinds)}")
        rows += map(vars, kinds[OWN])
    return rows


def cases(seed: int, count: int, frames: int = 17, fps: float = 12.0, size: int = 64) -> Clips:
    """Drawn clips of the test split: people, sentence forms and pairs of motion and color outside training.

    At least half have a motion with a direction (turn, look, tilt, walk).
    """
    chosen, others = [], 0
    for index in itertools.count():
        case = toy.toy_clip(seed, index, frames, size, fps, "test")
        directed = any(toy.MOVES[motion].direction for motion in case["scene"].motions)
        if directed or others < count // 2:
            others += not directed
            chosen.append(case)
        if len(chosen) >= count:
            return chosen


def recipe_of(path: str | Path, **changes: float | None) -> Recipe:
    """The recipe that sample.py has for this checkpoint with the options `changes`; None leaves the default."""
    options = dict.fromkeys((*VIDEO, *REFERENCE, *OTHERS, "preset")) | changes
    return resolve_recipe(argparse.Namespace(**options), Checkpoint(path))


def make_videos(
    path: str | Path,
    gemma: str | Path,
    clips: Clips,
    photos: list[np.ndarray] | None,
    seeds: Sequence[int],
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 16,
    title: str = "videos",
) -> np.ndarray:
    """The model's videos (N, F, H, W, 3) of the clips' captions. photos None: plain text-to-video."""
    encoder = TextEncoder.from_checkpoint(path, gemma, device, dtype)
    contexts = [encoder.encode([begin_with(recipe.prompt_prefix, clip["caption"])]) for clip in clips]
    null_context = encoder.encode([""])
    del encoder
    free(device)
    vae, model = VideoVAE.from_checkpoint(path, device, dtype), LTXVideo.from_checkpoint(path, device, dtype)
    fit, videos, images = FITS[recipe.reference.fit], [], None
    for first in tqdm(range(0, len(clips), batch), title, unit="batch"):
        part = slice(first, first + batch)
        if photos:
            fitted = [fit(Image.fromarray(photo), recipe.height, recipe.width) for photo in photos[part]]
            images = torch.stack([to_tensor(photo) for photo in fitted])
        context = torch.cat(contexts[part])
        pixels = generate_batch(model, vae, context, null_context, images, seeds=seeds[part], **recipe.for_generate())
        videos += [to_uint8(video) for video in pixels]
    return np.stack(videos)


def measure(videos: np.ndarray, clips: Clips, reader: FaceReader, eye: Eye, ref_of: list[int] | None = None) -> Rows:
    """A row for each video (N, F, H, W, 3). ref_of: for each video the clip of its reference (None: its own).

    similarity is metrics.face_sim with the own reference. The mean of e_f / |e_f| over frames with a face has a nearest
    reference (cosine) among those of all clips: the own one sets "retrieved"; the next clip's, nearest by chance only,
    sets "retrieved_permuted". References are embedded at their known landmarks.
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
        row = {
            "similarity": face_sim(faces.arc, e_ref[k], faces.valid),
            "retrieved": nearest == k,
            "retrieved_permuted": nearest == (k + 1) % len(clips),
            "face_rate": faces.valid.float().mean().item(),
            "drift": identity_drift(faces.arc, faces.valid),
            "motion": all(right.values()),
            "direction": all(directed) if directed else None,
            "background": shows_background(frames, scene),
            "shirt": shows_shirt(seen["scene"], scene) if f"{scene.shirt} shirt" in clip["caption"] else None,
            "motions": right,
            "grain": grain(frames) if scene.background == "plain" else None,
            "skin": abs(float(seen["skin"].mean()) - clip["identity"]["skin"]) < 0.15,
            "shown": [None if n in moved else float(v) for n, v in zip(SCENE, seen["scene"].mean(0))],
            "photo": toy.scene_vector(clips[photo]["reference_scene"])[0].tolist(),
            "photo_read": of_photos[photo].tolist(),
        }
        for trait, names in CLASSES.items():
            row[trait] = names[np.bincount(seen[trait]).argmax()] == clip["identity"][trait]
        rows.append(row)
    return rows


def copied(rows: Rows, group: str, draws: np.ndarray | slice = slice(None)) -> np.ndarray:
    """How far one group of the scene follows the reference, a slope:

        sum_k sum_i (v_ik - mean v_k) (r_ik - mean r_k) / sum_k sum_i (j_ik - mean j_k) (r_ik - mean r_k)

    v is the network's reading of video i (mean over frames), r the truth of its reference, j the network's reading of
    that reference. k runs over the group's numbers, i over the videos whose prompt does not move k. References are
    drawn independently of prompts, so a video that ignores its reference has 0 up to chance. A video that repeats its
    reference has 1, whatever the network's errors. draws (..., N): numbers of videos -> slopes (...).
    """
    at = [SCENE.index(name) for name in GROUPS[group]]
    keys = "shown", "photo", "photo_read"
    v, r, j = (np.array([row[key] for row in rows], float)[draws][..., at] for key in keys)
    there = np.isfinite(v)  # (..., N, k)
    means = (r * there).sum(-2, keepdims=True) / np.maximum(there.sum(-2, keepdims=True), 1)
    r = np.where(there, r - means, 0)  # v and j then need no centering
    scale = (j * r).sum((-2, -1))
    return (np.nan_to_num(v) * r).sum((-2, -1)) / np.where(scale, scale, np.nan)  # nan: one video, drawn N times


def copy_paste(rows: Rows, group: str, resamples: int = 1000) -> tuple[float, float, float]:
    """`copied` with its 95 % interval over resampled videos."""
    draws = np.random.default_rng(0).integers(len(rows), size=(resamples, len(rows)))
    slopes = copied(rows, group, draws)
    slopes = slopes[np.isfinite(slopes)]
    ends = np.percentile(slopes, [2.5, 97.5]).tolist() if len(slopes) else [float("nan")] * 2
    return float(copied(rows, group)), *ends


def summarize(rows: Rows) -> Summary:
    """Mean and 95 % interval of every column, by bootstrap, and of copying by group; None where no row has a value."""
    result: Summary = {}
    for key in COLUMNS:
        values = np.array([row[key] for row in rows if row[key] is not None], float)
        ends = bootstrap(values, [str(k) for k in range(len(values))]) or (float("nan"), float("nan"))
        result[key] = (float(values.mean()), *ends) if len(values) else None
    return result | {f"copied {group}": copy_paste(rows, group) for group in GROUPS}


def markdown(head: str, lines: list[list[str]]) -> str:
    """A table of numbers. head: its first line as it stands."""
    rule = "|---|" + "---:|" * (head.count("|") - 2)
    return "\n".join([head, rule, *(f"| {' | '.join(cells)} |" for cells in lines)]) + "\n"


def table(results: dict[str, Summary]) -> str:
    """A line for each number, a column for each kind of video."""
    lines = []
    for key, heading in HEADINGS.items():
        cells = [result[key] for result in results.values()]
        lines.append([heading, *("" if cell is None else "{:.2f} ({:.2f} to {:.2f})".format(*cell) for cell in cells)])
    return markdown(f"| | {' | '.join(results)} |", lines)


def compare(rows: Rows, others: Rows) -> str:
    """A table of paired differences rows - others of the same people, prompts and references.

    Standard errors are over videos: of the mean difference, or for slopes of the difference over resampled videos.
    """
    keys = [[(row["photo"], list(row["motions"])) for row in each] for each in (rows, others)]
    if keys[0] != keys[1]:
        raise UserError("--against has other people or prompts: both need the same --seed, --count and kind of video")
    lines, draws = [], np.random.default_rng(0).integers(len(rows), size=(1000, len(rows)))
    for key, heading in HEADINGS.items():
        won = lost = ""
        if key in COLUMNS:
            a, b = (np.array([row[key] for row in each], float) for each in (rows, others))  # None becomes nan
            pairs = np.stack([a, b])[:, np.isfinite(a - b)]
            if pairs.shape[1] < 2:
                continue
            means, differences = pairs.mean(1), pairs[0] - pairs[1]
            error = differences.std(ddof=1) / len(differences) ** 0.5
            if "next" not in heading:
                won, lost = (str((sign * differences > 0).sum()) for sign in ((-1, 1) if "↓" in heading else (1, -1)))
        else:
            group = key.removeprefix("copied ")
            means = copied(rows, group), copied(others, group)
            slopes = copied(rows, group, draws) - copied(others, group, draws)
            slopes = slopes[np.isfinite(slopes)]
            error = slopes.std() if len(slopes) else float("nan")
        lines.append([heading, *(f"{x:.3f}" for x in (*means, means[0] - means[1], error)), won, lost])
    return markdown("| | this | other | difference | standard error | won | lost |", lines)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=str(ASSETS / "tiny.safetensors"), help="of the tiny world (%(default)s)")
    parser.add_argument("--gemma", default=str(ASSETS / "gemma"), help="folder of its Gemma (%(default)s)")
    parser.add_argument("--count", type=whole(2), default=64, help="people (%(default)s)")
    parser.add_argument("--seed", type=SEED, default=0, help="other people, prompts and noise (%(default)s)")
    parser.add_argument("--no-reference", action="store_true", help="also without any photo")
    parser.add_argument("--shuffle", action="store_true", help="also with the next case's photo")
    parser.add_argument("--s-text", type=float, help="s_y of Eq. 13 (default: the checkpoint's)")
    parser.add_argument("--s-ref", type=float, help="s_r of Eq. 13 (default: the checkpoint's)")
    parser.add_argument("--steps", type=int, help="Euler steps (default: the checkpoint's)")
    parser.add_argument("--batch", type=whole(), default=16, help="videos made at a time (%(default)s)")
    parser.add_argument("--faces", default=str(ASSETS / "faces"), help="model pack (%(default)s)")
    parser.add_argument("--det-size", type=whole(32, 4096), default=128, help="of the detector's input (%(default)s)")
    parser.add_argument("--eye", default=str(ASSETS / "judge.safetensors"), help="the network (%(default)s)")
    parser.add_argument("--out", default="out/judge", help="folder for the table, the rows, the sheet (%(default)s)")
    parser.add_argument("--against", nargs="+", metavar="FILE", help="rows.json of another run: paired differences")
    parser.add_argument("--rows", nargs="+", metavar="FILE", help="with --against: rows of this run, instead of videos")
    parser.add_argument("--write", metavar="FOLDER", help="write the cases for sample.py --batch; nothing else")
    parser.add_argument("--train", metavar="FILE", help="train the network and write it; nothing else")
    parser.add_argument("--minutes", type=whole(), default=60, help="of --train (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bfloat16 on a GPU, float32 on a CPU")
    options = parser.parse_args()
    refuse_folders(options.train)
    if options.rows and not options.against:
        raise UserError("--rows needs --against")
    return options


def main() -> None:
    options = parse_arguments()
    others = read_rows(*options.against or ())
    if options.rows:
        return print(compare(read_rows(*options.rows), others) + "\n" + LEGEND)
    device, dtype = resolve_device(options)
    if options.train:
        return train(options, device)
    recipe = recipe_of(options.ckpt, s_text=options.s_text, s_ref=options.s_ref, steps=options.steps)
    if options.write:
        return write_cases(Path(options.write), options, recipe)
    network, out, count = Eye.from_file(options.eye, device), Path(options.out), options.count
    reader = FaceReader(options.faces, device=device, det_size=options.det_size)
    clips = cases(options.seed, count, recipe.frames, recipe.fps, recipe.height)
    kinds: dict[str, list[int] | None] = {OWN: [*range(count)]}  # -> for each video the clip of its photo
    if options.shuffle:
        kinds["another's reference"] = [*range(1, count), 0]
    if options.no_reference:
        kinds["no reference"] = None
    out.mkdir(parents=True, exist_ok=True)
    seeds, rows = range(options.seed * count, (options.seed + 1) * count), {}
    for kind, ref_of in kinds.items():
        photos = ref_of and [clips[k]["reference"] for k in ref_of]
        how = recipe, device, dtype, options.batch, kind
        videos = make_videos(options.ckpt, options.gemma, clips, photos, seeds, *how)
        rows[kind] = measure(videos, clips, reader, network, ref_of)
        if kind == OWN:
            draw_rows(out / "sheet.png", clips[:12], rows[kind], videos)
    rows["drawn"] = measure(np.stack([clip["frames"] for clip in clips]), clips, reader, network)
    text = table({kind: summarize(of_kind) for kind, of_kind in rows.items()})
    text += f"\n{LEGEND} Chance for the nearest reference is 1 in {count}.\n"
    if others:
        text += f"\nThis run against {', '.join(options.against)}:\n\n{compare(rows[OWN], others)}"
    write_text(out / "summary.md", text)
    write_text(out / "rows.json", json.dumps(rows))
    print(f"{text}\nwrote summary.md, rows.json and sheet.png into {out}")


def draw_rows(path: Path, clips: Clips, rows: Rows, videos: np.ndarray) -> None:
    """A sheet: for each clip its portrait and six frames of its video (N, F, H, W, 3)."""
    picks = np.linspace(0, videos.shape[1] - 1, 6).round().astype(int)
    titles = [f"{clip['caption']}   similarity {row['similarity']:.2f}" for clip, row in zip(clips, rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(path, [*zip(titles, [Image.fromarray(clip["reference"]) for clip in clips], videos[:, picks])])


def write_cases(folder: Path, options: argparse.Namespace, recipe: Recipe) -> None:
    """Portraits and cases.jsonl of the same people, prompts and seeds, for sample.py --batch and eval.py."""
    lines = ""
    for k, clip in enumerate(cases(options.seed, options.count, recipe.frames, recipe.fps, recipe.height)):
        case = {"id": f"{k:03}", "reference": f"{k:03}.png", "prompt": clip["caption"]}
        lines += json.dumps(case | {"seed": options.seed * options.count + k}) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / case["reference"]) as temporary:
            Image.fromarray(clip["reference"]).save(temporary)
    write_text(folder / "cases.jsonl", lines)
    print(f"wrote {options.count} portraits and {folder / 'cases.jsonl'}")


def train(options: argparse.Namespace, device: torch.device) -> None:
    Path(options.train).parent.mkdir(parents=True, exist_ok=True)
    network = eye.train(options.train, 60 * options.minutes, options.seed, device)
    clean, worse = (eye.accuracy(network, options.seed + 1, 500, worsened) for worsened in (False, True))
    print(markdown("| test split | drawn | worsened |", [[k, f"{clean[k]:.3f}", f"{worse[k]:.3f}"] for k in clean]))
    print(f"wrote {options.train}: R^2 of numbers, share right of {', '.join(CLASSES)}")


if __name__ == "__main__":
    with one_line_errors():
        main()

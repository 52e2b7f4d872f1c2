"""How well a model does in the tiny world: who is in its videos, what they show, what was copied from the reference.

The world of toy.py knows what every prompt and every reference mean, so each sentence of the paper's argument can be
counted. Videos of people, references and prompts that were never trained on are read frame by frame:

    frames ──┬─> metrics.FaceReader ──> cosine with the own reference; is it the nearest of all? drift
             ├─> eye.py ──> pose, light, colors ──> did it move as the prompt said? does it follow the reference?
             └─> asked.py ──> colors at the border ──> is the background as the prompt said?

    python -m toy.judge                                       # the tiny model of assets/, 64 people
    python -m toy.judge --ckpt FILE --no-reference --shuffle  # two more controls: no photo, another photo
    python -m toy.judge --write out/toy                       # the cases, for sample.py --batch and eval.py
    python -m toy.judge --train assets/judge.safetensors      # the network of eye.py, in an hour on one core

Letters: N videos, F frames each, H W their size.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from checkpoint import Checkpoint
from common.device import DTYPES, free, resolve_device
from common.errors import Parser, UserError, one_line_errors, whole_file
from common.media import from_bytes, to_tensor, to_uint8
from config import ASSETS
from data import FITS
from engine.recipe import PAPER, begin_with, resolve_settings
from evaluation.metrics import FaceReader, face_sim, identity_drift
from evaluation.report import bootstrap, draw_sheet
from guidance import generate_batch
from model import LTXVideo
from text import TextEncoder
from toy import eye
from toy import world as toy
from toy.adherence import moves, shows_background
from toy.eye import CLASSES, SCENE, Eye
from vae import VideoVAE

GROUPS = {  # of the scene vector, for copy-paste
    "pose": ("yaw", "pitch", "roll", "x", "y", "scale"),
    "expression": ("smile", "open", "closed", "brows"),
    "light": ("light x", "light y", "light strength", "light warmth"),
    "background": ("background red", "background green", "background blue"),
    "shirt": ("shirt red", "shirt green", "shirt blue"),
}
COLUMNS = {  # of a row of `measure` -> heading
    "similarity": "similarity",
    "retrieved": "own reference nearest",
    "retrieved_permuted": "permuted",
    "face_rate": "frames with a face",
    "drift": "drift",
    "motion": "motions right",
    "direction": "direction right",
    "background": "background right",
    "skin": "skin",
    **{trait: trait for trait in CLASSES},
}

# ---------------------------------------------------------------------------------------------------------------------
# Cases and videos


def cases(seed: int, count: int, frames: int = 17, fps: float = 12.0, size: int = 64) -> list[dict[str, Any]]:
    """Clips of toy.toy_clip's test split: new people, motions never shown before these colors, sentences never read.

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


def settings_of(path: str | Path, **changes: float | None) -> dict[str, Any]:
    """What sample.py would tell `generate` for this checkpoint, with such of its options as are not None."""
    options = dict.fromkeys((*PAPER, "placement", "source_id", "phase_scale", "fit", "ref_timestep", "prompt_prefix"))
    options |= {"batch": None, "ref": None, "prompt": "-", "preset": None, "samples": 1, "seed": 0}
    return resolve_settings(argparse.Namespace(**options | changes), Checkpoint(path))


def make_videos(
    path: str | Path,
    gemma: str | Path,
    told: list[dict[str, Any]],
    photos: list[np.ndarray] | None,
    seeds: list[int],
    settings: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 16,
    title: str = "videos",
) -> np.ndarray:
    """The model's videos (N, F, H, W, 3) of the cases' prompts; photos None: plain text-to-video."""
    settings = dict(settings)
    fit, prefix = settings.pop("fit"), settings.pop("prompt_prefix")
    encoder = TextEncoder.from_checkpoint(path, gemma, device, dtype)
    contexts = [encoder.encode([begin_with(prefix, case["caption"])]) for case in told]
    null_context = encoder.encode([""])
    del encoder
    free(device)
    vae, model = VideoVAE.from_checkpoint(path, device, dtype), LTXVideo.from_checkpoint(path, device, dtype)
    videos, images = [], None
    for at in tqdm(range(0, len(told), batch), title, unit="batch"):
        some = slice(at, at + batch)
        if photos is not None:
            fitted = [FITS[fit](Image.fromarray(p), settings["height"], settings["width"]) for p in photos[some]]
            images = torch.stack([to_tensor(photo) for photo in fitted])
        context = torch.cat(contexts[some])
        made = generate_batch(model, vae, context, null_context, images, seeds=seeds[some], **settings)
        videos += [to_uint8(video) for video in made]
    return np.stack(videos)


# ---------------------------------------------------------------------------------------------------------------------
# One row a video


def measure(
    videos: np.ndarray,
    told: list[dict[str, Any]],
    reader: FaceReader,
    look: Eye,
    given: list[int] | None = None,
) -> list[dict[str, Any]]:
    """What each video (N, F, H, W, 3) shows, against its case. `given`: the case whose reference it was made with.

    similarity is metrics.face_sim with the own reference. A video is retrieved where the mean over its frames with a
    face of e_f / |e_f| is nearer (cosine) to its own reference than to any other case's; "permuted" asks the same for
    the next case's reference, which must happen by chance only. References are embedded at their known landmarks.
    """
    photos = torch.from_numpy(np.stack([case["reference"] for case in told]))
    points = torch.from_numpy(np.stack([case["reference_landmarks"] for case in told])).to(reader.device)
    with torch.no_grad():
        e_ref = reader.arc(from_bytes(photos.to(reader.device)).permute(0, 3, 1, 2), points).cpu()  # (N, E)
    of_photos = look.read(photos.numpy())["scene"]
    rows = []
    for k, (frames, case) in enumerate(zip(videos, told)):
        faces, seen, scene = reader.read(frames), look.read(frames), case["scene"]
        mean = torch.nn.functional.normalize(faces.arc[faces.found], dim=1).mean(0)
        nearest = int(torch.cosine_similarity(mean[None], e_ref).argmax()) if faces.found.any() else None
        right = {motion: moves(seen["scene"], motion) for motion in scene.motions}
        directed = [right[motion] for motion in right if toy.MOVES[motion].direction]
        photo = k if given is None else given[k]
        moved = {toy.MOVES[motion].track for motion in scene.motions}
        read = seen["scene"].mean(0)
        rows.append(
            {
                "similarity": face_sim(faces.arc, e_ref[k], faces.found),
                "retrieved": nearest == k,
                "retrieved_permuted": nearest == (k + 1) % len(told),
                "face_rate": faces.found.float().mean().item(),
                "drift": identity_drift(faces.arc, faces.found),
                "motion": all(right.values()),
                "direction": all(directed) if directed else None,
                "background": shows_background(frames, scene),
                "motions": right,
                "skin": abs(float(seen["skin"].mean()) - case["identity"]["skin"]) < 0.15,
                **{t: most_frequent(seen[t]) == CLASSES[t].index(case["identity"][t]) for t in CLASSES},
                # for copy_paste: what the video shows (None where the prompt moves it), what the given photo's scene
                # was, and what the network reads from that photo
                "shown": [None if name in moved else float(v) for name, v in zip(SCENE, read)],
                "photo": toy.scene_vector(told[photo]["reference_scene"])[0].tolist(),
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

    v is what the network reads from video i (mean over frames), r the truth of the scene in the photo it was given, j
    what the network reads from that photo; k runs over the group's numbers, i over the videos whose prompt does not
    move k. References are drawn independently of prompts, so a video that ignores its photo has 0 but for chance, and
    so has one compared with a permuted photo; one that repeats its photo has 1, whatever the network's errors.
    """
    return slope(*of_group(rows, group))


def copy_paste(rows: list[dict[str, Any]], group: str, resamples: int = 1000) -> tuple[float, float, float]:
    """`copied`, and its 95 % interval over resampled cases."""
    v, r, j = of_group(rows, group)
    again = np.random.default_rng(0).integers(len(rows), size=(resamples, len(rows)))
    low, high = np.nanpercentile([slope(v[i], r[i], j[i]) for i in again], [2.5, 97.5])
    return slope(v, r, j), float(low), float(high)


def of_group(rows: list[dict[str, Any]], group: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """v, r, j of `copied`, each (N, numbers of the group); v is nan where the prompt moves it."""
    at = [SCENE.index(name) for name in GROUPS[group]]
    v, r, j = (np.array([row[key] for row in rows], float)[:, at] for key in ("shown", "photo", "photo_read"))
    return v, r, j


def slope(v: np.ndarray, r: np.ndarray, j: np.ndarray) -> float:
    there = np.isfinite(v)
    r = np.where(there, r - (r * there).sum(0) / np.maximum(there.sum(0), 1), 0)  # centred, so that v and j need not be
    scale = (j * r).sum()
    return float((np.nan_to_num(v) * r).sum() / scale) if scale else float("nan")  # nan: a single case


def summarize(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float, float] | None]:
    """Mean and 95 % bootstrap interval of every column, then copy-paste by group; None where nothing was measured."""
    result: dict[str, tuple[float, float, float] | None] = {}
    for key in COLUMNS:
        values = np.array([row[key] for row in rows if row[key] is not None], float)
        ends = bootstrap(values, [str(k) for k in range(len(values))])
        result[key] = (float(values.mean()), *ends) if ends else None
    return result | {f"copied {group}": copy_paste(rows, group) for group in GROUPS}


def table(results: dict[str, dict[str, tuple[float, float, float] | None]]) -> str:
    """Markdown: a line for each number, a column for each kind of video."""
    headings = COLUMNS | {f"copied {group}": f"copied from the reference: {group}" for group in GROUPS}
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]
    for key, heading in headings.items():
        cells = [result[key] for result in results.values()]
        texts = ["" if cell is None else "{:.2f} ({:.2f} to {:.2f})".format(*cell) for cell in cells]
        lines.append(f"| {heading} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def reliability(told: list[dict[str, Any]], look: Eye) -> dict[str, tuple[float, float, float]]:
    """The judge judged on drawn clips. Of each motion: the share recognized of the clips that have it, the share
    claimed of those that have not (an opposite or another motion, or both), the share claimed of clips without any.
    "background": recognized, and claimed when asked for the next clip's."""
    read = [look.read(case["frames"])["scene"] for case in told]
    portraits = []
    for k, case in enumerate(told):
        rng, frames = np.random.default_rng((7, k)), case["frames"]
        still = toy.draw_scene(rng, len(frames), 12.0, moving=False)
        portraits.append(look.read(toy.render(case["identity"], still, frames.shape[1]))["scene"])
    rates = {}
    for motion in toy.MOVES:
        has = np.array([motion in case["scene"].motions for case in told])
        claimed = np.array([moves(scene, motion) for scene in read])
        rates[motion] = rate(claimed[has]), rate(claimed[~has]), rate([moves(s, motion) for s in portraits])
    others = [told[(k + 1) % len(told)]["scene"] for k in range(len(told))]
    right = [shows_background(case["frames"], case["scene"]) for case in told]
    wrong = [shows_background(c["frames"], o) for c, o in zip(told, others) if c["scene"].color != o.color]
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
    parser.add_argument("--det-size", type=int, default=128, help="side the detector sees (%(default)s)")
    parser.add_argument("--eye", default=str(ASSETS / "judge.safetensors"), help="the network (%(default)s)")
    parser.add_argument("--out", default="out/judge", help="folder for the table, the rows, the sheet (%(default)s)")
    parser.add_argument("--write", metavar="FOLDER", help="write the cases for sample.py --batch; nothing else")
    parser.add_argument("--train", metavar="FILE", help="learn the network and write it; nothing else")
    parser.add_argument("--minutes", type=float, default=60, help="for --train (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bfloat16 on a GPU, float32 on a CPU")
    options = parser.parse_args()
    for name in ("count", "batch"):
        if getattr(options, name) < (2 if name == "count" else 1):
            raise UserError(f"--{name} {getattr(options, name)} is too small")
    return options


def main() -> None:
    options = parse_arguments()
    device, dtype = resolve_device(options)
    if options.train:
        return train(options, device)
    path, out = options.ckpt or ASSETS / "tiny.safetensors", Path(options.out)
    if options.write:
        return write_cases(Path(options.write), options, settings_of(path))
    look = Eye.from_file(options.eye, device)
    settings = settings_of(path, s_text=options.s_text, s_ref=options.s_ref, steps=options.steps)
    size = {"frames": settings["frames"], "fps": settings["fps"], "size": settings["height"]}
    reader = FaceReader(options.faces, device=device, det_size=options.det_size)
    told = cases(options.seed, options.count, **size)
    photos = [case["reference"] for case in told]
    following = [(k + 1) % len(told) for k in range(len(told))]
    kinds = {"with reference": (photos, None)}
    if options.shuffle:
        kinds["another's reference"] = [photos[k] for k in following], following
    if options.no_reference:
        kinds["no reference"] = None, None
    seeds = [options.seed * len(told) + k for k in range(len(told))]
    rows = {}
    for kind, (shown, given) in kinds.items():
        videos = make_videos(path, options.gemma, told, shown, seeds, settings, device, dtype, options.batch, kind)
        rows[kind] = measure(videos, told, reader, look, given)
        if kind == "with reference":
            out.mkdir(parents=True, exist_ok=True)
            draw_sheet(out / "sheet.png", [picture(*triple) for triple in zip(told[:12], videos, rows[kind])])
    rows["drawn"] = measure(np.stack([case["frames"] for case in told]), told, reader, look)
    text = table({kind: summarize(of_kind) for kind, of_kind in rows.items()})
    text += "\n| drawn clips | recognized | claimed wrongly | claimed of a portrait |\n|---|---:|---:|---:|\n"
    for name, rates in reliability(told, look).items():
        text += f"| {name} | " + " | ".join("" if np.isnan(r) else f"{r:.2f}" for r in rates) + " |\n"
    with whole_file(out / "summary.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    with whole_file(out / "rows.json") as temporary:
        temporary.write_text(json.dumps(rows))
    print(f"{text}\nwrote summary.md, rows.json and sheet.png into {out}")


def write_cases(folder: Path, options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Portraits and cases.jsonl, which sample.py --batch and eval.py read, of the same people, prompts and seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    told, lines = cases(options.seed, options.count, *(settings[key] for key in ("frames", "fps", "height"))), []
    for k, case in enumerate(told):
        with whole_file(folder / f"{k:03}.png") as temporary:
            Image.fromarray(case["reference"]).save(temporary)
        given = {"id": f"{k:03}", "reference": f"{k:03}.png", "prompt": case["caption"]}
        lines.append(json.dumps(given | {"seed": options.seed * options.count + k}))
    with whole_file(folder / "cases.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print(f"wrote {len(lines)} portraits and {folder / 'cases.jsonl'}")


def train(options: argparse.Namespace, device: torch.device) -> None:
    look = eye.train(options.train, 60 * options.minutes, options.seed, device)
    clean, worse = (eye.accuracy(look, options.seed + 1, 500, worsened) for worsened in (False, True))
    print("| test split | drawn | worsened |\n|---|---:|---:|")
    for name in clean:
        print(f"| {name} | {clean[name]:.3f} | {worse[name]:.3f} |")
    print(f"wrote {options.train}: R^2 of numbers, share right of {', '.join(CLASSES)}")


def picture(case: dict[str, Any], frames: np.ndarray, row: dict[str, Any]) -> tuple[str, Image.Image, np.ndarray]:
    """A line of the sheet."""
    title = f"{case['caption']}   similarity {row['similarity']:.2f}"
    picks = np.linspace(0, len(frames) - 1, 6).round().astype(int)
    return title, Image.fromarray(case["reference"]), frames[picks]


if __name__ == "__main__":
    with one_line_errors():
        main()

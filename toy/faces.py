"""Face models of the drawn people: a detector and a recognizer of toy/world.py, as an InsightFace pack.

The identity losses (Eq. 8-10) need a frozen detector that finds the face and a frozen ArcFace that embeds it. The
released ones were trained on photographs and fail on drawings. The two here (facenets.py) have the same shapes, the
same training and the same file format. Boxes, landmarks and identities come from the renderer. Training includes
spoiled drawings, because a half-trained video model makes such frames. These models find no real faces.

    python -m toy.faces --out out/faces     # det_toy.onnx, rec_toy.onnx, and their accuracy on the test split
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import SEED, Parser, one_line_errors
from common.media import from_bytes
from face import CROP, ArcFace, FaceDetector, embed, recognition_file, similarity_matrix
from toy.descend import Loss, descend
from toy.facenets import SIDE, WIDTH, Detector, Recognizer, anchor_grid, arc_loss, detector_loss
from toy.portrait import boxes, landmarks, render
from toy.traits import Identity
from toy.world import draw_scene, person, toy_clip

MARGIN = 0.4  # m of ArcFace
SIZES = {"detector": (1800, 800), "recognizer": (900, 1200)}  # steps, people

# --- Pictures ---------------------------------------------------------------------------------------------------------


def spoil(frame: np.ndarray, rng: np.random.Generator, much: float = 1.0) -> np.ndarray:
    """A frame (H, W, 3) as a half-trained model or a bad camera would make it; often unchanged."""
    x, side = frame.astype(np.float32), len(frame)
    if rng.random() < 0.3 * much:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.3, 0.3 + 1.5 * much) * side / 64)
    if rng.random() < 0.3 * much:
        middle = x.mean((0, 1))
        x = middle + (x - middle) * rng.uniform(1 - 0.7 * much, 1.2) + rng.uniform(-40, 40) * much
    if rng.random() < 0.2 * much:
        count = int(rng.choice([8, 16, 32]))
        patches = rng.normal(0, rng.uniform(4, 35) * much, (count, count, 3)).astype(np.float32)
        x = x + cv2.resize(patches, (side, side), interpolation=cv2.INTER_NEAREST)
    if rng.random() < 0.35 * much:
        x = x + rng.normal(0, rng.uniform(3, 45) * much, x.shape).astype(np.float32)
    x = np.clip(x, 0, 255).astype(np.uint8)
    if rng.random() < 0.15 * much:
        x = cv2.imdecode(cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(20, 80))])[1], 1)
    return x


def faceless(rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """(size, size, 3) without a face: a background, shoulders, noise of any grain, or the shuffled tiles of a face."""
    kind = rng.choice(["empty", "shoulders", "noise", "shuffled"], p=[0.35, 0.1, 0.4, 0.15])
    if kind == "noise":
        coarse = int(rng.choice([2, 4, 8, 16, 32, size]))
        x = rng.normal(rng.uniform(60, 200, 3), rng.uniform(5, 90), (coarse, coarse, 3)).astype(np.float32)
        way = [cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC][rng.integers(3)]
        return np.clip(cv2.resize(x, (size, size), interpolation=way), 0, 255).astype(np.uint8)
    scene = draw_scene(rng, 1, moving=False)
    if kind != "shuffled":  # the head beside or above the frame
        x, y = (3.0, 0.0) if kind == "empty" else (0.0, rng.uniform(-1.2, -0.9))
        scene = replace(scene, pose=scene.pose | {"x": np.full(1, x), "y": np.full(1, y)})
    frame = render(person(int(rng.integers(1 << 30)), 0), scene, size)[0]
    if kind != "shuffled":
        return frame
    n = int(rng.choice([4, 8]))
    tiles = rearrange(frame, "(r h) (c w) rgb -> (r c) h w rgb", r=n, c=n)[rng.permutation(n * n)]
    return rearrange(tiles, "(r c) h w rgb -> (r h) (c w) rgb", r=n)


def fit(frame: np.ndarray) -> tuple[np.ndarray, float]:
    """(H, W, 3) -> (128, 128, 3) by insightface's own rule, black at right and bottom, and the scale."""
    scale = SIDE / max(frame.shape[:2])
    small = cv2.resize(frame, (round(frame.shape[1] * scale), round(frame.shape[0] * scale)))
    return np.pad(small, ((0, SIDE - small.shape[0]), (0, SIDE - small.shape[1]), (0, 0))), scale


def shots(seed: int, people: int, clips: int, frames: int, moving: float = 1.0) -> Iterator[tuple]:
    """Clips of each person: (identity, frames, landmarks (F, 5, 2), boxes (F, 4))."""
    for number in range(people):
        who = person(seed, number)
        rng = np.random.default_rng((seed, number, 77))
        for _ in range(clips):
            size = int(rng.choice([64, 64, 64, 64, 96]))
            scene = draw_scene(rng, frames, moving=bool(rng.random() < moving))
            yield who, render(who, scene, size), landmarks(who, scene, size), boxes(who, scene, size)


def _input(images: np.ndarray, deviation: float) -> Tensor:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()  # channels_last in memory
    return (x - 127.5) / deviation


# --- Training ---------------------------------------------------------------------------------------------------------


def detector_batch(pool: list[tuple], junk: list[np.ndarray], count: int, rng: np.random.Generator) -> tuple:
    """Images (count, 3, 128, 128), boxes (count, 4), landmarks (count, 5, 2); a quarter has no face."""
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    points = np.full((count, 7, 2), np.nan, np.float32)  # landmarks, then two corners of the box
    for k in range(count):
        if k < count // 4:
            images[k], _ = fit(spoil(junk[rng.integers(len(junk))], rng))
            continue
        frame, truth = pool[rng.integers(len(pool))]
        frame = spoil(frame, rng)
        if rng.random() < 0.5:
            frame = frame[:, ::-1]
            truth = (truth * [-1, 1] + [len(frame) - 1, 0])[[1, 0, 2, 4, 3, 5, 6]]
        if rng.random() < 0.25:  # smaller, on a canvas
            side = int(len(frame) * rng.uniform(1, 2.2))
            x, y = rng.integers(0, side - len(frame) + 1, 2) * (rng.random() < 0.6)
            canvas = np.empty((side, side, 3), np.uint8)
            canvas[:] = rng.integers(0, 256, 3) * (rng.random() < 0.6)
            canvas[y : y + len(frame), x : x + len(frame)] = frame
            frame, truth = canvas, truth + np.array([x, y])
        images[k], scale = fit(np.ascontiguousarray(frame))
        points[k] = truth * scale
    box = np.sort(points[:, 5:], 1).reshape(count, 4)  # sorted, because a mirror swaps left and right
    return _input(images, 128.0), torch.from_numpy(box), torch.from_numpy(points[:, :5])


def train_detector(out: Path, seed: int, steps: int, people: int, device: str) -> list[float]:
    """Write out/det_toy.onnx. Returns the loss of each step."""
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 1))
    scenes = tqdm(shots(seed, people, 1, 6), "detector: drawing", people, leave=False)
    pool = [(f, np.concatenate([p, b.reshape(2, 2)])) for _, *shot in scenes for f, p, b in zip(*shot)]
    junk = [faceless(rng) for _ in range(len(pool) // 4 + 1)]
    net = Detector().to(device, memory_format=torch.channels_last)
    grid = tuple(x.to(device) for x in anchor_grid())

    def loss(step: int) -> Tensor:
        x, box, points = (t.to(device) for t in detector_batch(pool, junk, 48, rng))
        return detector_loss(net(x), box, points, grid)

    metadata = {"what": "SCRFD-shaped face detector of drawn faces", "seed": seed, "people": people, "steps": steps}
    return _train(net, [], loss, steps, 3e-3, out / "det_toy.onnx", metadata)


def _train(net: nn.Module, others: list, loss: Loss, steps: int, lr: float, path: Path, metadata: dict) -> list[float]:
    optimizer = torch.optim.AdamW([*net.parameters(), *others], lr, weight_decay=0.02)
    losses = list(descend(path.stem, optimizer, loss, steps, clip=5.0, cycle=False))
    net.cpu().eval().save(path, {"by": "toy/faces.py"} | {name: str(value) for name, value in metadata.items()})
    return losses


def one_sided(who: Identity) -> bool:
    """True if the mirror image shows another identity."""
    return who["mark"] not in ("none", "freckles") or who["style"] == "side part"


def crops_of(seed: int, people: int, clips: int = 3, frames: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Aligned crops (N, 112, 112, 3) as bytes, number of the person (N,), flag "may be mirrored" (N,)."""
    crops, mirror, rng = [], [], np.random.default_rng((seed, 2))
    scenes = tqdm(shots(seed, people, clips, frames, 0.8), "recognizer: drawing", people * clips, leave=False)
    for who, images, points, _ in scenes:
        images = np.stack([spoil(image, rng, 0.6) for image in images])
        points = points + rng.normal(0, 0.008 * images.shape[1], points.shape).astype(np.float32)
        warps = similarity_matrix(torch.from_numpy(points)).numpy()
        crops += [cv2.warpAffine(image, warp, (CROP, CROP)) for image, warp in zip(images, warps)]
        mirror += [not one_sided(who)] * frames
    return np.stack(crops), np.arange(len(crops)) // (clips * frames), np.array(mirror)


def train_recognizer(out: Path, seed: int, steps: int, people: int, device: str) -> list[float]:
    """Write out/rec_toy.onnx. Returns the loss of each step."""
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 3))
    crops, labels, mirror = crops_of(seed, people)
    net = Recognizer().to(device, memory_format=torch.channels_last)
    centres = nn.Parameter(torch.randn(people, WIDTH, device=device) * 0.1)
    order = rng.permutation(len(crops))

    def loss(step: int) -> Tensor:
        nonlocal order
        rows, done = order[(step * 64 + np.arange(64)) % len(order)], step + 1
        if done * 64 % len(order) < 64:
            order = rng.permutation(len(crops))
        images = crops[rows]
        flip = mirror[rows] & (rng.random(len(rows)) < 0.5)
        images[flip] = images[flip, :, ::-1]
        gain, more = (rng.uniform(*r, (len(rows), 1, 1, 1)).astype(np.float32) for r in ((0.85, 1.15), (-0.1, 0.1)))
        x = (_input(images, 127.5) * torch.from_numpy(gain) + torch.from_numpy(more)).clamp(-1, 1)
        e = net(x.to(device, memory_format=torch.channels_last))
        return arc_loss(e, centres, torch.from_numpy(labels[rows]).to(device), MARGIN * min(1, 2 * done / steps))

    metadata = {"what": "ArcFace-shaped recognizer of drawn faces", "seed": seed, "people": people, "steps": steps}
    return _train(net, [centres], loss, steps, 4e-3, out / "rec_toy.onnx", metadata)


# --- Accuracy on people of the test split -----------------------------------------------------------------------------


def _frames(images: Iterable[np.ndarray]) -> Tensor:
    return from_bytes(np.stack(images)).permute(0, 3, 1, 2)


def measure_detector(detector: FaceDetector, seed: int = 0, people: int = 100) -> dict[str, float]:
    """Recall and landmark error (in pixels of 64) on 3 frames of each person, clean and spoiled; false alarms."""
    rng = np.random.default_rng((seed, 4))
    clips = [toy_clip(seed, k, frames=3, split="test") for k in range(people)]
    images, truth = (np.concatenate([c[key] for c in clips]) for key in ("frames", "landmarks"))
    figures = {}
    for name, pictures in (("clean", images), ("spoiled", [spoil(image, rng) for image in images])):
        points, _, valid = detector.detect(_frames(pictures))
        error = np.linalg.norm(points.numpy() - truth, axis=2)[valid.numpy()]
        figures[f"recall, {name}"] = valid.float().mean().item()
        figures[f"landmark error, {name}"] = float(error.mean()) if len(error) else float("nan")
    empty = [faceless(rng) for _ in range(3 * people)]
    for name, pictures in (("faceless", empty), ("noise", rng.integers(0, 256, (people, 64, 64, 3)).astype(np.uint8))):
        figures[f"false alarms, {name}"] = detector.detect(_frames(pictures))[2].float().mean().item()
    return figures


@torch.no_grad()
def measure_recognizer(detector: FaceDetector, phi: ArcFace, seed: int = 0, people: int = 64) -> dict[str, float]:
    """Cosines between each person's portrait and 3 frames of a clip; how often the own portrait is the nearest."""
    clips = [toy_clip(seed, k, frames=3, split="test") for k in range(people)]
    photos, frames = _frames([c["reference"] for c in clips]), _frames(np.concatenate([c["frames"] for c in clips]))
    e_ref, e = (F.normalize(embed(images, detector.detect(images)[0], phi)) for images in (photos, frames))
    cosine = e @ e_ref.T  # (3 * people, people)
    who = torch.arange(people).repeat_interleave(3)
    same = cosine.gather(1, who[:, None])
    others = (cosine.sum() - same.sum()) / (cosine.numel() - len(same))
    top = (cosine.argmax(1) == who).float().mean()
    return {"top-1": top.item(), "cosine, same": same.mean().item(), "cosine, others": others.item()}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/faces", help="folder of the pack (%(default)s)")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, as a check that the command runs")
    options = parser.parse_args()
    out, device = Path(options.out), "cuda" if torch.cuda.is_available() else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    for part, train in (("detector", train_detector), ("recognizer", train_recognizer)):
        start, (steps, people) = time.perf_counter(), (20, 20) if options.quick else SIZES[part]
        losses = train(out, options.seed, steps, people, device)
        print(f"{part}: {time.perf_counter() - start:.0f} s, loss {losses[0]:.3f} -> {np.mean(losses[-10:]):.3f}")
    detector, phi = FaceDetector(out), ArcFace.from_onnx(recognition_file(out))
    people = (8, 8) if options.quick else (100, 64)
    figures = measure_detector(detector, options.seed, people[0])
    figures |= measure_recognizer(detector, phi, options.seed, people[1])
    print("\n".join(f"{name:24}{value:.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    with one_line_errors():
        main()

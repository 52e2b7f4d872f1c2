"""A page that shows a cache before training: what its clips teach, and what to mend. It needs no model and no video.

shards ──> captions, facts, strips (clips/facts.py) ──> findings ──> show.html: one file, no script
"""

import base64
from collections import Counter
from collections.abc import Iterable
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from clips.captions import face_words, names_background, names_motion
from clips.facts import SAME_PERSON, STRIP, Facts, background, jpeg, thumbnail
from common.cache import CachedClip, CachedClips, ShardMetadata, read_metadata, read_settings, shard_file
from common.errors import UserError
from common.schema import parse_json

WORST, EXAMPLES, NAMED = 50, 6, 200  # clips least like their reference; per finding, clips with pictures and by name
SAME_PICTURES = 3.0  # root mean square between two signatures, of 255
TEMPTING = 0.5  # share of a clip's surroundings that is in its reference
SMALL_FACE, SHORT = 0.1, 10  # of the picture's height; words
CARD = 104  # longer side of a picture on the page

HEAD = """<!doctype html><meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>A cache</title><style>
body{font:15px/1.45 system-ui,sans-serif;max-width:68em;margin:2em auto;padding:0 1em;color:#222}
h2{margin-top:2em;border-bottom:1px solid #ccc} b{font-weight:600} small,svg text{color:#666;fill:#666;font-size:12px}
.clip{display:flex;gap:2px;margin:14px 0;align-items:flex-start}
.clip img:first-child{margin-right:8px}
.clip p{margin:0 0 0 8px;min-width:14em;flex:1;overflow-wrap:anywhere}.figures{display:flex;flex-wrap:wrap;gap:22px}
figure{margin:0}figcaption{font-weight:600}
</style>
"""


class Row(NamedTuple):
    """A clip as the page sees it. Numbers are None where they are not known."""

    number: int  # in the cache
    line: int  # of the manifest: windows of a long video share it
    name: str
    identity: str
    caption: str
    words: int
    tokens: int
    facts: Facts | None
    similarity: float | None = None
    face: float | None = None  # mean height of its faces, in picture heights
    yaw: float | None = None  # degrees
    background: float | None = None
    change: float | None = None  # between the pictures of the signature, of 255
    size: str = ""
    fps: float | None = None
    seconds: float | None = None
    damaged: bool = False  # its reference or caption


class Finding(NamedTuple):
    title: str
    rows: list[Row]  # the worst first
    advice: str
    twins: dict[int, Row] = {}  # number of a row -> the clip to see beside it

    def __str__(self) -> str:
        return f"{self.title}: {len(self.rows):,}"


def show(clips: CachedClips, out: Path, seed: int = 0) -> list[str]:
    """Write the page `out` about a cache, and return its summary, a line for each finding."""
    records = read_records(clips)
    bar = tqdm(records, "facts", unit="clip", leave=False, disable=None)
    rows = [read_row(clips, k, record) for k, record in enumerate(bar)]
    by_chance = surroundings_by_chance(clips, rows, seed)
    findings = find(rows, by_chance, clips.settings["max_tokens"])
    reasons = Counter(line["reason"] for line in clips.report if "reason" in line)
    left_out = [f"left out, {reason}: {count:,}" for reason, count in reasons.most_common()]
    summary = f"{len(rows):,} clips, {reasons.total():,} rows left out"
    sizes = [f"{size.height}x{size.width}x{size.frames}" for size in clips.buckets]
    settings = clips.settings | {"buckets": " ".join(sizes), "clips": len(rows)}
    settings = ", ".join(f"{key} {value}" for key, value in settings.items())
    page = [f"<h1>{escape(clips.folder.name)}</h1><p>{summary}.</p><p><small>{escape(settings)}</small></p>"]
    page += ["<h2>What to mend</h2>", "" if findings else "<p>Nothing was found.</p>", "<ul>"]
    page += [f"<li><b>{escape(str(finding))}.</b> {escape(finding.advice)}" for finding in findings]
    page += ["</ul>", _list(left_out)]
    page += ["<h2>Twenty clips</h2>", *(card(clips, row, label) for row, label in choose(rows, seed))]
    page += ["<h2>Figures</h2>", "<div class=figures>", *figures(rows, by_chance), "</div>"]
    for finding in findings:
        page.append(f"<h2>{escape(str(finding))}</h2>")
        for row in finding.rows[:EXAMPLES]:
            page += [card(clips, clip) for clip in (row, finding.twins.get(row.number)) if clip]
        page.append(_list(row.name for row in finding.rows[EXAMPLES:]))
    worst = _lowest(rows, "similarity", np.inf)[:WORST]
    page += [f"<h2>The {len(worst)} clips least like their reference</h2>", *(card(clips, row) for row in worst)]
    out.write_text(HEAD + "\n".join(page), encoding="utf-8", errors="replace")
    return [summary, *left_out, *map(str, findings)]


def read_records(clips: CachedClips) -> list[CachedClip]:
    """What the metadata says of each clip. Training does not keep it: it would fill the memory of every worker."""
    settings = read_settings(clips.folder)
    shards = (read_metadata(clips.folder / shard_file(k), settings, ShardMetadata) for k in range(settings["shards"]))
    return [record for shard in shards for record in shard.clips]


def read_row(clips: CachedClips, k: int, record: CachedClip) -> Row:
    words, text = clips.part(k, "caption") or b"", clips.part(k, "facts")
    caption = words.decode(errors="replace")
    line = record.row // clips.settings.get("windows", 1)
    row = Row(k, line, record.name, record.identity, caption, len(caption.split()), clips.tokens(k), None)
    if caption.encode() != words or not clips.picture(k, "image"):
        row = row._replace(damaged=True)
    if source := record.source:
        size = f"{source.width}x{source.height}"
        row = row._replace(size=size, fps=source.fps or None, seconds=source.seconds or None)
    try:
        facts = parse_json(Facts, text or b"", "facts")
    except UserError:  # none, or damaged
        return row
    heights = [box[3] - box[1] for box in facts.boxes if box]
    return row._replace(
        facts=facts,
        similarity=facts.similarity,
        face=float(np.mean(heights)) if heights else None,
        yaw=facts.pose[1] if facts.pose else None,
        background=facts.background,
        change=float(np.abs(np.diff(_signature(facts).reshape(3, -1), axis=0)).mean()),
    )


def find(rows: list[Row], by_chance: list[float], max_tokens: int) -> list[Finding]:
    """What a person should look at, without what no clip has."""
    median = float(np.median([row.words for row in rows]))
    known = [row for row in rows if row.facts]
    described = [row for row in rows if face_words(row.caption)]
    words = Counter(word for row in described for word in set(face_words(row.caption))).most_common(12)
    tempting = [row for row in known if row.background is not None and row.background > TEMPTING]
    share, chance = len(tempting) / len(rows), float(np.mean(np.array(by_chance or [0]) > TEMPTING))
    twins = duplicates(rows)
    findings = [
        Finding(
            "the reference or the caption is damaged",
            [row for row in rows if row.damaged],
            "Training skips such clips. Make their shard anew: remove it and run the same python prepare.py again.",
        ),
        Finding(
            "the reference may show another person",
            [row for row in _lowest(known, "similarity", SAME_PERSON) if not row.facts.turned],
            f"No face in the first, middle and last frame has a similarity of {SAME_PERSON} to the reference. Correct "
            "the reference, or leave such clips out: prepare.py --min-similarity.",
        ),
        Finding(
            "the video lies on its side or upside down",
            [row for row in known if row.facts.turned],
            "The face is upright, or like the reference, only in the turned picture. Turn the file, or correct its "
            "rotation entry. A person who lies down is no fault.",
        ),
        Finding(
            "no face in the first, middle and last frame",
            [row for row in known if row.similarity is None],
            "Such a clip teaches nothing about the person. prepare.py --require-face-in-video leaves out most of them.",
        ),
        Finding(
            f"the face takes less than {SMALL_FACE:.0%} of the picture's height",
            _lowest(known, "face", SMALL_FACE),
            "Few latent cells carry such a face. Cut the video closer, or leave it out.",
        ),
        Finding(
            "nearly the same pictures as another clip",
            [rows[k] for k in twins],
            "The first, middle and last frames are nearly equal. One of the two clips is enough.",
            {k: rows[twin] for k, twin in twins.items()},
        ),
        Finding(
            "the reference shares more than half of its surroundings with the clip",
            sorted(tempting, key=lambda row: -row.background) if share > chance + 0.05 + len(rows) ** -0.5 else [],
            f"That is {share:.0%} of the clips, and {chance:.0%} with another clip's reference. A model that copies "
            "background and clothes from such references has a lower loss. Give all clips of a person one identity in "
            "the manifest, so that prepare.py takes the reference from another clip, and keep the augmentation.",
        ),
        Finding(
            f"the caption has at most {SHORT} words, or less than half of the median, {median:.0f}",
            _lowest(rows, "words", max(SHORT + 1, median / 2)),
            "A model learns as chance what captions leave out: motion, clothes, place, light, camera.",
        ),
        Finding(
            f"the caption fills the text context of {max_tokens} tokens",
            [row for row in rows if row.tokens >= max_tokens],
            "Words beyond the context were cut off. Shorten the caption.",
        ),
        Finding(
            "the caption names no motion",
            [row for row in rows if not names_motion(row.caption)],
            "Prompts decide the motion only if captions name it. (A list of English words decides.)",
        ),
        Finding(
            "the caption names no background",
            [row for row in rows if not names_background(row.caption)],
            "Where a caption is silent, the best guess is the reference's background: a reason to copy it. (A list of "
            "English words decides.)",
        ),
        Finding(
            "the caption describes the face",
            described,
            "The reference decides the face; captions that repeat it make the reference less needed. Nothing was "
            f"changed. Words: {', '.join(f'{word} ({count:,})' for word, count in words)}.",
        ),
        Finding(
            "no measurements",
            [row for row in rows if not row.facts],
            "The cache was made without them, or they are damaged. Make it anew in another folder to see all figures.",
        ),
    ]
    return [finding for finding in findings if finding.rows]


def _lowest(rows: list[Row], field: str, limit: float) -> list[Row]:
    """Rows with a number below the limit, the lowest first."""
    known = [row for row in rows if getattr(row, field) is not None and getattr(row, field) < limit]
    return sorted(known, key=lambda row: getattr(row, field))


def _signature(facts: Facts) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(facts.signature), np.uint8).astype(np.float32)


def duplicates(rows: list[Row]) -> dict[int, int]:
    """Numbers of the clips with nearly the pictures of an earlier one, of another line -> its number."""
    known = [row.number for row in rows if row.facts]
    s = np.stack([_signature(rows[k].facts) for k in known] or [np.zeros(3)]) - 128  # (n, pixels)
    lines = np.array([rows[k].line for k in known])
    square, twins, step = (s**2).sum(1), {}, max(1, 10**7 // len(s))
    for begin in range(0, len(known), step):
        end = min(begin + step, len(s))
        distance = square[begin:end, None] + square[:end] - 2 * s[begin:end] @ s[:end].T  # squares, (step, end)
        near = np.tril(distance < SAME_PICTURES**2 * s.shape[1], begin - 1)
        near &= lines[begin:end, None] != lines[:end]
        twins |= {known[begin + k]: known[near[k].argmax()] for k in np.nonzero(near.any(1))[0]}
    return twins


def surroundings_by_chance(clips: CachedClips, rows: list[Row], seed: int) -> list[float]:
    """`background` of 200 clips with the reference of another clip."""
    known = [row for row in rows if row.background is not None]
    some = [known[k] for k in np.random.default_rng(seed).permutation(len(known))[:200]]
    values = []
    for row, other in zip(some, some[1:] + some[:1]) if len(some) > 1 else ():
        frames, reference = strip_frames(clips, row), clips.picture(other.number, "image")
        if frames and reference:
            values.append(background(frames[::2], row.facts.boxes, thumbnail(reference), other.facts.ref_box))
    return [value for value in values if value is not None]


def strip_frames(clips: CachedClips, row: Row) -> list[Image.Image]:
    strip = clips.picture(row.number, "strip")
    edges = [k * strip.width // STRIP for k in range(STRIP + 1)] if strip else []
    return [strip.crop((left, 0, right, strip.height)) for left, right in pairwise(edges)]


def choose(rows: list[Row], seed: int) -> list[tuple[Row, str]]:
    """Twenty clips, each with the reason: ten extremes, and as many by chance as it takes."""
    extremes = {
        "most background of the reference": ("background", -1),
        "smallest face": ("face", 1),
        "largest face": ("face", -1),
        "head turned farthest to one side": ("yaw", 1),
        "head turned farthest to the other side": ("yaw", -1),
        "least change": ("change", 1),
        "most change": ("change", -1),
        "shortest caption": ("words", 1),
        "longest caption": ("words", -1),
        "least like the reference": ("similarity", 1),
    }
    labels: dict[int, list[str]] = {}
    for label, (field, sign) in extremes.items():
        known = [row for row in rows if getattr(row, field) is not None]
        if known:
            labels.setdefault(min(known, key=lambda row: sign * getattr(row, field)).number, []).append(label)
    by_chance = [k for k in np.random.default_rng(seed).permutation(len(rows)).tolist() if k not in labels]
    by_chance = by_chance[: max(0, 20 - len(labels))]
    return [(rows[k], "by chance") for k in by_chance] + [(rows[k], ", ".join(labels[k])) for k in labels]


# --- HTML: everything that comes from a cache goes through `escape` or base64 -----------------------------------------


def card(clips: CachedClips, row: Row, label: str = "") -> str:
    """A clip: reference, strip, name, caption, numbers."""
    numbers = {"similarity": (row.similarity, ".2f"), "face": (row.face, ".0%"), "yaw": (row.yaw, ".0f")}
    numbers |= {"surroundings shared": (row.background, ".0%")}
    numbers |= {"seconds": (row.seconds, ".1f"), "fps": (row.fps, ".4g")}
    texts = [f"{name} {value:{form}}" for name, (value, form) in numbers.items() if value is not None]
    texts += [row.size] if row.size else []
    if row.facts and row.facts.turned:
        texts.insert(0, f"upright after {row.facts.turned} degrees against the clock")
    ref_image = clips.picture(row.number, "image")
    images = ([thumbnail(ref_image)] if ref_image else []) + strip_frames(clips, row)
    pictures = "".join(map(_image, images))
    label = f"<br><i>{escape(label)}</i>" if label else ""
    caption, texts = escape(row.caption), escape(", ".join(texts))
    text = f"<b>{escape(row.name)}</b>{label}<br>{caption}<br><small>{texts}</small>"
    return f"<div class=clip>{pictures}<p>{text}</p></div>"


def _image(image: Image.Image) -> str:
    height = round(CARD * image.height / max(image.size))
    return f'<img height={height} src="data:image/jpeg;base64,{base64.b64encode(jpeg(image)).decode()}" alt="">'


def _list(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = [f"and {len(texts) - NAMED:,} more"] if len(texts) > NAMED else []
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts[:NAMED] + more) + "</ul>" if texts else ""


def figures(rows: list[Row], by_chance: list[float]) -> list[str]:
    """All distributions as SVG. Clips without a number are left out of its figure."""
    fields = {  # field -> title and range
        "similarity": ("similarity of reference and clip", (-0.2, 1)),
        "face": ("height of the face in the picture", (0, 1)),
        "yaw": ("yaw of the head, degrees", (-90, 90)),
        "words": ("words of a caption", None),
        "seconds": ("length of the video, seconds", None),
        "fps": ("frames per second of the video", None),
        "background": ("surroundings shared with the reference", (0, 1)),
    }
    columns = [
        (title, [getattr(row, field) for row in rows if getattr(row, field) is not None], limits)
        for field, (title, limits) in fields.items()
    ]
    columns.append(("the same with another clip's reference", by_chance, (0, 1)))
    columns.append(("clips per identity", list(Counter(row.identity for row in rows).values()), None))
    svg = [histogram(*column) for column in columns if column[1]]
    sizes = Counter(row.size for row in rows if row.size)
    return svg + ([bars("size of the video", sizes.most_common(12))] if sizes else [])


def histogram(title: str, values: list[float], limits: tuple[float, float] | None) -> str:
    values = np.clip(values, *limits) if limits else values
    counts, edges = np.histogram(values, 24, limits)
    columns = "".join(
        f'<rect x="{12 * k}" y="{100 - h:.1f}" width=11 height="{h:.1f}" fill="#4a7db5">'
        f"<title>{edges[k]:.3g} to {edges[k + 1]:.3g}: {count:,}</title></rect>"
        for k, (count, h) in enumerate(zip(counts, 100 * counts / max(counts)))
    )
    ends = f"<text x=0 y=116>{edges[0]:.3g}</text><text x=288 y=116 text-anchor=end>{edges[-1]:.3g}</text>"
    middle = f"<text x=144 y=116 text-anchor=middle>median {np.median(values):.3g}</text>"
    return _figure(title, 120, columns + ends + middle)


def bars(title: str, counts: list[tuple[str, int]]) -> str:
    most = max(count for _, count in counts)
    lines = "".join(
        f'<text x=0 y="{18 * k + 13}">{escape(name)}</text><rect x=90 y="{18 * k + 2}" height=14 fill="#4a7db5" '
        f'width="{140 * count / most:.1f}"/><text x=236 y="{18 * k + 13}">{count:,}</text>'
        for k, (name, count) in enumerate(counts)
    )
    return _figure(title, 18 * len(counts), lines)


def _figure(title: str, height: int, svg: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption><svg width=288 height={height}>{svg}</svg></figure>"

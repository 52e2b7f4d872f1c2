"""The page about a cache names the faults that were planted in it, and holds no script whatever a caption says."""

import csv
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import prepare
from clips import show
from clips.captions import face_words, names_background, names_motion
from clips.facts import Facts
from common.cache import CachedClips
from common.media import read_video, write_video
from common.schema import parse_json
from toy.cache import prepare_toy
from toy.world import APART, Temptation, toy_clip, toy_words

CLIP = Temptation(reference="same clip", share=1.0)
SIZE = {"height": 64, "width": 64, "frames": 17, "fps": 12.0}
LONG = "A short clip: there is a person in an orange shirt who {} in front of a plain {} wall."
CAPTIONS = {  # file -> caption; a file is named after its only fault
    "stranger": LONG.format("turns the head left and smiles", "red"),
    "sideways": LONG.format("turns the head left and smiles", "teal"),
    "original": LONG.format("nods slowly and then smiles", "gray"),
    "copy": LONG.format("smiles and then nods slowly", "gray"),
    "brief": "A person turns slowly to the left near a wall.",  # ten words
    "long": "A person nods before a wall, " + "and nods again " * 20,
    "motionless": LONG.format("is there", "green"),
    "nowhere": "A short clip: there is a person in an orange shirt who slowly smiles and then nods and smiles again.",
    "described": LONG.format("with long blonde hair and blue eyes turns", "green"),
    "script": LONG.format("smiles", "</p><script>alert(1)</script><img src=x onerror=alert(2)> &amp; pink"),
    "good": LONG.format("smiles and looks up", "white"),
    "missing": "Its video does not exist.",
}  # fmt: skip
FINDINGS = {
    "may show another person": {"stranger"},
    "on its side": {"sideways"},
    "same pictures": {"copy", "original"},
    "words": {"brief"},
    "fills the text context": {"long", "script"},  # each sign is a token
    "names no motion": {"motionless"},
    "names no background": {"nowhere"},
    "describes the face": {"described"},
}


def drawn(name):
    number = list(CAPTIONS).index("original" if name == "copy" else name)
    return toy_clip(7, number, SIZE["frames"] + 1, split="test")


@pytest.fixture(scope="module")
def planted(root, tmp_path_factory):
    """A cache of clips with one fault each."""
    folder = tmp_path_factory.mktemp("planted")
    with open(folder / "manifest.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["video", "caption", "reference", "identity"])
        for name, caption in CAPTIONS.items():
            rows.writerow([f"{name}.mp4", caption, f"{name}.png", "twin" if name in ("original", "copy") else name])
            if name != "missing":
                frames = np.rot90(drawn(name)["frames"], name == "sideways", (1, 2))
                write_video(folder / f"{name}.mp4", frames, SIZE["fps"])
            photo = drawn("good" if name == "stranger" else name)["reference"]
            Image.fromarray(photo).save(folder / f"{name}.png")
    assets = root / "assets"
    models = {"ckpt": assets / "tiny.safetensors", "gemma": assets / "gemma", "faces": assets / "faces"}
    prepare.prepare(folder / "manifest.csv", out=folder / "cache", **models, **SIZE)
    return folder / "cache"


@pytest.fixture(scope="module")
def page(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    return out, show.show(CachedClips(planted), out)


class Reader(HTMLParser):
    """Tags with their attributes, text, and under each heading the names of the clips."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.sections, self.inside = [], [], {"": ""}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, text):
        self.texts.append(text)
        if self.inside == "h2":
            self.sections[text] = ""
        self.sections[list(self.sections)[-1]] += text
        self.inside = ""

    def names(self, heading):
        """The files named in the section whose heading contains the words."""
        found = [text for title, text in self.sections.items() if heading in title]
        return set(re.findall(r"([a-z]+):\d+", found[0].partition("\n")[2])) if found else set()


def test_each_planted_fault_is_named_and_nothing_else(page):
    out, summary = page
    reader = Reader(out.read_text())
    assert {words: reader.names(words) for words in FINDINGS} == FINDINGS
    headings = [title for title in reader.sections if re.search(r": \d+$", title)]
    assert len(headings) == len(FINDINGS), headings
    assert summary[:2] == ["11 clips, 1 rows left out", "left out, unreadable video: 1"]
    assert set(summary[2:]) == set(headings)
    for line in summary[1:]:  # with advice, at the top
        assert line in reader.sections["What to mend"]
    shown = reader.sections["Twenty clips"]
    assert all(f"{name}:" in shown and CAPTIONS[name].strip() in shown for name in CAPTIONS if name != "missing")
    assert re.findall(r"similarity (\S+),", reader.sections["The 11 clips least like their reference"]) == sorted(
        re.findall(r"similarity (\S+),", shown), key=float
    )
    assert "upright after 270 degrees against the clock" in shown  # np.rot90 turned it by 90 against the clock


def test_the_page_is_one_file_without_script(page, planted):
    reader = Reader(page[0].read_text())
    tags = [tag for tag, _ in reader.tags]
    assert not {"script", "link", "iframe", "object", "embed", "form", "a", "base"} & set(tags)
    names = {name for _, attributes in reader.tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or "href" in name]
    sources = [attributes["src"] for _, attributes in reader.tags if "src" in attributes]
    assert len(sources) >= 11 * 6 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert CAPTIONS["script"] in reader.texts  # as it was, and as text
    assert tags.count("svg") == 10


def facts_of(clips, name):
    number = [text.partition(":")[0] for text in clips.names].index(name)
    return number, parse_json(Facts, clips.part(number, "facts"), "facts")


def test_facts_are_what_other_programs_measure(planted, insightface_embeddings):
    clips = CachedClips(planted)
    for name in ("stranger", "original", "good"):
        number, facts = facts_of(clips, name)
        frames = read_video(
            planted.parent / f"{name}.mp4", **{k: SIZE[k] for k in ("frames", "fps", "height", "width")}
        )
        e_ref = clips[number]["e_ref"].numpy()
        e = insightface_embeddings(frames[[0, 8, 16]])
        cosines = [float(v @ e_ref / np.linalg.norm(v) / np.linalg.norm(e_ref)) for v in e]
        assert facts.similarity == pytest.approx(max(cosines), abs=0.03)
        drawing = drawn(name)  # its truth
        assert np.abs(np.array(facts.boxes) - drawing["boxes"][[0, 8, 16]] / 64).max() < 0.06
        photo = drawn("good" if name == "stranger" else name)
        assert np.abs(np.array(facts.ref_box) - photo["reference_box"] / 64).max() < 0.06
        assert abs(facts.pose[1] - np.degrees(np.mean(drawing["scene"].pose["yaw"][[0, 8, 16]] * np.pi / 180))) < 10
        strip = np.asarray(clips.picture(number, "strip")).astype(int)
        assert strip.shape == (64, 5 * 64, 3)
        for k, picture in enumerate(np.split(strip, 5, 1)):  # each is like its own frame, and like no other more
            distance = np.abs(picture - frames.astype(int)).mean((1, 2, 3))
            assert distance[4 * k] < min(6, distance.min() + 0.1)
        gray = np.frombuffer(bytes.fromhex(facts.signature), np.uint8).reshape(3, 8, 8)
        means = (frames[[0, 8, 16]] @ [0.299, 0.587, 0.114]).reshape(3, 8, 8, 8, 8).mean((2, 4))
        assert np.abs(gray - means).mean() < 4


@pytest.mark.parametrize(("temptation", "named"), [(CLIP, True), (APART, False)])
def test_references_cut_from_their_own_clip_are_called_a_temptation(root, tmp_path, temptation, named):
    assets = root / "assets"
    prepare_toy(tmp_path, 12, assets / "tiny.safetensors", assets / "gemma", assets / "faces", temptation=temptation)
    lines = [line for line in show.show(CachedClips(tmp_path), tmp_path / "show.html") if "surroundings" in line]
    assert bool(lines) == named
    assert not named or int(lines[0].rpartition(" ")[2]) >= 10


def test_near_duplicates_are_those_of_a_comparison_pair_by_pair():
    """4,000 clips are compared in more than one piece. 100 and 101 are windows of the same line."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(40, 200, (4000, 192)).astype(np.uint8)
    for clip, earlier, noise in ((9, 3, 2), (2600, 12, 2), (3999, 2601, 2), (3998, 2602, 5), (101, 100, 2)):
        pictures[clip] = pictures[earlier] + rng.choice([-noise, noise], 192)  # root mean square: noise

    def row(number, picture):
        facts = Facts(boxes=(None,) * 3, ref_box=(0, 0, 1, 1), similarity=None, turned=0, pose=None, background=None,
                      signature=picture.tobytes().hex())  # fmt: skip
        return show.Row(number, number // 2, "", "", "", 0, 0, facts)

    assert show.duplicates([row(k, picture) for k, picture in enumerate(pictures)]) == {9: 3, 2600: 12, 3999: 2601}


def test_a_cache_without_measurements_or_with_damaged_ones_still_has_its_page(planted, tmp_path):
    cache = shutil.copytree(planted, tmp_path / "cache")
    (file,) = cache.glob("shard-*")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    damaged = {
        "0000000.facts": b"{",
        "0000001.facts": b'{"boxes": 1}',
        "0000002.strip": b"\xff\xd8",
        "0000003.image": b"",
        "0000004.caption": b"\xff A man nods.",
    }
    for name, data in damaged.items():
        tensors[name] = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        )
    save_file(tensors, file, metadata)
    lines = show.show(CachedClips(cache), cache / "show.html")
    assert "no measurements: 2" in lines and "the reference or the caption is damaged: 2" in lines
    save_file({name: t for name, t in tensors.items() if not name.endswith(("facts", "strip"))}, file, metadata)
    lines = show.show(CachedClips(cache), cache / "show.html")
    assert "no measurements: 11" in lines and "the caption names no motion: 1" in lines


def test_the_command_refuses_and_leaves_the_cache_alone(planted, tmp_path, in_process):
    before = {path.name: path.read_bytes() for path in planted.iterdir()}
    for words, said in [
        (["--out", planted / "cache.json"], "does not end in .html"),
        (["--seed", "-1"], "--seed"),
        (["--out", tmp_path / "none" / "x.html"], "x.html"),
    ]:
        code, _, stderr = in_process(prepare.main, "prepare.py", "show", planted, *words)
        assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1 and said in stderr
    code, stdout, _ = in_process(prepare.main, "prepare.py", "show", planted, "--out", tmp_path / "x.html")
    assert code == 0 and stdout.startswith("11 clips, 1 rows left out\n") and f"wrote {tmp_path / 'x.html'}" in stdout
    assert before == {path.name: path.read_bytes() for path in planted.iterdir()}


def test_captions_of_the_drawn_world_lack_nothing_and_describe_no_face():
    for number in range(300):
        caption = toy_words(3, number)
        assert names_motion(caption) and names_background(caption) and not face_words(caption), caption


@pytest.mark.parametrize(
    ("caption", "motion", "background", "face"),
    [
        ("A woman in a red coat turns to the camera and smiles.", True, False, []),
        ("He is standing in a kitchen, a window behind him.", False, True, []),
        ("A man with a grey beard and deep-set eyes, reading on a park bench", True, True, ["beard", "deep-set eyes"]),
        ("A portrait of a blue-eyed, curly-haired girl", False, False, ["blue-eyed", "curly-haired"]),
        ("She closes her eyes, touches her chair and laughs.", True, False, []),
        ("", False, False, []),
    ],
)
def test_words_that_captions_lack_or_have(caption, motion, background, face):
    assert names_motion(caption) == motion and names_background(caption) == background
    assert face_words(caption) == face

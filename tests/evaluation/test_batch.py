"""sample.py --batch: the folder holds whole videos, whatever fails or is killed, and each is the video made alone."""

import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import sample
from common.errors import UserError
from common.media import contact_sheet, write_video
from evaluation.batch import Batch
from evaluation.cases import read_cases

ROOT = Path(__file__).resolve().parent.parent.parent
CLIPS = ROOT / "assets" / "clips"
SHORT = ["--steps", "1", "--frames", "5", "--height", "32", "--width", "48"]


@pytest.fixture
def command(in_process):
    """command("--batch", ...) -> (exit code, stdout, stderr) of `python sample.py ...`, in this process."""
    return partial(in_process, sample.main, "sample.py")


@pytest.fixture
def listed(tmp_path):
    """listed({...}, {...}) -> path of a list of these cases, with a photo and a prompt where they have none."""

    def write(*rows):
        path = tmp_path / "cases.jsonl"
        usual = {"reference": str(CLIPS / "0.png"), "prompt": "A man."}
        path.write_text("".join(json.dumps(usual | row) + "\n" for row in rows))
        return path

    return write


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_case_is_the_video_that_it_is_alone(command, listed, tmp_path):
    photo = CLIPS / "1.png"
    b = {"reference": str(photo), "prompt": "A woman.", "seed": 7}
    cases = listed({"id": "a"}, {"id": "b"} | b, {"id": "c"} | b | {"seed": 8})
    assert command("--batch", cases, *SHORT, "--out", tmp_path / "many")[0] == 0
    assert names(tmp_path / "many") == ["a.mp4", "a.png", "b.mp4", "b.png", "batch.json", "c.mp4", "c.png"]
    alone = ["--ref", photo, "--prompt", "A woman.", "--seed", 7, *SHORT, "--out", tmp_path / "b.mp4"]
    assert command(*alone)[0] == 0
    # Matrix products differ in the last bit with where in memory the numbers lie, so pixels may by one level of 255.
    sheets = [
        np.asarray(Image.open(path)).astype(int)
        for path in (tmp_path / "b.png", *(tmp_path / "many" / f"{name}.png" for name in "abc"))
    ]
    assert abs(sheets[0] - sheets[2]).max() <= 1
    assert all(abs(sheets[0] - sheets[k]).max() > 20 for k in (1, 3))
    told = []
    for path in (tmp_path / "b.mp4", tmp_path / "many" / "b.mp4"):
        with av.open(path) as container:
            told.append(json.loads(container.metadata["comment"]))
    assert told[0] == told[1] and told[0]["seed"] == 7


def test_a_failed_case_costs_only_itself(command, listed, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a photograph")
    rows = [
        {"id": "first"},
        {"id": "no-photo", "reference": "nowhere.png"},
        {"id": "no-image", "reference": "broken.jpg"},
        {"id": "no-prompt", "prompt": "  "},
        {"id": "bad-seed", "seed": -1},
        {"id": "last", "seed": 1},
    ]
    out = tmp_path / "videos"
    code, stdout, stderr = command("--batch", listed(*rows), *SHORT, "--out", out)
    assert code == 2 and stderr.splitlines()[-1].startswith("error: 4 cases failed"), stderr
    notes = [f"{row['id']}.failed.txt" for row in rows[1:5]]
    assert names(out) == sorted(["first.mp4", "first.png", "last.mp4", "last.png", "batch.json", *notes])
    for name, says in (
        ("no-photo", "no image at"),
        ("no-image", "broken.jpg"),
        ("no-prompt", "empty"),
        ("bad-seed", "-1"),
    ):
        assert says in (out / f"{name}.failed.txt").read_text() and f"{name} failed" in stdout
    rows[1]["reference"] = str(CLIPS / "2.png")  # what is mended is made, and its note goes
    assert command("--batch", listed(*rows), *SHORT, "--out", out)[0] == 2
    assert "no-photo.mp4" in names(out) and "no-photo.failed.txt" not in names(out)


def test_what_goes_wrong_while_sampling_costs_only_its_case(command, listed, monkeypatch, tmp_path):
    generate = sample.generate

    def out_of_memory_once(*arguments, seed, **options):
        if seed == 1:
            raise sample.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return generate(*arguments, seed=seed, **options)

    monkeypatch.setattr(sample, "generate", out_of_memory_once)
    cases = listed({"id": "a"}, {"id": "b", "seed": 1}, {"id": "c", "seed": 2})
    assert command("--batch", cases, *SHORT, "--out", tmp_path / "v")[0] == 2
    assert "out of memory" in (tmp_path / "v" / "b.failed.txt").read_text()
    assert {"a.mp4", "c.mp4"} < set(names(tmp_path / "v"))


KILLED = """
import os, signal, sys
from common import errors
replace, when = os.replace, sys.argv.pop(1)
def replace_or_die(source, target):
    if str(target).endswith(when):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
errors.os.replace = replace_or_die
import sample
sample.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["b.mp4", "b.png"])
def test_a_kill_loses_nothing_and_repeats_nothing(when, command, listed, monkeypatch, tmp_path):
    """SIGKILL where b's video, or its contact sheet, is written and not yet in its place."""
    cases, out = listed({"id": "a"}, {"id": "b", "seed": 1}, {"id": "c", "seed": 2}), tmp_path / "videos"
    options = ["--batch", str(cases), *SHORT, "--out", str(out)]
    script = [sys.executable, "-c", KILLED, when, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(".part" in name for name in names(out))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "a.png" in before and "c.mp4" not in before and (("b.mp4" in before) == (when == "b.png"))

    made = []
    generate = sample.generate
    monkeypatch.setattr(sample, "generate", lambda *a, **k: made.append(k["seed"]) or generate(*a, **k))
    assert command(*options)[0] == 0
    assert made == [1, 2]
    assert names(out) == ["a.mp4", "a.png", "b.mp4", "b.png", "batch.json", "c.mp4", "c.png"]
    assert all((out / name).stat().st_mtime_ns == before[name] for name in ("a.mp4", "a.png"))
    monkeypatch.setattr(sample.TextEncoder, "from_checkpoint", lambda *_: pytest.fail("loaded, with nothing to make"))
    assert command(*options)[0] == 0 and made == [1, 2]


def test_ranks_share_the_cases(command, listed, monkeypatch, tmp_path):
    cases = listed(*[{"id": str(k), "seed": k} for k in range(5)], {"id": "bad", "prompt": ""})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, stdout, _ = command("--batch", cases, *SHORT, "--out", tmp_path / "v")
    assert code == 0  # or torchrun would kill the other ranks for this one's bad case
    assert "bad failed" in stdout
    made = [name for name in names(tmp_path / "v") if name.endswith(".mp4")]
    assert made == ["1.mp4", "3.mp4"]
    monkeypatch.setenv("RANK", "0")
    assert command("--batch", cases, *SHORT, "--out", tmp_path / "v")[0] == 0
    made = [name for name in names(tmp_path / "v") if name.endswith(".mp4")]
    assert made == [f"{k}.mp4" for k in range(5)]


def test_gemma_reads_all_prompts_and_is_freed_before_the_dit_comes(command, listed, monkeypatch, tmp_path):
    order = []
    encode, load = sample.TextEncoder.encode, sample.LTXVideo.from_checkpoint
    monkeypatch.setattr(sample.TextEncoder, "encode", lambda s, p: order.append(p[0]) or encode(s, p))
    monkeypatch.setattr(sample, "free", lambda device: order.append("free"))
    monkeypatch.setattr(sample.LTXVideo, "from_checkpoint", lambda *a, **k: order.append("DiT") or load(*a, **k))
    cases = listed({"id": "a"}, {"id": "b", "prompt": "A cat."}, {"id": "c"})
    assert command("--batch", cases, *SHORT, "--out", tmp_path / "v")[0] == 0
    order = order[order.index("A man.") :]
    assert order == ["A man.", "A cat.", "free", "DiT"]


def test_one_folder_has_one_kind_of_video(command, listed, tmp_path):
    assert command("--batch", listed({"id": "a"}), *SHORT, "--out", tmp_path / "v")[0] == 0
    code, _, stderr = command("--batch", listed({"id": "b"}), *SHORT, "--s-ref", 2, "--out", tmp_path / "v")
    assert code == 2 and "s_r = 3.0" in stderr and "another --out" in stderr
    assert len(stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The folder itself, with videos that are written here in place of sampled ones

SETTINGS = {"height": 16, "width": 16, "frames": 5, "s_y": 5.0, "loras": ("a.safetensors:1",)}


@pytest.fixture
def made(listed, tmp_path):
    """made(rows) -> the batch of these cases, whose videos and sheets are all there as sample.py writes them."""

    def make(*rows):
        batch = Batch(tmp_path / "v", SETTINGS, read_cases(listed(*rows)))
        for case in batch.cases:
            used = SETTINGS | {"prompt": "prefix " + case.prompt, "seed": case.seed, "ref": str(case.reference)}
            frames = np.random.default_rng(case.seed).integers(0, 255, (5, 16, 16, 3)).astype(np.uint8)
            write_video(batch.video(case), frames, 12, json.dumps(used))
            contact_sheet(batch.sheet(case), None, frames)
        return batch

    return make


def test_a_whole_video_of_the_case_is_complete(made, listed):
    batch = made({"id": "a"}, {"id": "b", "seed": 1})
    assert batch.missing() == []
    for change in ({"prompt": "A cat."}, {"seed": 5}, {"reference": str(CLIPS / "1.png")}):
        again = Batch(batch.folder, SETTINGS, read_cases(listed({"id": "a"} | change, {"id": "b", "seed": 1})))
        (case,) = again.missing()
        with pytest.raises(UserError, match="is there, not of this case"):
            again.check(case)
    batch.sheet(batch.cases[0]).unlink()  # a kill between video and sheet
    assert [case.id for case in batch.missing()] == ["a"]
    batch.check(batch.cases[0])


@pytest.mark.parametrize("cut", [1, 50, 500, 10**9])
def test_a_video_that_breaks_off_is_not_complete(cut, made):
    batch = made({"id": "a"})
    video = batch.video(batch.cases[0])
    video.write_bytes(video.read_bytes()[:-cut])
    assert batch.missing() == batch.cases
    with pytest.raises(UserError, match="not whole"):
        batch.check(batch.cases[0])


def test_files_of_others_are_not_replaced(command, listed, tmp_path):
    """A photo under the sheet's name, a foreign video, empty files, folders: their cases fail, and the rest is made."""
    out = tmp_path / "v"
    out.mkdir()
    (out / "holiday.png").write_bytes((CLIPS / "0.png").read_bytes())
    (out / "film.mp4").write_bytes((CLIPS / "0.mp4").read_bytes())
    (out / "empty.mp4").touch()
    (out / "folder.mp4").mkdir()
    (out / "note.failed.txt").mkdir()
    (out / "link.png").symlink_to(tmp_path / "nowhere")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    rows = [{"id": name} for name in ("holiday", "film", "empty", "folder", "link", "good")]
    cases = listed(*rows, {"id": "note", "seed": -1}, {"id": "x" * 300})
    code, stdout, stderr = command("--batch", cases, *SHORT, "--out", out)
    assert code == 2 and stderr.splitlines()[-1].startswith("error: 7 cases failed")
    assert all(f"{row['id']} failed" in stdout for row in rows[:-1]) and "note: the reason could not be" in stdout
    assert "longer than 200 bytes" in (out / "line-8.failed.txt").read_text()
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name in before} == before
    assert {"good.mp4", "good.png"} < set(names(out)) and "holiday.mp4" not in names(out)


def test_the_references_survive(command, tmp_path):
    """A list beside its photos, and videos made into the same folder: a.png would become the contact sheet."""
    photo = tmp_path / "a.png"
    photo.write_bytes((CLIPS / "0.png").read_bytes())
    for reference in ("a.png", "b.png"):  # the sheet of the same case, and of another one
        rows = [{"id": reference[0], "reference": "a.png", "prompt": "A man."}]
        rows += [{"id": "a", "reference": str(CLIPS / "1.png"), "prompt": "A man."}] * (reference == "b.png")
        (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, _, stderr = command("--batch", tmp_path / "cases.jsonl", *SHORT, "--out", tmp_path)
        assert code == 2 and "would replace" in stderr and len(stderr.splitlines()) == 1
        assert photo.read_bytes() == (CLIPS / "0.png").read_bytes()
        assert names(tmp_path) == ["a.png", "cases.jsonl"]


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_links_to_references_are_not_replaced(link, listed, tmp_path):
    photo, out = tmp_path / "photo.png", tmp_path / "v"
    photo.write_bytes((CLIPS / "0.png").read_bytes())
    out.mkdir()
    getattr(out / "b.png", link)(photo)
    cases = read_cases(listed({"id": "a", "reference": "photo.png"}, {"id": "b"}))
    with pytest.raises(UserError, match="would replace"):
        Batch(out, SETTINGS, cases)
    with pytest.raises(UserError, match="would replace"):
        Batch(out, SETTINGS, cases[1:], inputs=[photo])
    assert names(out) == ["b.png"]


def test_any_exception_costs_only_its_case(made):
    batch = made({"id": "a"}, {"id": "b"})
    errors = {"KeyError: 'x'": KeyError("x"), "AssertionError": AssertionError(), "MemoryError": MemoryError()}
    for reason, error in errors.items():
        with batch.one_case(batch.cases[0]):
            raise error
        assert batch.note(batch.cases[0]).read_text().startswith(reason)
    assert batch.failed == 3
    with pytest.raises(KeyboardInterrupt), batch.one_case(batch.cases[1]):
        raise KeyboardInterrupt


BROKEN_JSON = [b"", b"{", b"[1]", b"null", b"5", b"\xff", b"[" * 100000, b'{"s_y": "\\ud800"}', b'{"height": 5}', b"{}"]


@pytest.mark.parametrize("text", BROKEN_JSON)
def test_settings_that_are_no_settings(text, listed, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "batch.json").write_bytes(text)
    with pytest.raises(UserError) as error:
        Batch(tmp_path / "v", SETTINGS, read_cases(listed({"id": "a"})))
    assert "\n" not in str(error.value) and str(tmp_path / "v") in str(error.value)
    assert (tmp_path / "v" / "batch.json").read_bytes() == text


@pytest.mark.parametrize("rank, world", [("x", "2"), ("0", "0"), ("2", "2"), ("-1", "2"), ("0.5", "2"), ("", "2")])
def test_ranks_that_are_none(rank, world, listed, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match=r"RANK|WORLD_SIZE"):
        Batch(tmp_path / "v", SETTINGS, read_cases(listed({"id": "a"})))


@pytest.mark.parametrize("option", [["--prompt", "A man."], ["--ref", "face.png"], ["--samples", "2"], ["--seed", "5"]])
def test_options_of_a_single_video_are_refused(option, command, listed, tmp_path):
    code, _, stderr = command("--batch", listed({"id": "a"}), *option, "--out", tmp_path / "v")
    assert code == 2 and "leave out --prompt, --ref, --samples, --seed" in stderr


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["lists no case"]),
        ('{"id": "a"}\nnonsense\n', ["line 2", "not a JSON object"]),
        ("[1, 2]\n", ["line 1", "not a JSON object"]),
        ('{"prompt": "A man."}\n', ["line 1", '"id"']),
        ('{"id": "a"}\n\n{"id": "a"}\n', ["line 3", "'a' is there twice"]),
        ('{"id": "../a"}\n', ["line 1", "name a file"]),
        ('{"id": ".hidden"}\n', ["line 1", "name a file"]),
        ('{"id": ""}\n', ["line 1", "name a file"]),
        (b"\xff\xfe", ["UTF-8"]),
        ("[" * 100000, ["line 1", "not a JSON object"]),
        ('{"id": true}\n', ["line 1", "name a file"]),
        ('{"id": "\\ud800"}\n', ["line 1", "name a file"]),
        ('{"id": 1e999}\n', ["line 1", "name a file"]),
        (None, ["no list of cases at"]),
    ],
)
def test_lists_that_cannot_be_understood(text, words, tmp_path):
    path = tmp_path / "cases.jsonl"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read_cases(path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


def test_references_are_relative_to_the_list(tmp_path):
    row = {"id": 12, "reference": "photos/é.png", "prompt": " A man. ", "note": "ignored"}
    (tmp_path / "cases.jsonl").write_text(json.dumps(row) + "\n\n")
    (case,) = read_cases(os.path.relpath(tmp_path / "cases.jsonl"))
    assert case.reference.resolve() == tmp_path / "photos" / "é.png"
    assert (case.id, case.prompt, case.seed, case.problem) == ("12", "A man.", 0, None)


GOOD = {"reference": "a.png", "prompt": "A man.", "seed": 3}
BAD = [  # (field, value): each makes its case unusable and costs no other
    *[("seed", value) for value in (-1, 1.5, "1", None, True, 2**63, 10**400, [1], math.nan, 1e30)],
    *[("reference", value) for value in (None, 5, " ", [], {}, "a\0b", "\ud800.png", "\udce9.png")],
    *[("prompt", value) for value in (None, 5, " ", [], "half an emoji \ud83d")],
]


@pytest.mark.parametrize("field, value", BAD)
def test_a_bad_field_is_the_problem_of_its_case(field, value, tmp_path):
    rows = [{"id": "a"} | GOOD, {"id": "bad"} | GOOD | {field: value}, {"id": "b"} | GOOD | {"note": "\ud83d"}]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, bad, b = read_cases(tmp_path / "cases.jsonl")
    assert bad.problem and "line 2" in bad.problem and "\n" not in bad.problem and len(bad.problem) < 500
    for case in (a, b):
        assert (case.problem, case.reference, case.prompt, case.seed) == (None, tmp_path / "a.png", "A man.", 3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists), key=st.data())
def test_lists_of_anything(value, key, tmp_path):
    """Any JSON value in any field: the line is read, or its case has a problem, or one UserError names the line."""
    field = key.draw(st.sampled_from(["id", "reference", "prompt", "seed", "note"]))
    rows = [{"id": "a"} | GOOD | {field: value}, {"id": "last"} | GOOD]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        first, last = read_cases(tmp_path / "cases.jsonl")
    except UserError as error:
        assert field == "id" and "line 1" in str(error) and "\n" not in str(error)
        return
    assert last.problem is None and last.id == "last"
    if first.problem is None:
        assert "/" not in first.id and not first.id.startswith(".")
        assert isinstance(first.prompt, str) and first.prompt.strip() == first.prompt != ""
        assert type(first.seed) is int and 0 <= first.seed < 2**63

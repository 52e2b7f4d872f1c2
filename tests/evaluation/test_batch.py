"""sample.py --batch: the folder holds whole videos, whatever fails or is killed, and each is the video made alone."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import sample
from common.errors import UserError
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


def test_only_ones_own_half_written_files_are_removed(listed, monkeypatch, tmp_path):
    cases = read_cases(listed({"id": "a"}, {"id": "a.1"}, {"id": "a.1.failed"}))
    others = [".a.1.77.part.mp4", ".a.1.77.part.png", ".a.1.failed.77.part.txt", "a.77.part.mp4", ".b.77.part.mp4"]
    for name in [*others, ".a.77.part.mp4", ".a.77.part.png", ".a.failed.77.part.txt"]:
        (tmp_path / name).touch()
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert [case.id for case in Batch(tmp_path, {}).missing(cases)] == ["a"]
    assert names(tmp_path) == sorted([*others, "batch.json", "cases.jsonl"])


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


def test_the_references_survive(command, tmp_path):
    """A list beside its photos, and videos made into the same folder: a.png would become the contact sheet."""
    photo = tmp_path / "a.png"
    photo.write_bytes((CLIPS / "0.png").read_bytes())
    (tmp_path / "cases.jsonl").write_text('{"id": "a", "reference": "a.png", "prompt": "A man."}\n')
    code, stdout, _ = command("--batch", tmp_path / "cases.jsonl", *SHORT, "--out", tmp_path)
    assert code == 2 and "would replace its reference" in stdout
    assert photo.read_bytes() == (CLIPS / "0.png").read_bytes()


@pytest.mark.parametrize("option", [["--prompt", "A man."], ["--ref", "face.png"], ["--samples", "2"]])
def test_options_of_a_single_video_are_refused(option, command, listed, tmp_path):
    code, _, stderr = command("--batch", listed({"id": "a"}), *option, "--out", tmp_path / "v")
    assert code == 2 and "leave out --prompt, --ref and --samples" in stderr


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

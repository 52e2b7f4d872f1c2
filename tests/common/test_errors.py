"""errors.py: one line and exit code 2 for the user's causes, 70 for bugs, files whole or not there."""

import inspect
import json
import multiprocessing
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.errors import Parser, UserError, one_line_errors, whole_file
from common.outputs import refuse_overwrite


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("no such\n  file: mend it"), 2, "no such file: mend it"),
        (FileNotFoundError(2, "No such file or directory", "x.mp4"), 2, "No such file or directory (x.mp4)"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (OSError("words only"), 2, "words only"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nMore."), 2, "out of GPU memory"),
        (MemoryError(), 2, "memory"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_the_user_can_mend_is_one_line(capsys, error, code, words):
    with pytest.raises(SystemExit) as left, one_line_errors():
        raise error
    out, err = capsys.readouterr()
    assert left.value.code == code and out == "" and words in err
    assert len(err.splitlines()) == (1 if words else 0)


def test_too_large_for_the_cpus_memory_is_one_line(capsys):
    """torch says this with a plain RuntimeError; `--height 99968 --width 99968` on a CPU ends here."""
    with pytest.raises(SystemExit) as left, one_line_errors():
        torch.empty(2**60, dtype=torch.uint8)
    assert left.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("bug", [KeyError("x"), RuntimeError("shapes do not match"), AssertionError(), ValueError("x")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)), one_line_errors():
        raise bug


@pytest.mark.parametrize("value", [None, "", "0"])
def test_a_bug_is_one_line_with_type_and_place(capsys, monkeypatch, value):
    """The place is the innermost line of this project: here the test's, not json's."""
    monkeypatch.delenv("ST_DRC_TRACEBACK")
    if value is not None:
        monkeypatch.setenv("ST_DRC_TRACEBACK", value)
    with pytest.raises(SystemExit) as left, one_line_errors():
        line = inspect.currentframe().f_lineno + 1
        json.loads("{,}")
    out, err = capsys.readouterr()
    assert left.value.code == 70 and out == "" and len(err.splitlines()) == 1
    for words in ("JSONDecodeError", f"tests/common/test_errors.py:{line}", "this is a bug", "ST_DRC_TRACEBACK=1"):
        assert words in err


def test_a_line_is_printable_and_not_endless(capsys):
    message = "a\x1b[31mb\x00c\ud800d\udce9 Фото 顔 😀\u2028e" + "x" * 5000 + " end"
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError(message)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and len(err) < 2000 and err[:-1].isprintable() and err.endswith(" end\n")
    assert err.startswith(r"error: a\x1b[31mb\x00c\ud800d\udce9 Фото 顔 😀")


COMMAND = """
import sys
from common.errors import UserError, one_line_errors
with one_line_errors():
    {body}
"""


def run(root, body, shell="exec {python} -c {code}", **options):
    code = shlex.quote(COMMAND.format(body=body))
    command = shell.format(python=shlex.quote(sys.executable), code=code)
    environment = {key: value for key, value in os.environ.items() if key != "ST_DRC_TRACEBACK"}
    environment |= {"PYTHONPATH": str(root)}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, timeout=600, **options)


@pytest.mark.parametrize("unbuffered", ["", "-u "])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_ends_quietly(root, unbuffered, lines):
    """One line stays in the buffer until the end; many break off in the middle."""
    shell = "{python} " + unbuffered + "-c {code} | true; exit ${{PIPESTATUS[0]}}"
    body = f"import time; time.sleep(0.5); print('line\\n' * {lines})"
    done = run(root, body, shell)
    assert (done.returncode, done.stdout, done.stderr) == (141, b"", b"")


def test_another_pipe_is_no_reason_to_be_quiet(root):
    done = run(root, "raise BrokenPipeError(32, 'Broken pipe')")
    assert done.returncode == 2 and done.stderr == b"error: Broken pipe\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(root, tmp_path, closed):
    """Without a descriptor in its place, the next file opened would receive the messages."""
    body = "file = open('f', 'w'); print('out'); print('err', file=sys.stderr); sys.stdin.read(); raise UserError('x')"
    done = run(root, body, "exec {python} -c {code} " + closed, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and (tmp_path / "f").read_bytes() == b""
    assert done.stdout == (b"" if ">&-" in closed.replace("2>&-", "") else b"out\n")
    assert done.stderr == (b"" if "2>&-" in closed else b"err\nerror: x\n")


def test_a_file_name_that_is_not_utf8_prints(root, tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).touch()
    done = run(root, "import os; print('wrote', *os.listdir('.')); raise UserError(os.listdir('.')[0])", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == b"wrote caf\\udce9.mp4\n"
    assert done.stderr == b"error: caf\\udce9.mp4\n"


def test_nothing_wrong_nothing_said(capsys):
    with one_line_errors():
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("options", [["--unknown"], ["--steps", "many"], ["--steps"]])
def test_wrong_options_are_one_line_without_usage(capsys, options):
    parser = Parser()
    parser.add_argument("--steps", type=int)
    with pytest.raises(SystemExit) as left, one_line_errors():
        parser.parse_args(options)
    err = capsys.readouterr().err
    assert left.value.code == 2 and len(err.splitlines()) == 1 and "usage" not in err and "--help" in err


def test_whole_file_appears_at_the_end(tmp_path):
    path = tmp_path / "clip.mp4"
    with whole_file(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".mp4" and temporary != path
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whole_file_leaves_the_old_one_on_any_failure(tmp_path, error):
    path = tmp_path / "clip.mp4"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_whole_file_that_was_never_written_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "clip.mp4"):
        pass
    assert list(tmp_path.iterdir()) == []


WRITE_SLOWLY = """
import signal, sys, time
from common.errors import one_line_errors, whole_file
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with it ignored
with one_line_errors(), whole_file(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, None), (signal.SIGKILL, None)])
def test_a_killed_program_leaves_no_output(root, tmp_path, number, code):
    """Whatever the signal, nothing stands under the output's name; a program that may still act cleans up."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", WRITE_SLOWLY, tmp_path / "clip.mp4"]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.05)
    child.send_signal(number)
    _, err = child.communicate(timeout=600)
    left = [path.name for path in tmp_path.iterdir()]
    assert "clip.mp4" not in left
    if code:
        assert child.returncode == code and left == [] and err == ""


def test_the_next_run_removes_what_a_killed_one_left(root, tmp_path):
    """Its own leftovers and nothing else: no other file's, none that a living process writes, no folder, no link."""
    path, environment = tmp_path / "clip.mp4", os.environ | {"PYTHONPATH": str(root)}
    for name in ("clip.mp4", "clip.1.mp4", "clip.1.mp4"):
        child = subprocess.Popen([sys.executable, "-c", WRITE_SLOWLY, tmp_path / name], env=environment,
                                 stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert child.stdout.readline() == "ready\n"
        child.kill()
        child.communicate()
    others = {".clip.1a.part.png", ".clip.part.mp4", "clip.77.part.mp4", ".clip.a.b.part.mp4"}
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".clip.aa.part.mp4").mkdir()
    os.mkfifo(tmp_path / ".clip.ab.part.mp4")
    (tmp_path / ".clip.ac.part.mp4").symlink_to("clip.77.part.mp4")
    others |= {".clip.aa.part.mp4", ".clip.ab.part.mp4", ".clip.ac.part.mp4"}
    left = {p.name for p in tmp_path.iterdir()} - others
    assert len(left) == 2  # of clip.mp4, and of the second run of clip.1.mp4: it removed the first one's
    with whole_file(path) as first, whole_file(path) as second:  # the second sees the first's, which is alive
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() == "1"
    names = {p.name for p in tmp_path.iterdir()} - others
    assert names == {"clip.mp4"} | {name for name in left if name.startswith(".clip.1.")}


def write_often(path, count, failures):
    for _ in range(count):
        try:
            with whole_file(path) as temporary:
                temporary.write_text("whole")
        except BaseException as error:
            failures.put(repr(error))


def test_many_processes_may_write_the_same_file(tmp_path):
    context = multiprocessing.get_context("fork")
    failures, path = context.Queue(), tmp_path / "batch.json"
    children = [context.Process(target=write_often, args=(path, 200, failures)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(600)
    assert failures.empty() and path.read_text() == "whole" and os.listdir(tmp_path) == ["batch.json"]


def test_no_planted_link_is_followed(tmp_path, monkeypatch):
    """Even if the name could be guessed: the file must be new."""
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    (tmp_path / "victim").write_text("mine")
    (tmp_path / f".clip.{'0' * 16}.part.mp4").symlink_to("victim")
    with pytest.raises((UserError, FileExistsError)), whole_file(tmp_path / "clip.mp4") as temporary:
        temporary.write_text("theirs")
    assert (tmp_path / "victim").read_text() == "mine"


def test_an_output_is_readable_like_any_file_and_may_be_empty(tmp_path):
    mask = os.umask(0o022)
    try:
        with whole_file(tmp_path / "log.jsonl") as temporary:
            temporary.write_text("")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "log.jsonl").stat().st_mode) == 0o644


def test_disk_errors_name_the_file(root, tmp_path):
    absent = tmp_path / "no" / "folder" / "clip.mp4"
    with pytest.raises(UserError, match=r"no/folder/clip\.mp4 cannot be written: No such file"), whole_file(absent):
        pass
    (tmp_path / "clip.mp4").mkdir()
    taken = pytest.raises(UserError, match=r"clip\.mp4 is a folder: name a file")
    with taken, whole_file(tmp_path / "clip.mp4") as temporary:
        temporary.write_text("x")
    with (
        pytest.raises(UserError, match=r"x\.png cannot be written: File name too long"),
        whole_file("x" * 300 + "x.png"),
    ):
        pass
    with pytest.raises(FileNotFoundError, match="other"), whole_file(tmp_path / "a.txt"):
        (tmp_path / "other").read_text()  # an input's error stays the input's
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); {}"
    texts = "from common.errors import whole_file\n    with whole_file('full.txt') as t: t.write_text('x' * 5000)"
    done = run(root, limited.format(texts), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == b"error: full.txt cannot be written: File too large\n"
    video = "import numpy as np; from common.media import write_video; "
    video += "write_video('full.mp4', np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), 'uint8'), 24)"
    done = run(root, limited.format(video), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == b"error: full.mp4 cannot be written: File too large\n"
    sheet = "import numpy as np; from common.media import contact_sheet; "
    sheet += "contact_sheet('full.png', None, np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), 'uint8'))"
    done = run(root, limited.format(sheet), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == b"error: full.png cannot be written: File too large\n"
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_an_input_that_may_not_be_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo, other = tmp_path / "1.png", tmp_path / "sub" / "2.png"
    other.parent.mkdir()
    photo.write_text("photo")
    other.write_text("other")
    os.link(photo, tmp_path / "hard.png")
    (tmp_path / "soft.png").symlink_to("hard.png")
    (tmp_path / "folder").symlink_to("sub")
    for output in ("1.png", "./sub/../1.png", photo, "hard.png", "soft.png"):
        with pytest.raises(UserError, match=r"would replace .*1\.png, which is an input"):
            refuse_overwrite(["out.mp4", None, output], [None, other, photo])
    with pytest.raises(UserError, match=r"folder/2\.png would replace .*sub/2\.png"):
        refuse_overwrite([Path("folder") / "2.png"], [other])
    with pytest.raises(UserError, match=r"new\.png would replace new\.png"):  # not there yet: by name alone
        refuse_overwrite(["sub/../new.png"], ["new.png"])
    refuse_overwrite(["out.mp4", "out.png", None, "sub/1.png"], [photo, other, None, "no/such.png"])
    refuse_overwrite([], [photo])
    refuse_overwrite([photo], [])

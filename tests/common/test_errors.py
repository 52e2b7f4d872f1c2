"""errors.py: one line and exit code 2 for what the user can mend, a traceback for bugs, files whole or not there."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from common.errors import Parser, UserError, one_line_errors, whole_file


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

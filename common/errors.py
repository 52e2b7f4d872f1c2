"""One clear line for the person who can mend the cause, exit code 2, no traceback.

A function raises `UserError` when the cause lies outside the code: a file, an option, a machine. Every command runs
inside `one_line_errors`. Any other exception is a bug: one line too, with exit code 70; the traceback appears with
ST_DRC_TRACEBACK=1 in the environment.
"""

import argparse
import errno
import fcntl
import io
import os
import re
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

TRACEBACK = "ST_DRC_TRACEBACK"  # environment variable
BUG, INTERRUPTED, CLOSED_PIPE = 70, 130, 141  # exit codes: EX_SOFTWARE of sysexits.h; a shell's for SIGINT and SIGPIPE
ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A cause that the user can mend. The message is one line: what, where, what to do."""


class Parser(argparse.ArgumentParser):
    """Errors in command line options are one line too, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def whole(least: int = 1, most: int = 10**6) -> Callable[[str], int]:
    """The type of an option: a whole number from `least` to `most`."""

    def number(text: str) -> int:
        if least <= (value := int(text)) <= most:
            return value
        raise argparse.ArgumentTypeError(f"{value} is not from {least:,} to {most:,}")

    return number


SEED = whole(0, 10**9)  # the type of --seed


@contextmanager
def blame(what: str, advice: str = "") -> Iterator[None]:
    """Turn any exception of a block that reads a foreign file into UserError "`what`: reason`advice`"."""
    try:
        yield
    except Exception as error:  # libraries raise every kind of exception on a damaged file
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or f"{error} ({type(error).__name__})"
        raise UserError(f"{what}: {' '.join(reason.split())}{advice}") from error


def out_of_memory(error: Exception) -> bool:
    """Python's sign of it or one of torch's two; torch's by name, so that --help need not import it."""
    torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return torchs or isinstance(error, MemoryError)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Run a command. Any exception becomes one line on stderr and an exit code: 2 for the user, 70 for a bug."""
    _usable_streams()
    try:
        yield
        sys.stdout.flush()  # a closed pipe shows here and not while Python exits
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            _exit_if_stdout_is_closed()
        code, message = explain(error)
        with suppress(OSError):  # a closed pipe or a full disk: only the exit code is left
            print("error: " + printable(message), file=sys.stderr)
        sys.exit(code)


def explain(error: Exception) -> tuple[int, str]:
    """The exit code of an exception, and its line without "error: " in front. A bug is raised again where the
    environment asks for the traceback."""
    if isinstance(error, OSError):
        return 2, (error.strerror or str(error)) + (f" ({error.filename})" if error.filename else "")
    if out_of_memory(error):
        kind = "GPU memory" if type(error).__name__ == "OutOfMemoryError" else "memory"
        return 2, f"out of {kind}: take a smaller size or fewer frames (training: --plan says what fits)"
    if isinstance(error, UserError):
        return 2, str(error)
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        raise error
    hint = f"this is a bug; {TRACEBACK}=1 in the environment shows the traceback"
    return BUG, f"{type(error).__name__}: {error} at {_place(error)}: {hint}"


def printable(message: str) -> str:
    """A message as one line that any terminal prints: no line break, no escape sequence, no half of a character."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    return line if len(line) <= 1500 else f"{line[:700]} ... {line[-700:]}"


def _place(error: Exception) -> str:
    """File and line of the innermost call in this project."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and "site-packages" not in f.filename]
    frame = (own or frames)[-1]
    return f"{os.path.relpath(frame.filename, ROOT) if own else frame.filename}:{frame.lineno}"


def _usable_streams() -> None:
    """Open standard streams that are closed: the next file would get their number, and with it a library's warnings."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if number else "r"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: a file name may not be UTF-8


def _exit_if_stdout_is_closed() -> None:
    try:
        print(flush=True)
    except BrokenPipeError:  # `| head` has read enough; Python would complain about the rest while it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CLOSED_PIPE)


# Errors of the operating system that concern an output and not the code that writes it.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT,
         errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}  # fmt: skip


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved onto it when the block ends well and removed when it does not.

    The temporary file is new (O_EXCL) and its name cannot be guessed, so no planted link is followed. It is locked
    while the block runs: a file without a lock is the leftover of a killed run, which the next run with the same output
    removes. The suffix stays last: writers of images and videos choose the format by it. UserError with the name of
    `path` for a full disk, a read-only folder and the like.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: name a file")
    try:
        remove_leftovers(path)
        temporary, file = _new_file(path)
        try:
            os.utime(temporary, ns=(0, 0))  # every write moves this date, so an untouched file is recognized below
            yield temporary
            if os.stat(temporary).st_mtime_ns == 0:
                raise FileNotFoundError(f"no byte of {path} was written")
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # moved, or the folder is gone
                temporary.unlink()
            os.close(file)
    except OSError as error:
        name = Path(str(error.filename or path)).name
        if error.errno not in _DISK or not (name == path.name or f".{path.stem}." in name):
            raise  # of another file, one that the block reads
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def write_text(path: str | Path, text: str) -> None:
    """`whole_file` of a text in UTF-8, and the folder that it lies in."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _new_file(path: Path) -> tuple[Path, int]:
    """A new empty file beside `path`, open and locked: its name and its descriptor."""
    while True:
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.part{path.suffix}")
        file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return temporary, file
        os.close(file)  # another process took it for a leftover in the moment before it was locked


def remove_leftovers(path: str | Path) -> None:
    """Remove the temporary files of killed runs of `whole_file(path)`, and none that a living process writes."""
    path = Path(path)
    name = re.compile(rf"\.{re.escape(path.stem)}\.\w+\.part{re.escape(path.suffix)}")
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with suppress(FileNotFoundError):  # no such folder yet
        for leftover in [path.with_name(entry) for entry in os.listdir(path.parent) if name.fullmatch(entry)]:
            # An error means: a link, a lock of a living process, another user's file, or a faster process.
            with suppress(OSError), open(os.open(leftover, flags), "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()

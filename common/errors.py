"""What went wrong, for the person who can mend it: one clear line, exit code 2, no traceback.

A function raises `UserError` when the cause lies outside the code (a file, an option, a machine). Its text says
what is wrong, where, and what to do. Every command wraps its `main` in `one_line_errors`; anything else that
escapes is a bug and keeps its traceback.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch


class UserError(Exception):
    """Something the user can mend. The message is one line: what, where, what to do."""


class Parser(argparse.ArgumentParser):
    """Command line options whose errors are one line too, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Run a command: a `UserError`, an error of the operating system or of memory becomes one line and exit code 2."""
    try:
        yield
    except UserError as error:
        sys.exit(_report(str(error)))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(_report(f"{error.strerror or error}{where}"))
    except MemoryError:
        sys.exit(_report("out of memory: take a smaller size or fewer frames"))
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        sys.exit(_report(f"out of GPU memory: {reason}; take a smaller size or fewer frames"))
    except RuntimeError as error:  # torch has no class of its own for a CPU that is out of memory
        if "DefaultCPUAllocator" not in str(error):
            raise
        sys.exit(_report("out of memory: take a smaller size or fewer frames"))
    except KeyboardInterrupt:
        sys.exit(130)


def _report(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved onto it when the block ends well and removed when it does not.

    So an output is there complete or not at all, whatever happens in between. The suffix stays last, because
    writers of images and videos choose the format by it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

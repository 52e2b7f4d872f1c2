"""Programs of the repository as processes: one for each core or GPU, or several tasks at a time."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import connection
from pathlib import Path

import torch
import torch.distributed as dist

from common.device import cores
from common.errors import UserError, one_line_errors

HERE = Path(__file__).parent.parent


def torchrun() -> list[str]:
    """The words before train.py: one process for each GPU, or without GPUs for each of 1, 2, 4 or 8 cores, numbers
    that divide batches of 32 and 256. Two processes on two cores are as fast as one; with parallel.compile, 1.2 times.
    """
    processes = torch.cuda.device_count() or 2 ** min(3, cores().bit_length() - 1)
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def run_command(command: list[str], begin: str = "") -> None:
    """Show and run a command, the words after `python`. The line of an error starts with `begin`."""
    print(f"$ python {' '.join(command)}", flush=True)
    paths = filter(None, [str(HERE), os.environ.get("PYTHONPATH")])  # for -m in any current folder
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if "torch.distributed.run" in command:
        environment["OMP_NUM_THREADS"] = "1"
    code = subprocess.run([sys.executable, *command], env=environment).returncode
    if code:
        raise UserError(f"{begin}the command above ended with code {code}: correct the cause and run this again")


def run_program(command: list[str], here: bool) -> None:
    """Run a program of the repository: here, in this process, or as one process for each device."""
    if not here:
        return run_command(command)
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise UserError(f"{' '.join(command)} ended with code {end.code}") from None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # train.py takes it for a wish to save


def end_with_parent() -> None:
    """End this process when its parent is gone: the workers of a killed run would write beside those of the next."""

    def watch() -> None:
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(task: Callable[[], None]) -> None:
    """A task in one of several processes."""
    torch.set_num_threads(1)
    try:
        with one_line_errors():
            task()
    finally:
        if dist.is_initialized():  # a training that failed: the next one begins a group of its own
            dist.destroy_process_group()


def do_all(tasks: list[Callable[[], None]], jobs: int, ends: float) -> int:
    """Do the tasks, in `jobs` processes if that is above 1, where a task that fails does not stop the others. What is
    unfinished at the time `ends` is given up. Returns how many failed."""
    for task in tasks if jobs == 1 else ():
        if time.monotonic() < ends:
            task()
    if jobs == 1 or not tasks or time.monotonic() > ends:
        return 0
    count, start = min(jobs, len(tasks)), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, start, end_with_parent) as pool:
        done, late = wait([pool.submit(work, task) for task in tasks], min(ends - time.monotonic(), 1e6))
        for process in multiprocessing.active_children() if late else ():
            process.kill()
    return sum(bool(future.exception()) for future in done)

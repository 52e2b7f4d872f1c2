"""Ways to recompute blocks: the same loss and gradients, alone and on two processes, and no graph a step.

`torchrun --nproc-per-node 2 tests/engine/test_parallel.py CHECKPOINT FACES` is the part on two processes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_objective import FPS, SLOTS, Faces, make_batch, randn, throw
from torch._dynamo.testing import CompileCounter

from checkpoint import Checkpoint
from config import Faces as FaceOptions
from config import read_config
from engine.parallel import build_model, join_processes, set_recompute
from face import ArcFace, recognition_file
from model import LTXVideo
from objective import Objective
from text import TextConnector
from vae import VideoVAE

WAYS = ("none", "products", 1, "all")


@pytest.mark.parametrize("how", WAYS[1:])
def test_no_new_graph_in_later_steps(how, small):
    """The counting backend runs what it is given as it is. A number has both kinds of blocks, so two graphs."""
    torch._dynamo.reset()
    model, plain, counter = LTXVideo.from_checkpoint(small), LTXVideo.from_checkpoint(small), CompileCounter()
    set_recompute(model, how)
    model.compile_blocks(counter)
    inputs = (randn(1, 20, 16), torch.full((1, 20), 0.5), torch.full((1,), 0.5), randn(1, 9, 128, seed=1))
    for step in range(3):
        for each in (model, plain):
            each.zero_grad()
            each(inputs[0] * (1 + step), *inputs[1:], torch.rand(1, 3, 20, 2)).square().mean().backward()
            torch.manual_seed(step)
        assert counter.frame_count == (2 if how == 1 else 1)


@pytest.mark.slow
def test_two_processes_with_the_identity_losses(small, root):
    """Each process has samples of its own; under DDP and FSDP2 every way gives the loss and gradients of "none"."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*launcher, __file__, small, root / "assets" / "faces"]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("largest difference")]
    assert len(lines) == 2 * 3 and all(float(line.split()[-1]) <= 1e-6 for line in lines), done.stdout


def compare(ckpt: str, faces: str) -> None:
    """Print, for each mode and way, the largest difference of loss and gradients from "none", relative to the largest
    gradient."""
    device = join_processes()
    objective = Objective(
        vae=VideoVAE.from_checkpoint(ckpt).requires_grad_(False),
        connector=TextConnector.from_checkpoint(ckpt).requires_grad_(False),
        null_features=randn(1, 128, seed=99),
        slots=SLOTS,
        fps=FPS,
        detector=Faces(),
        arcface=ArcFace.from_onnx(recognition_file(Path(faces))),
        faces=FaceOptions(lambda_id=1.0, lambda_tic=1.0),
    )
    rank = dist.get_rank()
    batch, draws = make_batch(2, seed=rank), [throw(0.3, rank), throw(0.5, 7 + rank, drop_ref=True)]
    for mode in ("ddp", "fsdp"):
        config, values = read_config(None, [f"parallel.mode={mode}", "parallel.precision=fp32"]), {}
        for how in WAYS:
            model = build_model(config, Checkpoint(ckpt), device, how)
            out = objective(model, batch, draws)
            assert (out["faces"] > 0).all() and (out["tic"] > 0).all()
            out["loss"].sum().backward()
            grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
            values[how] = [out["loss"].detach(), *grads]
        largest = max(value.abs().max() for value in values["none"][1:])
        for how in WAYS[1:]:
            off = max((a - b).abs().max() for a, b in zip(values[how], values["none"])) / largest
            dist.all_reduce(off, dist.ReduceOp.MAX)
            if rank == 0:
                print(f"largest difference, {mode}, {how}: {off:.2e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    compare(*sys.argv[1:])

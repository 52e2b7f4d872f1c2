"""The table of training steps: the time of more blocks than were measured, and that every part runs."""

import argparse
import sys
from copy import deepcopy

import pytest
import torch

import bench.train_step as bench
from checkpoint import Checkpoint


def test_the_time_of_all_blocks_follows_from_those_measured(small, monkeypatch, capsys):
    """8 blocks from 4, where a step takes one second and a tenth for each block; 3 useful forward passes."""
    ltx = deepcopy(Checkpoint(small).config)
    ltx["transformer"]["num_layers"] = 8
    options = argparse.Namespace(device=torch.device("cpu"), size=(32, 32, 5), text_tokens=4, repeat=1)
    step = bench.Step(ltx, 4, options, torch.float32)
    blocks = list(step.model.transformer_blocks)
    seen = []

    def clock(run, device, repeat, warm):
        seen.append(list(step.model.transformer_blocks))
        return 1 + 0.1 * len(seen[-1]), None

    monkeypatch.setattr(bench, "measure", clock)
    bench.speed(step, "fp32", ["none"], step.flops(8), options)
    assert seen == [[blocks[0], blocks[3]], blocks]  # the ends, which fp8 leaves alone, are in both
    cells = [cell.strip() for cell in capsys.readouterr().out.split("|")]
    share = step.flops(4) / step.flops(8) / 1.4
    assert cells[2] == "1,400" and cells[4] == f"{share:.0%}" and cells[5:7] == ["1,800", f"{1 / 1.8:.0%}"]
    assert list(step.model.transformer_blocks) == blocks


@pytest.mark.slow
def test_every_part_runs(small, monkeypatch, capsys):
    pytest.importorskip("torchao")
    words = ["--ckpt", str(small), "--size", "32x32x5", "--text-tokens", "4", "--repeat", "1", "--plain"]
    monkeypatch.setattr(sys, "argv", ["train_step", *words, "--device", "cpu"])
    bench.main()
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert {"bf16, all", "bf16, products", "bf16, none", "fp8, products", "fp8, none"} <= set(rows)
    assert {"forward", "backward", "clipping", "optimizer", "attn1.to_q", "ff.net.2"} <= set(rows)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--device", "bogus"], "device 'bogus' cannot be used here"),
        (["--device", "cpu", "--repeat", "0"], "--repeat: 0 is not from 1"),
        (["--device", "cpu", "--layers", "3"], "--layers: 3 is not from 4"),
    ],
)
def test_wrong_options_are_one_line(words, reason, in_process):
    code, _, error = in_process(bench.main, "train_step", *words)
    assert code == 2 and reason in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_gradients_alone(small, in_process):
    """Every gradient is off in bf16, and more in 8 bits, those of gates too: their inputs come from 8-bit layers."""
    pytest.importorskip("torchao")
    words = ["--ckpt", small, "--size", "64x64x17", "--text-tokens", 16, "--gradients", "--device", "cpu"]
    code, out, error = in_process(bench.main, "train_step", *words)
    assert code == 0, error
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 12
    for name, bf16, fp8 in rows:
        assert 0 < float(bf16.rstrip("%")) < 5 and float(bf16.rstrip("%")) < float(fp8.rstrip("%")) < 40, name

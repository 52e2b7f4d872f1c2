"""`python -m bench` on the tiny model: the table it writes, and the operations it states against PyTorch's counter."""

import argparse
import sys
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import measure as bench
from checkpoint import Checkpoint

SIZE = (64, 64, 9)


@pytest.fixture
def command(in_process):
    return partial(in_process, bench.main, "bench")


def test_stated_operations_are_the_counted_ones(small, monkeypatch):
    """Every row but the optimizer's; blocks that run again in the backward pass do no useful work."""
    monkeypatch.setattr(bench, "set_recompute", lambda model, on: None)
    ltx = Checkpoint(small).config
    options = {"fp8": False, "offload": False, "compile": False, "steps": 2, "text_tokens": 64}
    options |= {"device": torch.device("cpu"), "dtype": torch.float32}
    seen = []
    with sdpa_kernel(SDPBackend.MATH):
        for row in bench.rows(ltx, SIZE, argparse.Namespace(**options)):
            with FlopCounterMode(display=False) as counter:
                row.run()
            assert counter.get_total_flops() == pytest.approx(row.flops, rel=0.04), row.name
            seen.append(row.name)
    assert len(seen) == len(set(seen)) == 9


@pytest.mark.parametrize("more, count", [((), 9), (("--fp8", "--offload"), 7)])  # frozen weights are not trained
def test_the_table(more, count, command, small, tmp_path):
    out = tmp_path / "new" / "cpu.md"
    words = ["--ckpt", small, "--size", "32x32x5", "--device", "cpu"]
    words += ["--text-tokens", 16, "--repeat", 1, "--steps", 2, "--out", out]
    code, stdout, stderr = command(*words, *more)
    assert code == 0, stderr
    text = out.read_text()
    assert (", fp8 offload;" if more else ", plain;") in text
    assert f"wrote {out}" in stdout and "have not been measured" in text and torch.__version__ in text
    tables = text.split("\n## ")[1:]
    assert [part.split("\n")[0] for part in tables] == ["32x32, 5 frames"]
    for part in tables:
        body = [line.split("|")[1:-1] for line in part.splitlines() if line.startswith("|")][2:]
        assert len(body) == count
        for name, ms, tflop, rate, share, floor, peak in body:
            ms, tflop, rate, floor = (float(cell.replace(",", "")) for cell in (ms, tflop, rate, floor))
            assert ms > 0 and tflop >= 0 and rate >= 0 and floor >= 0 and share.strip().endswith("%")
            assert name.strip() and not peak.strip()  # nobody counts a CPU's memory


def test_one_row_in_8_bits_and_in_bf16(command, small, tmp_path):
    words = ["--ckpt", small, "--size", "32x32x5", "--text-tokens", 16, "--repeat", 1, "--out", tmp_path / "x.md"]
    more = ["--device", "cpu", "--dtype", "bfloat16", "--fp8", "--against", "bf16", "--only", "guided step,"]
    code, stdout, stderr = command(*words, *more)
    assert code == 0, stderr
    lines = (tmp_path / "x.md").read_text().splitlines()
    cells = [line.split("|") for line in lines if "guided step, three streams |" in line]
    assert [row[1].strip().split(":")[0] for row in cells] == ["guided step, three streams", "bf16"]
    in_fp8, in_bf16 = (float(row[2].replace(",", "")) for row in cells)
    ratio = in_bf16 / in_fp8
    (last,) = [line for line in lines if "times as fast" in line]
    assert float(last.split("--fp8 ")[1].split()[0]) == pytest.approx(ratio, abs=0.02 + 0.1 * ratio) and last in stdout
    assert len([line for line in lines if line.startswith("| ")]) == 3  # and the head
    code, _, stderr = command(*words, "--device", "cpu", "--against", "bf16")
    assert code == 2 and stderr == "error: --against bf16 needs --fp8\n"


@pytest.mark.parametrize("size", ["480x832", "0x32x1", "36x32x5", "32x32x6", "big", "32x9999999968x1"])
def test_a_size_that_does_not_fit_is_one_line(size, command, small, tmp_path):
    out = tmp_path / "x.md"
    code, _, stderr = command("--ckpt", small, "--size", size, "--out", out)
    assert code == 2 and stderr.startswith(f"error: --size {size}: write HEIGHTxWIDTHxFRAMES") and not out.exists()


def test_a_folder_as_the_page_is_said_before_anything_is_measured(command, small, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ceilings", lambda *_: pytest.fail("measured"))
    code, _, stderr = command("--ckpt", small, "--size", "32x32x1", "--device", "cpu", "--out", tmp_path)
    assert code == 2 and stderr == f"error: {tmp_path} is a folder: name a file\n"


def test_against_diffusers_without_diffusers_is_one_line(command, small, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    ckpt, out = small, tmp_path / "x.md"
    code, _, stderr = command(
        "--ckpt", ckpt, "--against", "diffusers", "--device", "cpu", "--size", "32x32x1", "--out", out
    )
    assert code == 2 and stderr == "error: --against diffusers needs diffusers: pip install diffusers\n"


def test_what_does_not_fit_says_so(monkeypatch):
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = [bench.Row("large", 2e12, 10, too_large), bench.Row("small", 2e12, 10, lambda: None)]
    monkeypatch.setattr(bench, "rows", lambda *_: iter(rows))
    options = argparse.Namespace(device=torch.device("cpu"), repeat=1, against=None, only="")
    lines = bench.table({}, (1, 1, 1), options, (1e12, 1e12))
    assert lines[-2] == "| large | out of memory | 2.00 | | | 2,000.0 | |" and lines[-1].startswith("| small | ")


@pytest.mark.parametrize("more, folder", [((), "out/bench"), (("--publish",), "repository/bench")])
def test_only_publish_touches_the_repository(more, folder, command, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(bench, "rows", lambda *_: iter(()))
    monkeypatch.setattr(bench, "ceilings", lambda *_: (1e12, 1e12))
    monkeypatch.setattr(bench, "device_name", lambda _: ("NVIDIA H200", "1.0"))
    code, _, stderr = command("--ckpt", small, "--size", "32x32x1", "--device", "cpu", "--fp8", *more)
    assert code == 0, stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / folder / "nvidia-h200-fp8.md"]


@pytest.mark.parametrize("option", ["--steps", "--repeat", "--text-tokens"])
def test_numbers_out_of_range_are_one_line(option, command, small, tmp_path):
    for value in (0, -1, 10**9):
        code, _, stderr = command("--ckpt", small, option, value, "--device", "cpu", "--out", tmp_path / "x.md")
        assert code == 2 and stderr.startswith(f"error: argument {option}: {value} is not from"), stderr


def test_the_page_never_replaces_the_checkpoint(command, small):
    before = small.read_bytes()
    code, _, stderr = command("--ckpt", small, "--size", "32x32x1", "--device", "cpu", "--out", small)
    assert code == 2 and "would replace" in stderr and small.read_bytes() == before

"""The figures of the log against means by hand."""

import json
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from config import Config
from engine import logbook


def test_identity_figures_are_means_over_the_samples_that_have_something_to_compare(tmp_path, monkeypatch):
    """A dropped reference, a frame without a face and a damaged sample leave zeros, which must not lower the mean."""
    monkeypatch.setattr(logbook.dist, "get_world_size", lambda: 1)
    plan = SimpleNamespace(grid=(1, 2, 3), tokens=6, reference_tokens=2, flops_per_sample=lambda: 1e12)
    plan.buckets = [(plan, 1.0)]
    rows = [  # id, tic, reference, faces, skipped
        (0.6, 0.2, 1, 5, 0),
        (0.2, 0.4, 1, 3, 0),
        (0.0, 0.3, 0, 5, 0),  # a dropped reference
        (0.0, 0.0, 1, 0, 0),  # no face
        (0.9, 0.9, 1, 5, 1),  # damaged
    ]
    columns = {key: torch.ones(len(rows)) for key in logbook.Log.COLUMNS}
    columns |= dict(zip(("id", "tic", "reference", "faces", "skipped"), torch.tensor(rows).T))
    columns["frames"] = torch.full((len(rows),), 5.0)
    table = torch.stack([columns[key] for key in logbook.Log.COLUMNS], dim=1)
    log = logbook.Log(Config(), plan, tmp_path, 0, enabled=False)
    figures = log.figures(1, table, norm=1.0, lr=1e-4, seconds=2.0)
    assert figures["id"] == pytest.approx((0.6 + 0.2) / 2)
    assert figures["tic"] == pytest.approx((0.2 + 0.4 + 0.3) / 3)
    assert figures["face_rate"] == pytest.approx((5 + 3 + 5) / 20)


def test_lines_of_steps_that_come_again_are_left_out(tmp_path):
    """A run that was killed before its first checkpoint begins anew, with the losses before its first step."""
    for first, kept in ((0, []), (2, [0, 1, 2])):
        path = tmp_path / f"{first}.jsonl"
        path.write_text("".join(f'{{"step": {step}}}\n' for step in range(5)) + '{"st')
        log = logbook.Log.__new__(logbook.Log)
        log.first, log.sinks = first, ExitStack()
        with log.sinks:
            log.open(path)
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == kept

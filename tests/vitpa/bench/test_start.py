"""`vitpa bench start`: three real trainings, the second and third of which compile nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitpa.cli import main as vitpa
from vitpa.seconds import PARTS


@pytest.mark.slow
def test_a_warm_start_and_a_requeued_one_compile_nothing(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By Inductor's own counters. The step is as small as it can be: a cold one takes the C++ compiler a while."""
    small = ["model.embed_dim=16", "model.depth=1", "model.num_heads=2", "optim.label_smoothing=0.0"]
    where = [f"runtime.data_dir={digits}", "runtime.device=cpu", "runtime.step=compile"]
    assert vitpa(["bench", "start", "digits", *small, *where, "--json", str(tmp_path / "start.json")]) == 0
    document = json.loads((tmp_path / "start.json").read_text())
    cold, warm, requeue = document["starts"].values()
    assert cold["graphs_compiled"] > 0
    assert cold["graphs_reused"] == 0
    for each in (warm, requeue):
        assert (each["graphs_compiled"], each["graphs_reused"]) == (0, cold["graphs_compiled"])
    for each in (cold, warm, requeue):
        assert each["first_step_s"] == pytest.approx(sum(each[f"{part}_s"] for part in PARTS), abs=0.05)
        assert all(each[f"{part}_s"] > 0 for part in ("imports", "data", "set_up", "restore", "compilation", "steps"))
    assert document["versions"]["torch"]
    rows = [line.split(" | ") for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| start", "| ---", "| cold", "| warm", "| requeue"]


def test_why_a_training_does_not_start_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert vitpa(["bench", "start", "digits", f"runtime.data_dir={tmp_path}", "runtime.device=cpu"]) == 1
    assert f"vitpa bench: the training has ended before its first step: vitpa train: {tmp_path}" in capfd.readouterr().err

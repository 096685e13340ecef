"""A sweep of three axes on a real SLURM: planned, submitted, cancelled and retried by filters, collected as a pivot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.sweep import Run
from tests.support.cluster import FaultyCluster
from tests.support.slurm_sweeps import MODEL, Cell, make_cell
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

AXES = {
    "optim.lr": [1e-3, 2e-3],
    "model.depth": [1, 2],
    "mixing": {"none": {}, "both": {"augment.mixup_alpha": 0.8, "augment.cutmix_alpha": 1.0}},
}
RECIPE = {"dataset": "digits", "model": MODEL, "train": {"epochs": 4}, "optim": {"warmup_epochs": 0}}
RETRIED = ("mixing=both", "model.depth=2")


@pytest.fixture
def cell(tmp_path: Path, cluster: FaultyCluster) -> Cell:
    grid = {"axes": AXES, "exclude": [{"optim.lr": 2e-3, "model.depth": 1, "mixing": "none"}]}
    return make_cell(tmp_path / "axes", cluster, {"digits": RECIPE}, seeds=2, attentions=["content"], stand_in=True, grid=grid)


def hundredths(run: Run) -> int:
    """Its accuracy."""
    lr, depth, mixing = run.settings.values()
    return 50 + 10 * (lr == "0.002") + 4 * (depth == "2") + 2 * (mixing == "both") + run.seed


def test_three_axes(cell: Cell) -> None:
    runs = cell.sweep.runs
    assert len(runs) == 7 * 2
    for folder in ("top1", "hold"):
        (cell.root / folder).mkdir()
    for run in runs:
        (cell.root / "top1" / run.signature).write_text(str(hundredths(run) / 100))
    assert "submit would start 14 runs" in cell.vitpa("plan", "--data-dir", str(cell.root / "data")).stdout
    cell.submit()
    done = cell.vitpa("cancel", "mixing=both")
    assert done.returncode == 0, done.stderr
    mixed = {run.signature for run in runs if run.settings["mixing"] == "both"}
    wait_for(lambda: {state.run.signature for state in cell.states() if state.state == "cancelled"} == mixed)
    (cell.root / "hold").rmdir()
    settled = cell.settle([run for run in runs if run.signature not in mixed])
    assert [state.reason for state in settled if state.state != "done"] == []
    assert "submitted 4 of 14 runs" in cell.vitpa("retry", *RETRIED).stdout
    states = {state.run.label: state.state for state in cell.settle()}
    left = {f"digits-content-lr{rate}-depth1-both-s{seed}" for rate in ("0.001", "0.002") for seed in (0, 1)}
    assert {label for label, state in states.items() if state == "cancelled"} == left
    assert set(states.values()) == {"done", "cancelled"}

    done = cell.vitpa("collect", "--pivot", "optim.lr", "mixing", "--compare", "depth")
    assert done.returncode == 4, done.stderr
    tables = re.sub(" +", " ", done.stdout)
    # means of seeds 0 and 1, which are a point apart: + 0.5, std 0.71
    assert "| digits attention=content depth=1: lr | mixing=none | mixing=both |" in tables
    assert "| 0.001 | 50.50 ± 0.71 | - (0/2 incomplete) |" in tables
    assert "| 0.002 | - | - (0/2 incomplete) |" in tables
    assert "| digits attention=content depth=2: lr | mixing=none | mixing=both |" in tables
    assert "| 0.001 | 54.50 ± 0.71 | 56.50 ± 0.71 |" in tables
    assert "| 0.002 | 64.50 ± 0.71 | 66.50 ± 0.71 |" in tables
    assert "| digits | content | 0.001 | none | 2 - 1 | +4.00 ± 0.00 |" in tables
    assert "Best of digits: content lr=0.002 depth=2 mixing=both, 66.50 %" in tables

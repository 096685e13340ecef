"""A search on a real SLURM: rounds as job arrays, whose trials pause, go on and are replaced by new ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.sweep import load_sweep
from tests.support.cluster import FaultyCluster
from tests.support.search_sweeps import SPACE, ledger_of
from tests.support.slurm_sweeps import MODEL, make_cell
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

RECIPE = {"dataset": "digits", "model": MODEL, "train": {"epochs": 4}, "optim": {"warmup_epochs": 0}}
SEARCH = {"space": SPACE, "halving": {"epochs": [1]}, "budget": {"runs": 3}, "trials_at_once": 4}


def test_rounds_are_arrays(tmp_path: Path, cluster: FaultyCluster) -> None:
    grid = {"search": SEARCH, "overrides": {"train.holdout": 0.1}}
    cell = make_cell(tmp_path / "search", cluster, {"digits": RECIPE}, attentions=["content"], stand_in=True, grid=grid)
    (cell.root / "score-by-name").touch()
    cell.submit()
    (array,) = {cell.job(run).partition("_")[0] for run in cell.sweep.runs}
    settled = cell.settle()
    assert [(state.state, state.reason) for state in settled] == [("paused", "after epoch 1")] * 4
    states = ("squeue", "--noheader", "--array", "--states=all", f"--jobs={array}", "--format=%T")
    wait_for(lambda: not {"RUNNING", "COMPLETING"} & set(cell.slurm(*states).split()), poll_s=0.2)
    assert cell.slurm(*states).split() == ["COMPLETED"] * 4, "to pause is no failure"
    done = cell.vitpa("submit", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "search: over after round" in done.stdout
    assert "best so far: t0" in done.stdout
    cell.sweep = load_sweep(str(cell.root / "life.yaml"), cell.root)
    assert cell.sweep.ledger is not None
    assert cell.sweep.ledger.over
    first, second, *_ = ledger_of(cell.root, "life")
    (best,) = (entry["number"] for entry in second["trials"] if "values" not in entry)
    scores = {number: values[0] for number, values in second["scores"].items()}
    assert scores[str(best)] == max(scores.values())
    assert len(first["trials"]) == 4
    finished = [state for state in cell.states() if state.state == "done"]
    assert finished
    assert all(cell.ends(state.run) == ["paused: after epoch 1", "done"] for state in finished)
    assert {state.state for state in cell.states()} == {"done", "paused"}

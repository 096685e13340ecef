"""Rounds of a search as `submit` decides them, where nothing has to be started: the results are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jobs.sweep import Sweep, with_ledger
from tests.support.jobs_sweeps import write_result
from tests.support.search_sweeps import ledger_of, make_search
from vitpa.cli import main


def submit(root: Path, *terms: str) -> int:
    """`submit` of the search below `root`."""
    profile = root / "profile.yaml"
    profile.write_text(yaml.safe_dump({"slots": 1, "runtime": {"device": "cpu", "data_dir": f"{root}/data"}}))
    return main(["sweep", "submit", str(root / "small.yaml"), "--root", str(root), "--profile", str(profile), *terms])


def with_results(root: Path, sweep: Sweep) -> Sweep:
    """The search to its end, each of whose runs has the results that its trial's number says."""
    assert sweep.search is not None and sweep.ledger is not None
    while not sweep.ledger.over:
        new = {trial.number: 0.5 + 0.01 * trial.number for trial in sweep.ledger.trials if trial.in_training}
        for run in sweep.runs:
            if (score := new.get(int(run.settings["trial"][1:]))) is not None:
                write_result(root, run, val_top1=score, holdout=0.1)
        scores = {number: [score] * sweep.search.runs_per_trial for number, score in new.items()}
        following = sweep.search.next_round(sweep.ledger, scores, {}, 1.0)
        sweep = with_ledger(sweep, replace(sweep.ledger, rounds=[*sweep.ledger.rounds, following]))
    return sweep


def test_a_search_whose_runs_have_all_been_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = with_results(tmp_path, make_search(tmp_path, budget={"runs": 3}, trials_at_once=2))
    assert submit(tmp_path, "--dry-run") == 0
    assert not ledger_of(tmp_path)
    assert submit(tmp_path) == 0
    assert [len(each["trials"]) for each in ledger_of(tmp_path)] == [2, 1, 0]
    capsys.readouterr()
    for verb in ("status", "collect"):
        assert main(["sweep", verb, "small", "--root", str(tmp_path)]) == 0
        assert all(run.settings["trial"] in capsys.readouterr().out for run in whole.runs[-1:])
    assert submit(tmp_path) == 0
    assert "over after round 2; 3 trials: 3 finished" in capsys.readouterr().out

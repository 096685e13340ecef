"""Rounds of a search as `submit` decides them, where nothing has to be started: the results are there."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.rounds import begin
from jobs.sweep import Sweep, SweepDir, load_sweep, with_ledger
from tests.support.jobs_sweeps import write_result
from tests.support.search_sweeps import ledger_of, make_search
from vitpa.cli import main
from vitpa.config_file import load_config


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
                write_result(root, run, val_top1=score, holdout=run.config.train.holdout)
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


def test_a_table_has_all_seeds_of_a_trial_that_is_trained_to_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a trial with one of three results it showed 1/1, complete. Trials that were paused or have no result are left out."""
    sweep = make_search(tmp_path, seeds=3, budget={"runs": 9}, trials_at_once=3, halving={"epochs": [3], "keep": 0.7})
    assert sweep.search is not None and sweep.ledger is not None
    begin(sweep)
    following = sweep.search.next_round(sweep.ledger, {0: [0.8] * 3, 1: [0.9] * 3, 2: [0.1] * 3}, {}, 1.0)
    assert [entry.number for entry in following.trials if entry.epochs == 9] == [1, 0]
    sweep = with_ledger(sweep, sweep.ledger.append(following))
    SweepDir(tmp_path, sweep.name).record(sweep)
    words = ["sweep", "collect", "small", "--root", str(tmp_path)]

    def table(*finished: tuple[str, int]) -> tuple[int, list[tuple[str, str]]]:
        for run in sweep.runs:
            if (run.settings["trial"], run.seed) in finished:
                write_result(tmp_path, run, val_top1=0.9, holdout=0.1)
        code = main(words)
        return code, re.findall(r"\| (t00\d) .*?\| (\d/\d) ", capsys.readouterr().out)

    assert table(("t000", 1)) == (4, [("t000", "1/3")])
    assert table(("t000", 0), ("t000", 2), ("t002", 0)) == (0, [("t000", "3/3")]), "t002 stays paused"
    assert table(("t001", 0), ("t001", 1)) == (4, [("t000", "3/3"), ("t001", "2/3")])
    assert table(("t001", 2)) == (0, [("t000", "3/3"), ("t001", "3/3")])


@pytest.mark.parametrize("overrides", [{}, {"train.holdout": 0.2}])
def test_what_is_chosen_is_trained_on_all_of_train_whatever_the_recipe_says(
    tmp_path: Path, overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make_search(tmp_path, budget={"runs": 2})
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["train"]["holdout"] = 0.1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    document = yaml.safe_load((tmp_path / "small.yaml").read_text())
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(document | {"overrides": overrides}))
    with_results(tmp_path, load_sweep(str(tmp_path / "small.yaml"), tmp_path))
    assert submit(tmp_path) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  vitpa train"))
    _, _, path, *words = shlex.split(line)
    assert load_config(Path(path), words[: words.index("--seeds")]).train.holdout == 0

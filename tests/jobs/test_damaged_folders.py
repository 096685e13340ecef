"""Folders of runs that cannot be read: the run is broken, with the path; the others are as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.state import StateReader
from tests.support.jobs_sweeps import make_sweep, write_result
from vitpa.records import RunError
from vitpa.rundir import RunDir


@pytest.mark.parametrize("damage", ["loop", "dangling", "file"])
def test_one_damaged_run_concerns_no_other(tmp_path: Path, damage: str) -> None:
    runs = make_sweep(tmp_path, seeds=2).runs
    attempts = runs[0].directory(tmp_path).attempts_dir
    attempts.parent.mkdir(parents=True)
    if damage == "file":
        attempts.write_text("")
    else:
        attempts.symlink_to(attempts if damage == "loop" else tmp_path / "gone")
    write_result(tmp_path, runs[1])
    first, second, *_ = StateReader(tmp_path).states(runs[:2])
    assert (first.state, second.state) == ("broken", "done")
    assert first.reason.startswith(f"{attempts}: cannot be read (")
    with pytest.raises(RunError):
        runs[0].directory(tmp_path).attempts()


def test_the_ten_thousandth_attempt_comes_after_the_one_before(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "0" * 16)
    for number in (9999, 10000):
        assert run.claim_attempt(number, {}) is not None
    assert [attempt.number for attempt in run.attempts()] == [9999, 10000]

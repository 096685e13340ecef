"""The state of a run from its records, one test for each state."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.grid import Run
from jobs.state import RunState, Survey, withdraw
from jobs.status import progress_of, row_of
from tests.jobs_sweeps import make_sweep, write_result
from vitpa.config import AttemptDir, ProcessId, write_json

ALIVE = ProcessId.mine()
DEAD = ALIVE.model_copy(update={"start_ticks": ALIVE.start_ticks + 1})  # same pid, another process
ELSEWHERE = ALIVE.model_copy(update={"host": "elsewhere"})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_sweep(tmp_path, seeds=1).runs[0]


def look(root: Path, run: Run) -> RunState:
    return Survey(root).state(run)


def claim(root: Path, run: Run, number: int, claimer: ProcessId, submission: str = "sweeps/small/submissions/s") -> AttemptDir:
    attempt = run.directory(root).claim_attempt(number, {"process": claimer.model_dump(), "submission": submission})
    assert attempt is not None
    return attempt


def receipt(root: Path, *processes: ProcessId) -> None:
    path = root / "sweeps/small/submissions/s/receipt.json"
    path.parent.mkdir(parents=True)
    write_json(path, {"jobs": [{"id": "1", "process": process.model_dump()} for process in processes]})


def start(attempt: AttemptDir, process: ProcessId) -> None:
    write_json(attempt.start_json, {"process": process.model_dump()})


def test_missing(tmp_path: Path, run: Run) -> None:
    assert look(tmp_path, run).state == "missing"
    assert look(tmp_path, run).attempts == 0


def test_done(tmp_path: Path, run: Run) -> None:
    write_result(tmp_path, run, val_top1=0.75)
    state = look(tmp_path, run)
    assert state.state == "done"
    assert state.result is not None
    assert state.result.val_top1 == 0.75


@pytest.mark.parametrize("claimer", [ALIVE, ELSEWHERE])
def test_pending_while_the_launcher_lives(tmp_path: Path, run: Run, claimer: ProcessId) -> None:
    claim(tmp_path, run, 1, claimer)
    state = look(tmp_path, run)
    assert (state.state, state.unseen) == ("pending", claimer is ELSEWHERE)


def test_pending_while_a_job_of_its_submission_lives(tmp_path: Path, run: Run) -> None:
    claim(tmp_path, run, 1, DEAD)
    receipt(tmp_path, DEAD, ALIVE)
    assert look(tmp_path, run).state == "pending"


def test_uncertain_without_receipt(tmp_path: Path, run: Run) -> None:
    claim(tmp_path, run, 1, DEAD)
    assert look(tmp_path, run).state == "uncertain"


def test_uncertain_with_all_jobs_dead(tmp_path: Path, run: Run) -> None:
    claim(tmp_path, run, 1, ALIVE)  # a launcher that waits does not start anything any more
    receipt(tmp_path, DEAD, DEAD)
    assert look(tmp_path, run).state == "uncertain"


@pytest.mark.parametrize("worker", [ALIVE, ELSEWHERE])
def test_running(tmp_path: Path, run: Run, worker: ProcessId) -> None:
    start(claim(tmp_path, run, 1, DEAD), worker)
    state = look(tmp_path, run)
    assert (state.state, state.unseen) == ("running", worker is ELSEWHERE)
    assert ("on elsewhere, which cannot be seen" in state.reason) == (worker is ELSEWHERE)


def test_lost(tmp_path: Path, run: Run) -> None:
    start(claim(tmp_path, run, 1, ALIVE), DEAD)
    state = look(tmp_path, run)
    assert (state.state, state.attempts) == ("lost", 1)
    assert f"process {DEAD.pid}" in state.reason


@pytest.mark.parametrize("ending", ["failed", "interrupted", "cancelled"])
def test_last_attempt_decides(tmp_path: Path, run: Run, ending: str) -> None:
    first = claim(tmp_path, run, 1, DEAD)
    start(first, DEAD)
    write_json(first.exit_json, {"state": "failed", "reason": "earlier"})
    second = claim(tmp_path, run, 2, DEAD)
    start(second, DEAD)
    write_json(second.exit_json, {"state": ending, "reason": "why"})
    state = look(tmp_path, run)
    assert (state.state, state.reason, state.attempts) == (ending, "why", 2)


def test_result_removed_by_the_user(tmp_path: Path, run: Run) -> None:
    attempt = claim(tmp_path, run, 1, DEAD)
    start(attempt, DEAD)
    write_json(attempt.exit_json, {"state": "done", "reason": ""})
    state = look(tmp_path, run)
    assert (state.state, state.reason) == ("missing", "its result.json was removed")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"val_top1": float("nan")}, "val_top1"),
        ({"val_top1": 91.2}, "val_top1"),
        ({"signature": "0123456789abcdef"}, "belongs to run 0123456789abcdef"),
        ({"seed": "0"}, "seed"),
    ],
)
def test_broken_result(tmp_path: Path, run: Run, values: dict[str, object], reason: str) -> None:
    write_result(tmp_path, run, **values)
    state = look(tmp_path, run)
    assert state.state == "broken"
    assert reason in state.reason
    assert state.result is None


def test_truncated_result_is_broken_unless_being_made_again(tmp_path: Path, run: Run) -> None:
    write_result(tmp_path, run)
    path = run.directory(tmp_path).result_json
    path.write_text(path.read_text()[:100])
    assert look(tmp_path, run).state == "broken"
    claim(tmp_path, run, 1, ALIVE)
    assert look(tmp_path, run).state == "pending"


def test_broken_record(tmp_path: Path, run: Run) -> None:
    attempt = claim(tmp_path, run, 1, DEAD)
    attempt.start_json.write_text("{")
    state = look(tmp_path, run)
    assert state.state == "broken"
    assert str(attempt.start_json) in state.reason


def test_withdrawing_and_starting_exclude_each_other(tmp_path: Path, run: Run) -> None:
    attempt = claim(tmp_path, run, 1, DEAD)
    assert withdraw(attempt, "cancelled", "cancelled before it started")
    assert not withdraw(attempt, "interrupted", "again")
    assert look(tmp_path, run).state == "cancelled"
    attempt.exit_json.unlink()  # as if killed between the two records
    assert look(tmp_path, run).state == "cancelled"
    started = claim(tmp_path, run, 2, DEAD)
    start(started, ALIVE)
    assert not withdraw(started, "cancelled", "too late")
    assert look(tmp_path, run).state == "running"


def test_progress_ignores_half_written_lines(tmp_path: Path, run: Run) -> None:
    start(claim(tmp_path, run, 1, ALIVE), ALIVE)
    directory = run.directory(tmp_path)
    write_json(directory.env_json, {"steps_total": 10})
    rows = '{"step": 4, "epoch": 2.0, "val/top1": 0.5}\n{"step": 5, "epoch": 2.5, "perf/images_per_s": 64.0}\n{"step": 6, "ep'
    directory.metrics_jsonl.write_text(rows)
    progress = progress_of(look(tmp_path, run), tmp_path)
    assert (progress.step, progress.steps_total, progress.epoch, progress.val_top1) == (5, 10, 2.5, 0.5)
    assert row_of(look(tmp_path, run), tmp_path)["eta_s"] == 10.0  # 5 steps of 128 images at 64 images/s


def test_a_pid_used_again_is_not_the_same_process() -> None:
    assert ALIVE.pid == os.getpid()
    assert ALIVE.alive() is True
    assert DEAD.alive() is False

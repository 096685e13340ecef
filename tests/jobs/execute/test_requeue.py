"""Whether SLURM goes on with a run: every rule, and which of two decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.execute.requeue import End, History, first_step, last_step, why_nothing_to_do
from jobs.records import Execution, Exit, Start
from vitpa.attempt import Left
from vitpa.checkpoint_file import write_archive
from vitpa.records import ProcessId, with_checksum, write_json
from vitpa.rundir import RunDir

SOMEBODY = ProcessId(host="node1", boot_id="b", pid=7, start_ticks=1)
OURS = Start(process=SOMEBODY, job=Execution(id="7_0"))
WITHDRAWN = Start(process=SOMEBODY, withdrawn="cancelled")
TIME_LIMIT = End("interrupted", "time limit", False, False, False, False, first_step=10, last_step=20, given_up="")
CRASH = replace(TIME_LIMIT, state="failed", reason="CUDA error")
NO_ROOM = replace(TIME_LIMIT, reason="failed its pre-flight: disk: too little", disk_full=True, last_step=10)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (TIME_LIMIT, ""),
        (CRASH, ""),
        (replace(TIME_LIMIT, reason="signal SIGUSR1"), ""),
        (replace(TIME_LIMIT, last_step=10), "no new checkpoint in this attempt"),
        (replace(CRASH, last_step=10), "no new checkpoint in this attempt"),
        (replace(CRASH, last_step=9), "no new checkpoint in this attempt"),  # passed over: it was damaged
        (replace(TIME_LIMIT, given_up="given up"), "given up"),
        (replace(TIME_LIMIT, reason="the file stop"), "a stop was requested"),
        (replace(CRASH, told_to_end=True), "SLURM requeues after preemption, nobody after a cancellation"),
        (replace(CRASH, followed=True), "another execution has the run"),
        (replace(CRASH, bad_node=True, last_step=10), ""),  # another node may do
        (replace(CRASH, bad_node=True, given_up="given up"), "given up"),
        (replace(CRASH, bad_node=True, told_to_end=True), "SLURM requeues after preemption, nobody after a cancellation"),
        (replace(CRASH, disk_full=True, last_step=10), ""),  # it may have room again
        (replace(CRASH, disk_full=True, given_up="given up"), "given up"),
        (replace(TIME_LIMIT, disk_full=True, last_step=10), "no new checkpoint in this attempt"),
        (NO_ROOM, ""),
        (replace(NO_ROOM, given_up="given up"), "given up"),
        (replace(NO_ROOM, told_to_end=True), "SLURM requeues after preemption, nobody after a cancellation"),
        (replace(NO_ROOM, reason="the file stop"), "a stop was requested"),
    ],
)
def test_why_not_requeued(end: End, reason: str) -> None:
    assert end.why_not_requeued == reason


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ((False, OURS, None, None), ""),
        ((False, OURS, Exit(state="interrupted", requeued=True), None), ""),
        ((False, OURS, Exit(state="failed", requeued=True), None), ""),
        ((True, OURS, None, None), "the run is finished"),
        ((False, OURS, Exit(state="cancelled"), None), "it was cancelled"),
        ((False, OURS, Exit(state="done"), None), "it was done"),
        ((False, OURS, Exit(state="interrupted", left=True), None), "it was interrupted"),
        ((False, WITHDRAWN, Exit(state="cancelled"), None), "it was cancelled"),
        ((False, WITHDRAWN, None, None), "it was withdrawn"),
        ((False, Start(process=SOMEBODY, job=Execution(id="8_0")), None, None), "it belongs to job 8_0"),
        ((False, Start(process=SOMEBODY), None, None), "it belongs to job None"),
        ((False, OURS, None, Left(state="failed", reason="NaN")), "it has failed"),
        ((False, OURS, None, Left(state="stopped", reason="stop")), ""),
    ],
)
def test_why_nothing_to_do(last: tuple[bool, Start | None, Exit | None, Left | None], reason: str) -> None:
    assert why_nothing_to_do("7_0", *last) == reason


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        (History(1, 0), ""),
        (History(9, 1), ""),
        (History(3, 2), "given up: 2 executions in a row without a new checkpoint"),
        (History(10, 0), "given up after 10 executions"),
    ],
)
def test_why_given_up(history: History, reason: str) -> None:
    said = history.why_given_up(max_attempts=10, max_idle_attempts=2)
    assert said.startswith(reason)
    assert bool(said) == bool(reason)


def test_the_history_counts_the_executions_of_one_submission(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "0" * 16)
    for number, (token, step) in enumerate([("other", 0), ("t", 4), ("t", 0), ("t", 0), ("t", None)], 1):
        attempt = run.claim_attempt(number, {"token": token, "process": SOMEBODY.model_dump()})
        assert attempt is not None
        if step is not None:
            write_json(attempt.start_json, {"process": SOMEBODY.model_dump(), "step": step})
    assert History.of(run, "t") == History(executions=3, idle=2)


def test_the_first_step_is_the_trainer_s_own_or_that_of_the_start(tmp_path: Path) -> None:
    attempt = RunDir(tmp_path, "0" * 16).claim_attempt(1, {})
    assert attempt is not None
    assert first_step(attempt) == 0
    write_json(attempt.start_json, {"process": SOMEBODY.model_dump(), "step": 30})
    assert first_step(attempt) == 30
    write_json(attempt.env_json, with_checksum({"resumed_at_step": 20}))
    assert first_step(attempt) == 20, "the checkpoint of step 30 was damaged"
    attempt.env_json.write_text("{")
    assert first_step(attempt) == 30


def test_runs_that_train_together_have_got_as_far_as_the_last_of_them(tmp_path: Path) -> None:
    """Killed between two checkpoints of a step, they go on from the one before: that is no progress, also the next time."""
    runs = [RunDir(tmp_path, f"{number:016x}") for number in range(2)]
    assert last_step(runs) == 0
    for run, steps in zip(runs, ((2, 3), (1, 2)), strict=True):
        for step in steps:
            write_archive(run.checkpoints, b"weights", run.signature, step)
    assert (last_step(runs), last_step(runs[:1])) == (2, 3)

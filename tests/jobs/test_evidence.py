"""The state that follows from what was read of an attempt: every rule, and which of two decides."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.evidence import SlurmEvidence, Verdict, WorkerEvidence, in_progress, of_worker, out_of_the_queue
from jobs.records import Exit, SlurmClaim, Start
from jobs.scheduler.own_jobs import SlurmJob
from vitpa.records import ProcessId

SOMEBODY = ProcessId(host="node1", boot_id="b", pid=7, start_ticks=1)
CLAIM = SlurmClaim(process=SOMEBODY, token="t", index=0, submission="s", cluster="lab", slurm_conf="/etc/lab.conf")
STARTED = Start(process=SOMEBODY)
WITHDRAWN = Start(process=SOMEBODY, withdrawn="cancelled")
FAILED = Exit(state="failed", reason="a bug")
REQUEUED = Exit(state="failed", reason="a bug", requeued=True)
STOPPED = Exit(state="interrupted", reason="time limit")
LEFT = Exit(state="interrupted", reason="stopped alone", left=True)
WAITS, RUNS, ENDS = SlurmJob("7_0", "PENDING", "Priority"), SlurmJob("7_0", "RUNNING"), SlurmJob("7_0", "COMPLETED")


@pytest.mark.parametrize(
    ("start", "ended", "worker", "starters", "expected"),
    [
        (None, None, None, (True, False), ("pending", False)),
        (None, None, None, (None, False), ("pending", True)),
        (None, None, None, (False, False), ("uncertain", False)),
        (None, None, None, (), ("uncertain", False)),
        (STARTED, None, True, (), ("running", False)),
        (STARTED, None, None, (), ("running", True)),
        (STARTED, None, False, (), ("lost", False)),
        (STARTED, FAILED, True, (), ("failed", False)),
        (STARTED, FAILED, False, (), ("failed", False)),
        (WITHDRAWN, None, False, (), ("cancelled", False)),
        (WITHDRAWN, STOPPED, False, (), ("interrupted", False)),
    ],
)
def test_a_worker_s_attempt(
    start: Start | None,
    ended: Exit | None,
    worker: bool | None,
    starters: tuple[bool | None, ...],
    expected: tuple[str, bool],
) -> None:
    verdict = of_worker(WorkerEvidence(SOMEBODY, start, ended, worker, starters, log="s/launch.log"))
    assert (verdict.state, verdict.unseen) == expected
    assert ("see s/launch.log" in verdict.reason) == (verdict.state == "uncertain")


def test_workers_that_have_started_nothing_have_ended_early() -> None:
    for starters, state in (((False, False), "uncertain"), ((True, False), "pending"), ((None,), "pending")):
        verdict = of_worker(WorkerEvidence(SOMEBODY, None, None, None, starters, "", in_vain=True))
        assert (verdict.state, verdict.ended_early) == (state, state == "uncertain")


def evidence(**values: Any) -> SlurmEvidence:
    base = {"claim": CLAIM, "start": None, "exit": None, "job": None, "identity": "7_0", "submitted": True, "launchers": ()}
    return SlurmEvidence(**{**base, "log": "s/launch.log", **values})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"start": WITHDRAWN, "job": RUNS}, ("cancelled", False)),  # its records before SLURM's words
        ({"start": STARTED, "exit": FAILED, "job": RUNS}, ("failed", False)),
        ({"start": STARTED, "exit": LEFT, "job": RUNS}, ("interrupted", False)),  # the job goes on without it
        ({"start": STARTED, "exit": FAILED, "error": "no route"}, ("failed", False)),
        ({"start": STARTED, "exit": REQUEUED, "job": RUNS}, ("pending", False)),  # it will make the next attempt
        ({"start": STARTED, "exit": STOPPED, "job": WAITS}, ("pending", False)),
        (
            {"start": STARTED, "exit": FAILED, "job": WAITS},
            ("pending", False),
        ),  # preempted as it failed
        ({"start": STARTED, "exit": LEFT, "job": WAITS}, ("interrupted", False)),
        ({"start": STARTED, "job": RUNS}, ("running", False)),
        ({"start": STARTED, "job": WAITS}, ("pending", False)),  # requeued
        ({"job": WAITS}, ("pending", False)),
        ({"job": RUNS}, ("pending", False)),
        ({"here": "home"}, ("pending", True)),
        ({"start": STARTED, "here": "home"}, ("running", True)),
        ({"start": STARTED, "exit": STOPPED, "here": "home"}, ("pending", True)),
        ({"start": STARTED, "here": "home", "error": "no route"}, ("running", True)),
        ({"start": STARTED, "job": RUNS, "here": "home"}, ("running", False)),  # what SLURM calls ours is seen
        ({"error": "no route"}, ("pending", True)),
        ({"start": STARTED, "error": "no route"}, ("running", True)),
        ({"identity": "", "submitted": False, "launchers": (True, False)}, ("pending", False)),
        ({"identity": "", "submitted": False, "launchers": (None, False)}, ("pending", True)),
        ({"identity": "", "submitted": False, "launchers": (False, False)}, ("uncertain", False)),
        ({"job": ENDS}, None),
        ({"start": STARTED}, None),
        ({"start": STARTED, "exit": STOPPED}, None),
        ({"identity": ""}, None),
    ],
)
def test_by_the_records_and_the_queue(values: dict[str, Any], expected: tuple[str, bool] | None) -> None:
    verdict = in_progress(evidence(**values))
    assert (verdict and (verdict.state, verdict.unseen)) == expected
    assert (verdict is not None and verdict.cluster == "lab") == ("here" in values and "job" not in values)


def test_a_failed_run_whose_job_slurm_holds_says_why() -> None:
    """RequeueExitHold: somebody has to release the job, or to cancel it."""
    held = SlurmJob("7_0", "SPECIAL_EXIT", "JobHeldUser")
    verdict = in_progress(evidence(start=STARTED, exit=FAILED, job=held))
    assert verdict == Verdict("pending", "special_exit in SLURM: JobHeldUser, after it failed: a bug")
    assert in_progress(evidence(start=STARTED, job=held)) == Verdict("pending", "special_exit in SLURM: JobHeldUser")


@pytest.mark.parametrize(
    ("values", "accounted", "expected"),
    [
        ({"start": STARTED}, "RUNNING", Verdict("running", "sacct says RUNNING", unseen=True)),
        ({}, "RUNNING", Verdict("pending", "sacct says RUNNING", unseen=True)),
        ({"start": STARTED, "exit": STOPPED}, "PENDING", Verdict("pending", "sacct says PENDING", unseen=True)),
        ({"start": STARTED}, "CANCELLED", Verdict("cancelled", "scancel")),
        ({"start": STARTED, "exit": STOPPED}, "CANCELLED", Verdict("cancelled", "scancel")),
        ({"start": STARTED, "exit": STOPPED}, "TIMEOUT", Verdict("interrupted", "time limit")),
        ({"start": STARTED, "exit": REQUEUED}, "", Verdict("failed", "a bug")),
        ({}, "FAILED", Verdict("uncertain", ended_early=True)),
        ({}, "", Verdict("uncertain", ended_early=True)),
        ({"start": STARTED}, "OUT_OF_MEMORY", Verdict("failed", "host out of memory")),
        ({"start": STARTED}, "TIMEOUT", Verdict("interrupted", "SLURM ended job 7_0: TIMEOUT")),
        ({"start": STARTED}, "PREEMPTED", Verdict("interrupted", "SLURM ended job 7_0: PREEMPTED")),
        ({"start": STARTED}, "NODE_FAIL", Verdict("lost", "its job 7_0 was killed (NODE_FAIL)")),
        ({"start": STARTED}, "", Verdict("lost", "its job 7_0 was killed")),
        ({"start": STARTED, "job": ENDS}, "", Verdict("lost", "its job 7_0 was killed (COMPLETED)")),
    ],
)
def test_out_of_the_queue(values: dict[str, Any], accounted: str, expected: Verdict) -> None:
    known = SlurmJob("7_0", accounted) if accounted else None
    verdict = out_of_the_queue(evidence(**values, accounted=known))
    assert expected.reason in verdict.reason
    assert (verdict.state, verdict.unseen, verdict.ended_early) == (expected.state, expected.unseen, expected.ended_early)

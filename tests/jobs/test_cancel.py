"""Cancelling runs that are started in the same moment: each either never begins or is asked to stop with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.cancel import cancel
from jobs.context import load_context
from jobs.scheduler.own_jobs import SlurmJob, Snapshot
from jobs.sweep import Run, SweepDir
from tests.support.claims import Queue, slurm_claim
from tests.support.jobs_sweeps import make_sweep
from vitpa.attempt import CANCEL, Stop
from vitpa.cli import parser
from vitpa.records import ProcessId, write_json
from vitpa.rundir import AttemptDir

WAITS, RUNS = SlurmJob("7_0", "PENDING"), SlurmJob("7_0", "RUNNING")


class Meanwhile(Queue):
    """A SLURM whose answers change, and after whose first one something happens."""

    def __init__(self, *answers: SlurmJob, happens: Callable[[], object]) -> None:
        super().__init__()
        self.answers, self.happens = list(answers), happens
        self.cancelled: list[str] = []

    def snapshot(self) -> Snapshot:
        first, self.found = self.found is None, self.answers.pop(0)
        seen = super().snapshot()
        if first:
            self.happens()
        return seen

    def cancel(self, jobs: Iterable[SlurmJob]) -> None:
        self.cancelled += [job.id for job in jobs]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    sweep = make_sweep(tmp_path, seeds=1)
    SweepDir(tmp_path, sweep.name).record(sweep)
    return sweep.runs[0]


def start(attempt: AttemptDir) -> None:
    elsewhere = ProcessId.mine().model_copy(update={"host": "n1"})
    write_json(attempt.start_json, {"process": elsewhere.model_dump(), "job": {"id": "7_0", "restart": 0}})


def cancel_by(root: Path, queue: Queue) -> None:
    context = load_context(parser().parse_args(["sweep", "cancel", f"{root}/small.yaml", "--root", str(root)]))
    assert cancel(replace(context, scheduler=queue)) == 0


def assert_asked_to_stop(root: Path, run: Run, attempt: int) -> None:
    directory = run.directory(root)
    assert [each.number for each in directory.attempts()] == list(range(1, attempt + 1))
    request = Stop.read(directory.stop)
    assert request is not None
    assert (request.reason, request.attempt) == (CANCEL, attempt)


def test_started_after_its_records_were_read(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = slurm_claim(tmp_path, run)
    monkeypatch.setattr("jobs.cancel._say_shared", lambda *_: start(attempt))  # the last that happens before
    cancel_by(tmp_path, Queue(WAITS))
    assert_asked_to_stop(tmp_path, run, 1)


def test_started_between_slurms_answer_and_the_records(tmp_path: Path, run: Run) -> None:
    """They then look like those of a run whose job was requeued and waits."""
    attempt = slurm_claim(tmp_path, run)
    cancel_by(tmp_path, Meanwhile(WAITS, RUNS, happens=lambda: start(attempt)))
    assert_asked_to_stop(tmp_path, run, 1)


def test_started_again_after_its_records_were_read(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    start(slurm_claim(tmp_path, run))
    monkeypatch.setattr("jobs.cancel._say_shared", lambda *_: start(slurm_claim(tmp_path, run, number=2)))
    cancel_by(tmp_path, Queue(WAITS))
    assert_asked_to_stop(tmp_path, run, 2)


def test_one_that_waits_to_go_on_does_not(tmp_path: Path, run: Run) -> None:
    start(slurm_claim(tmp_path, run))
    queue = Meanwhile(WAITS, WAITS, happens=lambda: None)
    cancel_by(tmp_path, queue)
    assert queue.cancelled == ["7_0"]
    directory = run.directory(tmp_path)
    assert [attempt.exit_json.exists() for attempt in directory.attempts()] == [False, True]
    assert not directory.stop.exists()

"""Cancelling runs that are started in the same moment: each either never begins or is asked to stop with a checkpoint."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.cancel import cancel
from jobs.context import load_context
from jobs.errors import SweepError
from jobs.scheduler.client import SchedulerError
from jobs.scheduler.own_jobs import SlurmJob, Snapshot
from jobs.sweep import Run, SweepDir
from tests.support.claims import Queue, slurm_claim
from tests.support.jobs_sweeps import make_sweep
from vitpa.attempt import CANCEL, Stop
from vitpa.cli import parser
from vitpa.records import ProcessId, read_json, write_json
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


class Cluster(Queue):
    """A SLURM in which tasks of submission `t` run."""

    def __init__(self, *tasks: int, refuses: str = "") -> None:
        super().__init__()
        self.jobs = {("t", index): SlurmJob(f"7_{index}", "RUNNING") for index in tasks}
        self.refuses, self.cancelled = refuses, list[str]()

    def snapshot(self) -> Snapshot:
        return Snapshot(self.jobs)

    def cancel(self, jobs: Iterable[SlurmJob]) -> None:
        wanted = [job.id for job in jobs]
        if wanted and self.refuses:
            raise SchedulerError(self.refuses)
        self.cancelled += wanted


def full_disk(*runs: Run) -> Callable[[Path, dict[str, object]], None]:
    """Writes records, but none into the folders of these runs."""

    def write(path: Path, document: dict[str, object]) -> None:
        if path.parent.name in {run.signature for run in runs}:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_json(path, document)

    return write


def tasks_of(root: Path, *groups: list[Run]) -> None:
    """Tasks of one submission, a group each, all of whose runs are in training elsewhere."""
    for index, group in enumerate(groups):
        for run in group:
            attempt = slurm_claim(root, run)
            write_json(attempt.claim_json, {**(read_json(attempt.claim_json) or {}), "index": index})
            start(attempt)
    runs = [run for group in groups for run in group]
    wanted = [{"signature": run.signature, "attempt": 1} for run in runs]
    tasks = [[runs.index(run) for run in group] for group in groups]
    write_json(root / "sweeps/small/submissions/s/intent.json", {"token": "t", "runs": wanted, "tasks": tasks})


def refused_cancel(root: Path, cluster: Cluster, *terms: str) -> str:
    words = ["sweep", "cancel", f"{root}/small.yaml", *terms, "--root", str(root)]
    with pytest.raises(SweepError) as refused:
        cancel(replace(load_context(parser().parse_args(words)), scheduler=cluster))
    assert refused.value.exit_code == 1
    return str(refused.value)


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    sweep = make_sweep(tmp_path, seeds=2)
    SweepDir(tmp_path, sweep.name).record(sweep)
    return sweep.runs


def test_slurm_ends_what_a_full_disk_does_not_let_stop(
    tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks_of(tmp_path, runs[:1], runs[1:2], runs[2:])
    monkeypatch.setattr("jobs.cancel.write_json", full_disk(runs[0], runs[2], runs[3]))
    cluster = Cluster(0, 1, 2)
    line = refused_cancel(tmp_path, cluster)
    assert line.startswith(
        f"{runs[0].directory(tmp_path).stop}: No space left on device; 3 could not be asked to stop; SLURM ends 3"
    )
    assert "(digits-content-s0, digits-content-s1, digits-positional-s1)" in line
    assert "submit starts again, since no record says that they are cancelled" in line
    assert "go on" not in line
    assert cluster.cancelled == ["7_0", "7_2"], "a job with two of them is ended once"
    assert_asked_to_stop(tmp_path, runs[1], 1)


def test_a_full_disk_ends_no_job_that_another_run_needs(
    tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks_of(tmp_path, runs[:1], runs[1:])
    monkeypatch.setattr("jobs.cancel.write_json", full_disk(*runs))
    cluster = Cluster(0, 1)
    line = refused_cancel(tmp_path, cluster, "seed=0")
    assert "SLURM ends 1 of them (digits-content-s0)" in line
    assert line.endswith("; 1 goes on: digits-positional-s0; free some space, then cancel again")
    assert cluster.cancelled == ["7_0"]


def test_a_full_disk_and_no_slurm_are_one_line(tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    tasks_of(tmp_path, runs[:2])
    monkeypatch.setattr("jobs.cancel.write_json", full_disk(*runs))
    line = refused_cancel(tmp_path, Cluster(0, refuses="scancel: no route"))
    assert "SLURM ends" not in line
    assert "; 2 go on (scancel: no route): digits-content-s0, digits-positional-s0; free some space, then" in line


def test_a_full_disk_does_not_keep_a_job_in_the_queue(
    tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "start.json")

    tasks_of(tmp_path, runs[:1])
    (runs[0].directory(tmp_path).attempt(1)).start_json.unlink()
    monkeypatch.setattr("jobs.cancel.withdraw", full)
    cluster = Cluster()
    cluster.jobs = {("t", 0): WAITS}
    assert refused_cancel(tmp_path, cluster).startswith(
        "start.json: No space left on device; 1 could not be asked to stop; SLURM"
    )
    assert cluster.cancelled == ["7_0"]

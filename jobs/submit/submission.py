"""The records of a submission: `<root>/sweeps/<name>/submissions/<utc>-<token>`, and what becomes of one cut short.

intent.json    before anything is started: the runs wanted, each with the number of its next attempt
launch.json    by the helper that starts the jobs, before it does; created exclusively: whoever finds the launcher dead and
               no such file abandons the submission by creating it
receipt.json   after the jobs were started, and the disk holds what they need to start: their ids
taken-N.json   on this machine: a worker has task N, a group of several runs
"""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.errors import SweepError
from jobs.records import Intent, Launch
from jobs.scheduler.client import IN_FLIGHT_S, Scheduler, SchedulerError
from jobs.scheduler.own_jobs import SlurmJob
from vitpa.records import (
    ProcessId,
    RunError,
    create_exclusive,
    read_record,
    sync_file,
    sync_folder,
    to_json,
    utc_now,
    write_atomic,
)

HELPER_WAIT_S = 120.0
WRITERS = 16  # files are written or synced at the same time: each waits for the disk, most of all on a file server


class SubmissionDir:
    """All paths of a submission."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.intent_json = path / "intent.json"
        self.launch_json = path / "launch.json"
        self.receipt_json = path / "receipt.json"
        self.launch_log = path / "launch.log"
        self.submitit = path / "submitit"  # pickles and output of the jobs


def check_root(root: Path, executor: str) -> None:
    """Refuse a root in whose name submitit, or SLURM, would put something else.

    Raises:
        SweepError: it holds such characters.
    """
    patterns = r"%[jtaA]" if executor == "local" else r"%|\\|[\x00-\x1f\x7f]"
    found = re.search(patterns, str(root))
    if found is not None:
        by = "submitit puts the job's number in its place" if executor == "local" else "SLURM does not take it literally"
        raise SweepError(
            f"--root {str(root)!r}: jobs cannot work below a name with {found[0]!r} in it ({by}); choose another folder"
        )


def settle(root: Path, scheduler: Scheduler) -> list[str]:
    """Bring submissions whose launcher was killed to a clear state; a line for each of which jobs were found in SLURM.

    A helper still at work is waited for. Jobs that SLURM has, by their token, are adopted: their receipt is written.

    Raises:
        SchedulerError: SLURM does not answer, so nobody knows whether it has the jobs.
    """
    lines = []
    for path in sorted(root.glob("sweeps/*/submissions/*")):
        submission = SubmissionDir(path)
        if submission.receipt_json.exists():
            continue
        try:
            intent = read_record(Intent, submission.intent_json)
        except RunError as error:
            lines.append(f"{error}; its runs are shown as uncertain, and can be submitted again")
            continue
        if intent is None or (intent.launcher is not None and intent.launcher.alive() is not False):
            continue
        me = {"abandoned_by": ProcessId.mine().model_dump(), "utc": utc_now()}
        if create_exclusive(submission.launch_json, to_json(me)):
            close(submission, "abandoned")
        elif not _helper_ends(submission) and intent.executor == "slurm":
            there = intent.cluster
            if there and there != scheduler.cluster():
                lines.append(
                    f"{path}: its launcher was killed, and whether the SLURM cluster {there} has its jobs cannot be seen from "
                    "here: its runs count as submitted (set SLURM_CONF to that cluster's slurm.conf to have it settled)"
                )
                continue
            count = adopt(root, submission, intent.token, scheduler)
            if count:
                lines.append(f"adopted {count} jobs of {path.name}, whose launcher was killed")
            else:
                close(submission, "abandoned")
    return lines


def adopt(root: Path, submission: SubmissionDir, token: str, scheduler: Scheduler) -> int:
    """Write the receipt for jobs that SLURM has although nobody is left who could; their number.

    Raises:
        SchedulerError: SLURM does not answer.
    """
    jobs = find_jobs(root, submission, token, scheduler)
    if jobs:
        close(submission, "adopted", as_started(jobs))
    return len(jobs)


def find_jobs(root: Path, submission: SubmissionDir, token: str, scheduler: Scheduler) -> list[SlurmJob]:
    """The jobs that SLURM has of a submission, each with what it needs to start; also if SLURM is only about to get them.

    The disk holds that then: no power loss takes it.

    Raises:
        SchedulerError: SLURM does not answer.
    """
    began = last_sbatch = time.monotonic()
    while True:
        snapshot = scheduler.snapshot()
        if snapshot.error:
            raise SchedulerError(
                f"{snapshot.error}. Whether it has the jobs of {submission.path} is settled by the next submit"
            )
        jobs = [job for (found, _), job in snapshot.jobs.items() if found == token]
        now = time.monotonic()
        if _sbatch_at_work(submission):
            last_sbatch = now
        if jobs or now - last_sbatch > IN_FLIGHT_S or now - began > HELPER_WAIT_S:
            _secure_pickles(root, submission, [job.id for job in jobs])
            return jobs
        time.sleep(0.5)


def as_started(jobs: Sequence[SlurmJob]) -> list[dict[str, object]]:
    """Jobs as a receipt names them: an array once."""
    arrays = {number: bool(index) for number, _, index in (job.id.partition("_") for job in jobs)}
    return [{"id": number, "array": array} for number, array in arrays.items()]


def close(submission: SubmissionDir, how: str, jobs: Sequence[Mapping[str, object]] = ()) -> None:
    """Write the receipt of a submission of which nothing more will come than `jobs`."""
    create_exclusive(submission.receipt_json, to_json({"jobs": list(jobs), how: True, "utc": utc_now()}))


def _helper_ends(submission: SubmissionDir) -> bool:
    """Wait while the helper of a submission is alive; whether it has written the receipt."""
    try:
        launch = read_record(Launch, submission.launch_json)
    except RunError:  # damaged: SLURM knows what has become of it
        launch = None
    helper = launch and launch.process
    deadline = time.monotonic() + HELPER_WAIT_S
    while not submission.receipt_json.exists() and helper and helper.alive() and time.monotonic() < deadline:
        time.sleep(0.2)
    return submission.receipt_json.exists()


def _sbatch_at_work(submission: SubmissionDir) -> bool:
    """Whether an sbatch has outlived the helper that started it."""
    folder = str(submission.submitit).encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:  # it has ended, or belongs to another user
            continue
        if folder in line and b"sbatch\0" in line:
            return True
    return False


def _secure_pickles(root: Path, submission: SubmissionDir, ids: list[str]) -> None:
    """Have the disk hold the pickle of each job, whole and under the job's name.

    submitit names a pickle by the job's id, after sbatch, and syncs nothing: that of an adopted job may have no name yet, and
    after a power loss it may be cut short.
    """
    from submitit.core.utils import DelayedSubmission, JobPaths  # noqa: PLC0415 - slow, and needed only here

    from jobs.execute.slurm import run_task  # noqa: PLC0415

    delayed = DelayedSubmission(run_task, str(root), str(submission.path.relative_to(root)))
    delayed.set_timeout(0, 0)
    content = pickle.dumps(delayed)

    def secure(identity: str) -> None:
        path = JobPaths(submission.submitit, job_id=identity).submitted_pickle
        try:
            DelayedSubmission.load(path)
        except Exception:  # pickle raises many types
            write_atomic(path, content)
        else:
            sync_file(path)

    if ids:
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(secure, ids))
        sync_folder(submission.submitit)

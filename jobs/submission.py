"""The records of a submission: `<root>/sweeps/<name>/submissions/<utc>-<token>`, and what becomes of one cut short.

intent.json    before anything is started: the runs wanted, each with the number of its next attempt
launch.json    by the helper that starts the jobs, before it does; created exclusively: whoever finds the launcher dead and
               no such file abandons the submission by creating it
receipt.json   after the jobs were started: their ids
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.scheduler import Scheduler, SchedulerError
from vitpa.config import ProcessId, RunError, create_exclusive, read_json, to_json, utc_now

HELPER_WAIT_S = 120.0
IN_FLIGHT_S = 3.0  # an sbatch whose parent was killed may still be on its way


class SubmissionDir:
    """All paths of a submission."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.intent_json = path / "intent.json"
        self.launch_json = path / "launch.json"
        self.receipt_json = path / "receipt.json"
        self.launch_log = path / "launch.log"
        self.submitit = path / "submitit"  # pickles and output of the jobs


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
            intent = read_json(submission.intent_json)
        except RunError as error:
            lines.append(f"{error}; its runs are shown as uncertain, and can be submitted again")
            continue
        if intent is None or _alive(intent.get("launcher")) is not False:
            continue
        me = {"abandoned_by": ProcessId.mine().model_dump(), "utc": utc_now()}
        if create_exclusive(submission.launch_json, to_json(me)):
            _close(submission, [], "abandoned")
            continue
        if _helper_ends(submission) or intent["executor"] != "slurm":
            continue
        ids = _find(str(intent["token"]), scheduler)
        if ids:
            _restore_pickles(root, submission, ids)
            lines.append(f"adopted {len(ids)} jobs of {path.name}, whose launcher was killed")
        numbers = {identity.partition("_")[0]: "_" in identity for identity in ids}
        jobs = [{"id": number, "array": array} for number, array in numbers.items()]
        _close(submission, jobs, "adopted" if ids else "abandoned")
    return lines


def _helper_ends(submission: SubmissionDir) -> bool:
    """Wait while the helper of a submission is alive; whether it has written the receipt."""
    helper = (read_json(submission.launch_json) or {}).get("process")
    deadline = time.monotonic() + HELPER_WAIT_S
    while not submission.receipt_json.exists() and _alive(helper) and time.monotonic() < deadline:
        time.sleep(0.2)
    return submission.receipt_json.exists()


def _alive(process: Any) -> bool | None:
    try:
        return ProcessId.model_validate(process).alive()
    except ValidationError:
        return False


def _find(token: str, scheduler: Scheduler) -> list[str]:
    deadline = time.monotonic() + IN_FLIGHT_S
    while True:
        snapshot = scheduler.snapshot()
        if snapshot.error:
            raise SchedulerError(f"{snapshot.error}. A launcher was killed, and only SLURM knows whether it has its jobs")
        ids = snapshot.ids(token)
        if ids or time.monotonic() > deadline:
            return ids
        time.sleep(0.5)


def _restore_pickles(root: Path, submission: SubmissionDir, ids: list[str]) -> None:
    """submitit names a job's pickle by the job's id, after sbatch: those of adopted jobs may not have been named yet."""
    from submitit.core.utils import DelayedSubmission, JobPaths  # noqa: PLC0415 - slow, and needed only here

    from jobs.slurm_job import run_task  # noqa: PLC0415

    for identity in ids:
        path = JobPaths(submission.submitit, job_id=identity).submitted_pickle
        if not path.exists():
            delayed = DelayedSubmission(run_task, str(root), str(submission.path.relative_to(root)))
            delayed.set_timeout(0, 0)
            temporary = path.with_name(f".{path.name}")
            delayed.dump(temporary)
            temporary.replace(path)


def _close(submission: SubmissionDir, jobs: list[dict[str, object]], how: str) -> None:
    create_exclusive(submission.receipt_json, to_json({"jobs": jobs, how: True, "utc": utc_now()}))

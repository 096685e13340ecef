"""Start the jobs of a submission through submitit: `python -m jobs.launch ROOT SUBMISSION JOBS`.

A short-lived helper of `vitpa sweep submit`, in a session of its own, so that the jobs outlive the launcher and its
terminal. A job's pickle holds two strings; everything else it reads by path.
"""

from __future__ import annotations

import sys
from pathlib import Path

import submitit

from jobs.submit import SubmissionDir
from jobs.worker import work
from vitpa.config import ProcessId, create_exclusive, to_json, utc_now

NO_TIME_LIMIT_MIN = 60 * 24 * 366  # submitit's default for local jobs is 2 minutes


def main(arguments: list[str]) -> None:
    """Start JOBS jobs for SUBMISSION (a path below ROOT) and write its receipt."""
    root, submission, jobs = arguments
    directory = SubmissionDir(Path(root) / submission)
    executor = submitit.LocalExecutor(folder=directory.submitit)
    executor.update_parameters(timeout_min=NO_TIME_LIMIT_MIN)
    started = []
    for _ in range(int(jobs)):
        job = executor.submit(work, root, submission)
        started.append({"id": job.job_id, "process": ProcessId.of(int(job.job_id)).model_dump()})
    create_exclusive(directory.receipt_json, to_json({"executor": "local", "jobs": started, "utc": utc_now()}))


if __name__ == "__main__":
    main(sys.argv[1:])

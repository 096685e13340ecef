"""Start the jobs of a submission through submitit: `python -m jobs.submit.launch ROOT SUBMISSION INDICES`.

A short-lived helper of `vitpa sweep submit`, in a session of its own, so that it ends what it has begun, and the jobs
outlive the launcher and its terminal. A job's pickle holds two strings; everything else it reads by path.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import submitit

from jobs.execute.local import LocalIntent, work
from jobs.execute.slurm import SlurmIntent, run_task
from jobs.records import Intent
from jobs.scheduler.client import Scheduler
from jobs.scheduler.sbatch import slurm_executor
from jobs.submit.submission import SubmissionDir, as_started, find_jobs
from vitpa.records import ProcessId, create_exclusive, make_folders, read_record, to_json, utc_now

NO_TIME_LIMIT_MIN = 60 * 24 * 366  # submitit's default for local jobs is 2 minutes


def main(arguments: list[str]) -> None:
    """Start jobs for the tasks INDICES (a JSON list) of SUBMISSION (a path below ROOT) and write its receipt."""
    root, submission, indices = arguments[0], arguments[1], json.loads(arguments[2])
    directory = SubmissionDir(Path(root) / submission)
    intent = read_record(Intent, directory.intent_json)
    assert intent is not None, "the intent is written before a helper is started"
    if not create_exclusive(directory.launch_json, to_json({"process": ProcessId.mine().model_dump(), "utc": utc_now()})):
        sys.exit("this submission has been abandoned: its launcher was killed, and another one was faster than this helper")
    start = start_array if intent.executor == "slurm" else start_workers
    jobs = start(Path(root), submission, indices)
    create_exclusive(directory.receipt_json, to_json({"executor": intent.executor, "jobs": jobs, "utc": utc_now()}))


def start_workers(root: Path, submission: str, indices: list[int]) -> list[dict[str, Any]]:
    """Start as many workers on this machine as there are slots, or groups of runs."""
    intent = LocalIntent.of(root / submission)
    executor = submitit.LocalExecutor(folder=SubmissionDir(root / submission).submitit)
    executor.update_parameters(timeout_min=NO_TIME_LIMIT_MIN)
    started = []
    for _ in range(min(len(intent.slots), len(indices))):
        job = executor.submit(work, str(root), submission)
        started.append({"id": job.job_id, "process": ProcessId.of(int(job.job_id)).model_dump()})
    return started


def start_array(root: Path, submission: str, indices: list[int]) -> list[dict[str, Any]]:
    """Submit a job array to SLURM with a task for each group of runs.

    Which job that is, SLURM says: what sbatch prints may be preceded by lines of a site's wrapper, with other numbers in them.
    """
    intent = SlurmIntent.of(root / submission)
    count = len(intent.groups)
    directory = SubmissionDir(root / submission)
    make_folders(directory.submitit)  # submitit would make it, and not sync it
    executor = slurm_executor(
        intent.profile,
        directory.submitit,
        root=root,
        name=intent.sweep,
        token=intent.token,
        exclude=intent.exclude,
        indices=indices,
        count=count,
    )
    said = executor.map_array(run_task, [str(root)] * count, [submission] * count)[0].job_id.partition("_")[0]
    jobs = find_jobs(root, directory, intent.token, Scheduler())
    if not jobs:
        sys.exit(f"sbatch: error: it said job {said}, but SLURM has no job of this submission")
    return [{**job, "tasks": len(indices)} for job in as_started(jobs)]


if __name__ == "__main__":
    main(sys.argv[1:])

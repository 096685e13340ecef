"""Which SLURM jobs are ours: the one place that decides it, from what SLURM itself says of a job.

A job is ours if it belongs to this user and carries the token of one of our submissions: in its comment, in its name, or
in the path of its script, which lies in the submission's folder. Each alone suffices, because sites rewrite comments, and
`scontrol update` changes comments and names; the path of the script cannot be changed. A number proves nothing: it may have
come from a line of a site's sbatch wrapper, and job ids begin anew when a cluster is installed again. So there is no way to
make a `SlurmJob` but from SLURM's own words, and only a `SlurmJob` can be cancelled, requeued or changed (client.py).

A run is one task of a job, by its index. A state that is not known to be an end counts as live (job_state_string in SLURM's
source has the names); so does REVOKED: in a federation, another cluster has started the job.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "CONFIGURING", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
COMMENT = "vitpa:"  # before the token
RECORD, COLUMN = "\x1e", "\x1f"  # separators that occur in no name or comment that a person types
QUEUE_COLUMNS = RECORD + COLUMN.join(["%i", "%U", "%T", "%r", "%N", "%j", "%o", "%k"])  # squeue --format
ACCOUNT_COLUMNS = ("JobID", "UID", "State", "NodeList", "JobName")  # sacct --format
SUBMIT_LINE = "SubmitLine"  # of sbatch, with the path of the script; sacct knows it since SLURM 21.08

_TOKEN = r"[0-9a-f]{8}"  # secrets.token_hex(4)
_IN_COMMENT = re.compile(rf"{COMMENT}({_TOKEN})(?![0-9a-f])")
_IN_NAME = re.compile(rf"(?<![0-9a-f])({_TOKEN})(?![0-9a-f])")
_IN_PATH = re.compile(rf"/submissions/[^/\s]*-({_TOKEN})/submitit/|/vitpa-({_TOKEN})-")
_ACCOUNT_RECORD = re.compile(rf"^(?=\d[^\n{COLUMN}]*{COLUMN})", re.MULTILINE)  # not where a name has a line break in it
_ID = re.compile(r"(\d+)(?:_(\d+)|_\[([\d,:-]+)(?:%\d+)?\])?")


@dataclass(frozen=True)
class SlurmJob:
    """A job of ours, or a task of an array, as SLURM sees it."""

    id: str  # 1234, or 1234_5 for task 5 of an array
    state: str
    reason: str = ""  # of waiting
    nodes: str = ""
    comment: str = ""

    @property
    def live(self) -> bool:
        """Whether it is not known to have ended."""
        return self.state not in ENDED

    @property
    def waiting(self) -> bool:
        """Whether it is live without running."""
        return self.state in WAITING


@dataclass(frozen=True)
class Snapshot:
    """Our jobs in the queue at one moment."""

    jobs: Mapping[tuple[str, int], SlurmJob]  # by (token, index of the task)
    error: str = ""  # why it could not be had

    def of(self, token: str, index: int) -> SlurmJob | None:
        """The job that is to execute task `index` of the submission with that token."""
        return self.jobs.get((token, index))


def in_queue(text: str, user_id: int) -> dict[tuple[str, int], SlurmJob]:
    """Our jobs in what squeue prints with QUEUE_COLUMNS."""
    jobs: dict[tuple[str, int], SlurmJob] = {}
    for record in text.split(RECORD)[1:]:
        columns = record.removesuffix("\n").split(COLUMN)
        if len(columns) != QUEUE_COLUMNS.count(COLUMN) + 1:
            continue
        identity, user, state, reason, nodes, name, script, comment = columns
        if user != str(user_id):
            continue
        job = SlurmJob(identity, state, "" if reason == "None" else reason, nodes, comment)
        for index in _indices(identity):
            for token in _tokens(comment, name, script):
                key = (token, index)
                if key not in jobs or job.live:
                    jobs[key] = job
    return jobs


def in_accounting(text: str, user_id: int) -> dict[tuple[str, int], SlurmJob]:
    """Our jobs in what sacct prints of ACCOUNT_COLUMNS and perhaps SUBMIT_LINE, oldest record first; the last one counts.

    A job has a record for each time that it was started; a record of another job with the same number is passed over.
    """
    jobs: dict[tuple[str, int], SlurmJob] = {}
    for record in _ACCOUNT_RECORD.split(text):
        columns = record.removesuffix("\n").split(COLUMN, len(ACCOUNT_COLUMNS))
        if len(columns) < len(ACCOUNT_COLUMNS):
            continue
        identity, user, state, nodes, name, *line = columns
        if user != str(user_id) or not state:
            continue
        for index in _indices(identity):
            task = f"{identity.partition('_')[0]}_{index}" if "_" in identity else identity
            for token in _tokens("", name, "".join(line)):
                jobs[token, index] = SlurmJob(task, state.split()[0], nodes=nodes)  # "CANCELLED by 1000"
    return jobs


def _tokens(comment: str, name: str, path: str) -> set[str]:
    """What may be a token of ours in the words that SLURM has of a job."""
    of_path = [first or second for first, second in _IN_PATH.findall(path)]
    return {*_IN_COMMENT.findall(comment), *_IN_NAME.findall(name), *of_path}


def _indices(identity: str) -> list[int]:
    """Indices of the tasks that an id stands for: 12 is task 0, 12_5 task 5, 12_[1-3%2] what waits together."""
    match = _ID.fullmatch(identity)
    if match is None:
        return []
    _, task, together = match.groups()
    if together is None:
        return [int(task or 0)]
    indices: list[int] = []
    for part in together.split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if span is not None:
            indices += range(int(span[1]), int(span[2] or span[1]) + 1, int(span[3] or 1))
    return indices

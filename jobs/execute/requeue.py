"""Whether SLURM is to go on with a run after an execution of its job: pure functions of frozen records of what was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.execute.bad_nodes import PREFLIGHT
from jobs.records import Claim, Exit, Start
from vitpa.attempt import Left
from vitpa.records import made_with, read_record
from vitpa.rundir import AttemptDir, RunDir

TIME_LIMIT = "time limit"
FAILED_BEFORE = "it has failed"
WARNINGS = (TIME_LIMIT, "signal SIGUSR1", "signal SIGUSR2")  # after which the run is to go on; SIGTERM may be a cancellation


@dataclass(frozen=True)
class History:
    """What the executions of one submission have brought a run."""

    executions: int
    idle: int  # the last ones in a row, without a new checkpoint

    @staticmethod
    def of(run: RunDir, token: str) -> History:
        """Read it from the attempts of a run that the submission with this token has made."""
        claims = [(each, read_record(Claim, each.claim_json)) for each in run.attempts()]
        started = [each for each, claim in claims if claim and claim.token == token and each.start_json.exists()]
        step, idle = run.newest_step(), 0
        for attempt in reversed(started):
            start = read_record(Start, attempt.start_json)
            if start is None or start.step != step:
                break
            idle += 1
        return History(len(started), idle)

    def why_given_up(self, *, max_attempts: int, max_idle_attempts: int) -> str:
        """Why there is no point in another execution after these; empty if there is one."""
        if self.idle >= max_idle_attempts:
            return f"given up: {self.idle} executions in a row without a new checkpoint (max_idle_attempts)"
        if self.executions >= max_attempts:
            return f"given up after {self.executions} executions (max_attempts)"
        return ""


@dataclass(frozen=True)
class End:
    """How an execution ended for a run."""

    state: str
    reason: str
    told_to_end: bool  # SLURM has sent SIGTERM or SIGINT
    followed: bool  # another execution has the run already
    bad_node: bool  # a node has failed its pre-flight, and is left out from now on
    disk_full: bool  # there was no room for what it wrote, or before it began; the next execution waits for some
    first_step: int  # from which this execution went on
    last_step: int  # of the newest checkpoint, of runs that train together the oldest such
    given_up: str  # by the history of the run; empty if not

    @property
    def why_not_requeued(self) -> str:
        """Why SLURM is not asked to start the job again; empty if it is."""
        if self.told_to_end:
            return "SLURM requeues after preemption, nobody after a cancellation"
        if self.followed:
            return "another execution has the run"
        for_room = self.disk_full and (self.state == "failed" or PREFLIGHT in self.reason)
        if self.bad_node or for_room:
            return self.given_up
        if self.state == "interrupted" and self.reason not in WARNINGS:
            return "a stop was requested"
        if self.last_step <= self.first_step:
            return "no new checkpoint in this attempt"
        return self.given_up


def why_nothing_to_do(job: str, finished: bool, start: Start | None, ended: Exit | None, left: Left | None) -> str:
    """Why SLURM's job `job` has nothing left to do after a run's last attempt with these records; empty if it has.

    `finished`: there is a result; `left`: the trainer's words, where it went on without the run.
    """
    if finished:
        return "the run is finished"
    withdrawn = start is not None and start.withdrawn is not None
    if withdrawn or (ended is not None and (ended.left or ended.state in ("cancelled", "done", "paused"))):
        return f"it was {ended.state if ended else 'withdrawn'}"
    owner = start.job.id if start and start.job else None
    if owner != job:
        return f"it belongs to job {owner}"
    return FAILED_BEFORE if left is not None and left.state == "failed" else ""


def last_step(runs: Sequence[RunDir]) -> int:
    """The step from which runs that train together can go on: one killed between their checkpoints leaves some ahead."""
    return min((run.newest_step() for run in runs), default=0)


def first_step(attempt: AttemptDir) -> int:
    """The step from which an attempt went on: as the training says, which passes damaged checkpoints over, if it got there."""
    step = made_with(attempt.env_json).get("resumed_at_step")
    if isinstance(step, int):
        return step
    start = read_record(Start, attempt.start_json)
    return (start.step or 0) if start else 0

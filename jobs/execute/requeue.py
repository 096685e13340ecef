"""Whether SLURM is to go on with a run after an execution of its job: pure functions of frozen records of what was read."""

from __future__ import annotations

from dataclasses import dataclass

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
    first_step: int  # from which this execution went on
    last_step: int  # of the newest checkpoint
    given_up: str  # by the history of the run; empty if not

    @property
    def why_not_requeued(self) -> str:
        """Why SLURM is not asked to start the job again; empty if it is."""
        if self.told_to_end:
            return "SLURM requeues after preemption, nobody after a cancellation"
        if self.followed:
            return "another execution has the run"
        if self.bad_node:
            return self.given_up
        if self.state == "interrupted" and self.reason not in WARNINGS:
            return "a stop was requested"
        if self.last_step <= self.first_step:
            return "no new checkpoint in this attempt"
        return self.given_up


@dataclass(frozen=True)
class LastAttempt:
    """What the last attempt of a run says to an execution that has come to go on with it."""

    finished: bool  # there is a result
    start: Start | None
    exit: Exit | None
    left: Left | None  # the trainer's words, where it went on without the run

    def why_nothing_to_do(self, job: str) -> str:
        """Why SLURM's job `job` has nothing left to do; empty if it has."""
        if self.finished:
            return "the run is finished"
        withdrawn = self.start is not None and self.start.withdrawn is not None
        if withdrawn or (self.exit is not None and (self.exit.left or self.exit.state in ("cancelled", "done"))):
            return f"it was {self.exit.state if self.exit else 'withdrawn'}"
        owner = self.start.job.id if self.start and self.start.job else None
        if owner != job:
            return f"it belongs to job {owner}"
        return FAILED_BEFORE if self.left is not None and self.left.state == "failed" else ""


def first_step(attempt: AttemptDir) -> int:
    """The step from which an attempt went on: as the training says, which passes damaged checkpoints over, if it got there."""
    step = made_with(attempt.env_json).get("resumed_at_step")
    if isinstance(step, int):
        return step
    start = read_record(Start, attempt.start_json)
    return (start.step or 0) if start else 0

"""Ending runs of a sweep: what waits is withdrawn, what trains is asked to stop, other sweeps with the same runs are named.

Where that cannot be written, as on a full disk, SLURM ends what it can. Nothing then tells later that it was cancelled.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from jobs.context import Context, select
from jobs.errors import SweepError
from jobs.membership import jobs_needed_by_others, sweeps_with
from jobs.records import Claim
from jobs.report import status
from jobs.scheduler.client import SchedulerError
from jobs.scheduler.own_jobs import SlurmJob
from jobs.state import LIVE, RunState, withdraw
from jobs.submit.submission import WRITERS
from vitpa.attempt import CANCEL, Stop
from vitpa.records import RunError, read_record, utc_now, write_json
from vitpa.rundir import AttemptDir

MAKE_ROOM = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota"}


@dataclass(frozen=True)
class Requested:
    """What was written of a cancellation.

    Attributes:
        withdrawn: Runs that were waiting, and that nobody will start now.
        running: Those in training that are asked to stop.
        unwritten: Those of which neither could be written, each with the error.
    """

    withdrawn: list[RunState]
    running: list[RunState]
    unwritten: list[tuple[RunState, OSError]]


def cancel(context: Context) -> int:
    """What `vitpa sweep cancel` does; exit code 0.

    Raises:
        SweepError: of some runs it could not be written; all others have been seen to.
    """
    states = _looked_at_twice(context, context.states_of([*context.sweep.runs, *context.left]))
    left = {run.signature for run in context.left}
    live = [state for state in select(states, context.filters) if state.state in LIVE or state.state == "uncertain"]
    if context.options.gone:
        live = [state for state in live if state.run.signature in left]
    _say_shared(context, live)
    if context.options.dry_run:
        for state in live:
            where = ", no longer in the sweep" if state.run.signature in left else ""
            context.say(f"would cancel {state.run.label} ({state.state}{where})")
        return 0
    cancelled = {state.run.signature for state in live}
    others = [state for state in states if state.state in LIVE and state.run.signature not in cancelled]
    requested = _request(context.root, live, now=context.options.now)
    withdrawn, running = requested.withdrawn, requested.running
    killed = []
    if context.options.now:  # where others train in the same process, it goes on, and what is cancelled ends with a checkpoint
        spared = {_task_of(state) for state in others}
        killed = [state for state in running if (task := _task_of(state)) is not None and task not in spared]
    parts = [f"{len(withdrawn)} cancelled while they waited"]
    if killed:
        parts.append(f"{len(killed)} killed")
    if len(killed) < len(running) or not killed:
        parts.append(f"{len(running) - len(killed)} asked to stop at their next step, with a checkpoint")
    context.say(", ".join(parts))
    needed = {state.job_id for state in [*others, *running] if not state.cluster}
    unwritten = [state for state, _ in requested.unwritten]
    needed |= jobs_needed_by_others(context.root, [*withdrawn, *unwritten])
    jobs = {
        state.job.id: state.job for state in [*withdrawn, *unwritten] if state.job is not None and state.job.id not in needed
    }
    refusal = _end(context, jobs.values(), needed_for=unwritten)  # those of the withdrawn would find nothing to do
    if withdrawn and context.unanswered:
        context.say("jobs of theirs that SLURM may still have in its queue will find nothing to do, and end by themselves")
    for cluster in dict.fromkeys(state.cluster for state in running if state.cluster):
        context.say(f"jobs in the SLURM cluster {cluster} cannot be reached from here; they stop when they see the request")
    if requested.unwritten:
        ended = [] if refusal else [state for state in unwritten if state.job is not None and state.job.id in jobs]
        raise SweepError(_unwritten_line(requested.unwritten, ended, refusal))
    return 0


def _request(root: Path, live: Sequence[RunState], *, now: bool) -> Requested:
    """Withdraw what waits and ask the rest to stop. Pending claims first, so that free slots find nothing to start."""
    waiting = [state for state in live if state.state != "running"]
    running = [state for state in live if state.state == "running"]
    with ThreadPoolExecutor(WRITERS) as pool:
        begun = list(zip(waiting, pool.map(partial(_result_or_error, partial(_withdraw, root)), waiting), strict=True))
        running += [replace(state, attempt=its) for state, its in begun if isinstance(its, AttemptDir)]
        ask = partial(_result_or_error, partial(_ask_to_stop, root, now))
        asked = list(zip(running, pool.map(ask, running), strict=True))  # at once, for groups to stay in step
    return Requested(
        withdrawn=[state for state, its in begun if its is None],
        running=[state for state, its in asked if its is None],
        unwritten=[(state, its) for state, its in [*begun, *asked] if isinstance(its, OSError)],
    )


def _result_or_error(act: Callable[[RunState], AttemptDir | None], state: RunState) -> AttemptDir | OSError | None:
    """What `act` returns, or the error for which it cannot write, so that the other runs have their turn."""
    try:
        return act(state)
    except OSError as error:
        return error


def _end(context: Context, jobs: Iterable[SlurmJob], *, needed_for: Sequence[RunState]) -> str:
    """Have SLURM end jobs; its refusal if it is `needed_for` runs of which more is to be said, else that is raised."""
    try:
        context.scheduler.cancel(jobs)
    except SchedulerError as error:
        if not needed_for:
            raise
        return str(error)
    return ""


def _unwritten_line(unwritten: Sequence[tuple[RunState, OSError]], ended: Sequence[RunState], refusal: str) -> str:
    """What follows where the cancellation could not be written: which runs SLURM ends all the same, which go on."""
    first = unwritten[0][1]
    parts = [f"{first.filename}: {first.strerror}; {len(unwritten)} could not be asked to stop"]
    if ended:
        labels = status.first_of([state.run.label for state in ended], 3)
        parts.append(
            f"SLURM ends {len(ended)} of them ({labels}), which may lose what they trained since their last checkpoint, and "
            "which submit starts again, since no record says that they are cancelled"
        )
    signatures = {state.run.signature for state in ended}
    rest = [state.run.label for state, _ in unwritten if state.run.signature not in signatures]
    if rest:
        why = f" ({refusal})" if refusal else ""
        parts.append(f"{len(rest)} {'go' if rest[1:] else 'goes'} on{why}: {status.first_of(rest, 3)}")
        parts.append(f"{MAKE_ROOM.get(first.errno or 0, 'see to that')}, then cancel again")
    return "; ".join(parts)


def _looked_at_twice(context: Context, states: list[RunState]) -> list[RunState]:
    """The states, newer ones of runs that have been started and whose jobs wait.

    Such a job waits to go on with its run, or has started it between SLURM's answer and the reading of the run's records.
    """
    again = [state.run for state in states if state.state == "pending" and state.started]
    newer = {state.run.signature: state for state in context.states_of(again)} if again else {}
    return [newer.get(state.run.signature, state) for state in states]


def _say_shared(context: Context, live: list[RunState]) -> None:
    """Name the other sweeps for which these runs will be cancelled, too."""
    label_of = {state.run.signature: state.run.label for state in live}
    verb = "would be" if context.options.dry_run else "is"
    for name, shared in sweeps_with(context.root, label_of, besides=context.sweep.name).items():
        labels = [label_of[signature] for signature in label_of if signature in shared]
        context.say(
            f"sweep {name} has {len(labels)} of these runs, too ({status.first_of(labels, 3)}): what is cancelled here "
            f"{verb} cancelled for it as well; `vitpa sweep retry {context.suffix_of(name)}` starts it again"
        )


def _ask_to_stop(root: Path, now: bool, state: RunState) -> None:
    assert state.attempt is not None
    request = Stop(reason=CANCEL, attempt=state.attempt.number, now=now, utc=utc_now())
    write_json(state.run.directory(root).stop, request.model_dump())


def _withdraw(root: Path, state: RunState) -> AttemptDir | None:
    """Take a run that is not in training out of circulation; the attempt that has been started in this moment, if one has."""
    assert state.attempt is not None, "what is live has an attempt"
    if not state.started:
        return None if withdraw(state.attempt, "cancelled", "cancelled before it started") else state.attempt
    run, number = state.run.directory(root), state.attempts + 1  # SLURM would have started it again
    claim = read_record(Claim, state.attempt.claim_json)
    following = run.claim_attempt(number, claim.again()) if claim else None
    if following is not None and withdraw(following, "cancelled", "cancelled while it waited to go on"):
        return None
    return run.attempt(number)


def _task_of(state: RunState) -> tuple[str, str] | None:
    """The task of a submission that has the run, and so can kill its training; `vitpa train` only stops by itself."""
    assert state.attempt is not None
    try:
        claim = read_record(Claim, state.attempt.claim_json)
    except RunError:
        return None
    return (claim.submission, str(claim.index)) if claim and claim.submission else None

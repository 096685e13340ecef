"""Ending runs of a sweep: what waits is withdrawn, what trains is asked to stop, other sweeps with the same runs are named."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from jobs.context import Context, select
from jobs.membership import jobs_needed_by_others, sweeps_with
from jobs.records import Claim
from jobs.report import status
from jobs.state import LIVE, RunState, withdraw
from jobs.submit.submission import WRITERS
from vitpa.attempt import CANCEL, Stop
from vitpa.records import RunError, read_record, utc_now, write_json
from vitpa.rundir import AttemptDir


def cancel(context: Context) -> int:
    """What `vitpa sweep cancel` does; exit code 0. Pending claims first, so that free slots find nothing to start."""
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
    waiting = [state for state in live if state.state != "running"]
    with ThreadPoolExecutor(WRITERS) as pool:
        begun = list(pool.map(partial(_withdraw, context.root), waiting))
        withdrawn = [state for state, attempt in zip(waiting, begun, strict=True) if attempt is None]
        running = [state for state in live if state.state == "running"]
        running += [replace(state, attempt=attempt) for state, attempt in zip(waiting, begun, strict=True) if attempt]
        list(
            pool.map(partial(_ask_to_stop, context.root, context.options.now), running)
        )  # at once, for groups to stay in step
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
    needed |= jobs_needed_by_others(context.root, withdrawn)
    jobs = {state.job.id: state.job for state in withdrawn if state.job is not None and state.job.id not in needed}
    context.scheduler.cancel(jobs.values())  # they would find nothing to do
    if withdrawn and context.unanswered:
        context.say("jobs of theirs that SLURM may still have in its queue will find nothing to do, and end by themselves")
    for cluster in dict.fromkeys(state.cluster for state in running if state.cluster):
        context.say(f"jobs in the SLURM cluster {cluster} cannot be reached from here; they stop when they see the request")
    return 0


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

"""What each verb of `vitpa sweep` does: load, select by filter, look, act, print, exit code."""

from __future__ import annotations

import argparse
import gc
import logging
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cancel import cancel
from jobs.context import Context, load_context
from jobs.errors import SweepError
from jobs.execute.slots import visible_gpus
from jobs.failures import without_particulars
from jobs.notify.outbox import configure
from jobs.plan.speeds import Benchmark, load_benchmark
from jobs.profile import LocalProfile, SlurmProfile, load_profile
from jobs.report import logs, status
from jobs.report import search as search_report
from jobs.report.collect_command import print_collected
from jobs.report.frame import frame
from jobs.report.goodput import Goodput
from jobs.rounds import begin, search
from jobs.scheduler.client import Scheduler, SchedulerError
from jobs.standing import Standing, trial_number
from jobs.state import LIVE, MAX_EARLY_ENDS, RETRYABLE, SUBMITTABLE, RunState, early_ends, fails_alike
from jobs.submit.snapshot import make_snapshot
from jobs.submit.submission import settle
from jobs.submit.submit import SubmissionPlan, check_data, prepare, submit
from jobs.sweep import SweepDir
from jobs.watch.command import watch, watch_table
from vitpa.errors import run_command
from vitpa.terminal import printable

if TYPE_CHECKING:
    from jobs.plan.plan_report import PlanReport

LOGGER = logging.getLogger(__name__)
OK, ERROR, UNREACHABLE, PARTIAL, INTERRUPTED = 0, 1, 3, 4, 130
GC_THRESHOLD = 200_000  # new objects; at the usual 700 the million of a large sweep, which stay, are looked at again and again


def run_verb(options: argparse.Namespace) -> int:
    """Run `vitpa sweep VERB`; the exit code. A user's error becomes one line."""
    gc.set_threshold(GC_THRESHOLD)

    def run() -> int:
        context = load_context(options)
        code = VERBS[options.verb](context)
        return UNREACHABLE if context.unanswered and code in (OK, PARTIAL) else code

    return run_command("vitpa sweep", run, interrupted="interrupted; the same command again goes on from here")


def _plan(context: Context) -> int:
    """What submit would do; with SLURM also what its limits say to that. Exit code 1 if it would be refused."""
    from jobs.plan.plan_report import EMPTY_REPORT  # noqa: PLC0415 - brings submitit, which no other verb has to wait for

    benchmark = load_benchmark(Path(context.options.speeds)) if context.options.speeds else None
    states, left = context.look_around()
    standing = Standing.now(context.sweep, context.states_of, context.root)
    waiting = None if standing is None else {state.run.signature for state in standing.waiting}
    missing = _to_submit(context, [state for state in states if waiting is None or state.run.signature in waiting])
    problems, plan, report = [], SubmissionPlan([], None), EMPTY_REPORT
    try:
        plan, report = _look_ahead(context, states, missing, benchmark)
        check_data(plan)
    except SweepError as error:
        problems = [str(error)]
    problem = "; ".join([*problems, *report.refusals])
    code = ERROR if missing and problem else OK
    rows = [status.row_of(state, context.root) for state in states]
    if context.options.json:
        document = {"sweep": context.sweep.name, "runs": rows, "missing": len(missing), "problem": problem}
        document |= {"jobs": len(plan.groups), "slots": plan.at_a_time}
        document |= {"search": search_report.as_json(standing)} if standing is not None else {}
        document["no_longer_in_sweep"] = [status.row_of(state, context.root) for state in left]
        context.say_json({**document, "changed": context.drift.describe(), **report.as_json()})
        return code
    context.console.print(status.table_of(rows, f"{context.sweep.name}: {status.summary(states)}"))
    said = [context.drift.describe(), *status.held_out(states), *status.ran_other_code(context.root, states)]
    for line in filter(None, [*said, *report.lines()]):
        context.say(line)
    if context.sweep.search is not None and context.sweep.ledger is not None:
        context.say(search_report.plan_line(context.sweep.search, context.sweep.ledger))
    _say_left(context, left)
    if context.options.gpu_hour_price and not report.forecast.cost:
        context.say("--gpu-hour-price is not used: there is no forecast of GPU-hours")
    if missing and problem:
        context.say(f"cannot be submitted yet: {problem}")
    elif missing:
        context.say(f"submit would start {_count(missing)}{plan.jobs}")
    _say_left_alone(context, states)
    return code


def _look_ahead(
    context: Context, states: list[RunState], missing: list[RunState], benchmark: Benchmark | None
) -> tuple[SubmissionPlan, PlanReport]:
    """The plan for `missing` and what lies ahead of it; where SLURM does not answer, as far as that can be said without.

    With a benchmark, a machine without GPUs is taken to have the GPUs of a job, so that a plan is possible anywhere.
    """
    from jobs.plan.plan_report import look_ahead  # noqa: PLC0415 - as above

    profile = load_profile(context.place.profile)
    gpus, notes = None, []
    if benchmark is not None and isinstance(profile, LocalProfile) and not visible_gpus():
        gpus = [str(index) for index in range(profile.gpus_per_run * (1 if profile.slots == "auto" else profile.slots))]
        notes = [f"no GPU is visible here: planned as if there were {len(gpus)} x {benchmark.gpu}"]

    def look(scheduler: Scheduler | None) -> tuple[SubmissionPlan, PlanReport]:
        plan = prepare(missing, profile, context.root, context.overrides, scheduler, gpus=gpus)
        plan = replace(plan, notes=[*plan.notes, *notes])
        price = context.options.gpu_hour_price
        return plan, look_ahead(
            plan, states, context.root, context.sweep.name, scheduler, benchmark=benchmark, gpu_hour_price=price
        )

    try:
        return look(context.scheduler)
    except SchedulerError as error:
        LOGGER.warning(str(error))
        context.unanswered.append(str(error))
        return look(None)


def _submit(context: Context) -> int:
    left = [state for state in context.states_of(context.left) if state.state in LIVE] if context.left else []
    if context.drift.gone and not context.options.update:
        live = f"; {len(left)} of these runs are still in progress and would go on" if left else ""
        raise SweepError(
            f"{context.drift.describe()}{live}. Undo the change in the sweep's file or recipe, repeat with --update "
            "to make the changed sweep the sweep, or give it another name with --name"
        )
    if context.drift.gone or context.drift.renamed or (context.drift.added and context.sweep.search is None):
        context.say_changed()
    if context.options.give_up and context.sweep.search is None:
        raise SweepError(f"--give-up: {context.sweep.name} is no search; its other runs do not wait for those that failed")
    _say_left(context, left)
    _settle(context)
    if context.sweep.search is not None:
        return search(context, lambda now, states, missing: _start(now, states, _to_submit(now, missing)))
    states = context.look()
    return _start(context, states, _to_submit(context, states))


def _to_submit(context: Context, states: list[RunState]) -> list[RunState]:
    """What `submit` starts: not those whose jobs end again and again before they start them."""
    chosen = [state for state in states if state.state in SUBMITTABLE or state.ended_early]
    in_vain = [state for state in chosen if early_ends(state, context.root) >= MAX_EARLY_ENDS]
    reasons: dict[str, list[RunState]] = {}
    for state in in_vain:
        reasons.setdefault(without_particulars(state.reason), []).append(state)
    for first, *others in [] if getattr(context.options, "json", False) else reasons.values():
        more = f" and {len(others)} more are" if others else " is"
        context.say(
            f"{first.run.label}{more} left alone: {MAX_EARLY_ENDS} jobs in a row ended too early ({printable(first.reason)}); "
            f"fix that, then: vitpa sweep retry {context.start_suffix} --force"
        )
    left_alone = {state.run.signature for state in in_vain}
    return [state for state in chosen if state.run.signature not in left_alone]


def _settle(context: Context) -> None:
    """What a killed launcher has left comes first: a job that SLURM has already is not to be submitted again."""
    if not context.options.dry_run:
        for line in settle(context.root, context.scheduler):
            context.say(line)


def _retry(context: Context) -> int:
    force = context.options.force
    context.say_changed()  # it starts runs as they were submitted
    _settle(context)
    states = context.look()
    chosen = [state for state in states if state.state in RETRYABLE or state.ended_early or (force and state.unseen)]
    given_up = set() if force else context.given_up
    if unused := [state.run.label for state in chosen if state.run.signature in given_up]:
        context.say(f"{status.first_of(unused, 3)}: left alone, since the search has given up the trial and would not use it")
    chosen = [state for state in chosen if state.run.signature not in given_up]
    hopeless = [] if force else [state for state in chosen if fails_alike(state, context.root)]
    for state in hopeless:
        how = f"got {MAX_EARLY_ENDS} jobs in vain" if state.ended_early else "failed twice in the same way"
        context.say(f"{state.run.label} is left alone: it {how} ({printable(state.reason)}); fix that, then --force")
    left_alone = {state.run.signature for state in hopeless}
    chosen = [state for state in chosen if state.run.signature not in left_alone]
    if not chosen:
        context.say(f"nothing to retry: {status.summary(states)}")
        return PARTIAL if hopeless else OK
    return max(_start(context, states, chosen), PARTIAL if hopeless else OK)


def _start(context: Context, looked_at: list[RunState], chosen: list[RunState]) -> int:
    """Submit `chosen`, show all that was looked at if asked to, and say what to type next."""
    profile = load_profile(context.place.profile)
    plan = prepare(chosen, profile, context.root, context.overrides, context.scheduler)
    check_data(plan)
    for line in plan.notes:
        context.say(line)
    _check_limits(context, looked_at, plan)
    if context.options.dry_run:
        context.say(f"would start {_count(chosen)}{plan.jobs}")
        for group in plan.groups:
            context.say("  " + " + ".join(f"{state.run.label} ({state.state})" for state in group))
        return OK
    if context.sweep.search is not None:
        begin(context.sweep)
    directory = SweepDir(context.root, context.sweep.name)
    if context.options.verb == "submit" or directory.recorded() is None:  # retry of what `vitpa train` has left
        directory.record(context.sweep)
    configure(context.root, context.sweep.name, profile.notify, looked_at)
    if chosen:
        code = make_snapshot(context.root) if context.options.code == "snapshot" else None
        plan = replace(plan, place=context.place)
        claimed, refused = submit(context.sweep.name, plan, context.root, context.scheduler, code)
        for line in status.by_text(refused.items()):
            context.say(f"not submitted: {line}")
        late = len(chosen) - len(claimed) - len(refused)
        faster = f"; {late} were claimed by another submit first" if late else ""
        where = (
            "to SLURM" if isinstance(profile, SlurmProfile) else "on this machine"
        ) + f" (profile {context.place.profile})"
        context.say(f"submitted {len(claimed)} of {len(context.sweep.runs)} runs {where}{plan.jobs}{faster}")
    else:
        context.say("nothing to submit")
    runs = [state.run for state in looked_at]
    try:
        states = watch_table(context, runs) if context.options.wait else context.states_of(runs)
    except KeyboardInterrupt:
        context.say(f"left; the runs go on. To stop them: vitpa sweep cancel {context.suffix}")
        return INTERRUPTED
    context.say(f"{context.sweep.name}: {status.summary(states)}")
    for line in status.stuck(states):
        context.say(line)
    _say_left_alone(context, states)
    if not (context.options.wait and context.sweep.search is not None):  # it goes on by itself
        _say_next(context)
    return OK if _is_well(context, states, set() if context.options.wait else LIVE) else PARTIAL


def _is_well(context: Context, states: list[RunState], live: Set[str] = LIVE) -> bool:
    """Whether all runs are done, `live`, or, of a search, where they have to be for now."""
    ledger = context.sweep.ledger
    if ledger is None:
        return all(state.state in {"done", *live} for state in states)
    in_training = {trial.number for trial in ledger.trials if trial.in_training}
    fine = {"done", "paused", *live}
    return all(state.state in fine or trial_number(state.run) not in in_training for state in states)


def _check_limits(context: Context, states: list[RunState], plan: SubmissionPlan) -> None:
    """Say what makes runs wait in SLURM.

    Raises:
        SweepError: SLURM would refuse them, or never start them, and nobody says --force.
    """
    from jobs.plan.plan_report import look_ahead  # noqa: PLC0415 - as above

    if not plan.batches or plan.batches[0].how["executor"] != "slurm":
        return
    report = look_ahead(plan, states, context.root, context.sweep.name, context.scheduler)
    for line in report.warnings:
        context.say(line)
    problem = "; ".join(report.refusals)
    if problem and context.options.force:
        context.say(f"warning: {problem}")
    elif problem:
        raise SweepError(f"{problem}; to try it all the same: --force")


def _count(runs: Sequence[object]) -> str:
    return f"{len(runs)} run{'' if len(runs) == 1 else 's'}"


def _say_left_alone(context: Context, states: list[RunState]) -> None:
    given_up = context.given_up
    left_alone = [
        state
        for state in states
        if state.run.signature not in given_up and early_ends(state, context.root) not in range(1, MAX_EARLY_ENDS)
    ]
    counts = Counter(state.state for state in left_alone if state.state in RETRYABLE)
    for state, count in sorted(counts.items()):
        context.say(
            f"{count} {state}, not touched by submit; to run again: vitpa sweep retry {context.start_suffix} state={state}"
        )


def _say_next(context: Context) -> None:
    context.say("next:")
    context.say(f"  vitpa sweep status {context.suffix} --watch")
    context.say(f"  vitpa sweep collect {context.suffix}")
    context.say(f"  vitpa sweep tensorboard {context.suffix}")


def _say_left(context: Context, left: list[RunState]) -> None:
    if left:
        some = [f"{state.run.label} ({state.state}{f' in job {state.job_id}' if state.job_id else ''})" for state in left]
        context.say(
            f"{len(left)} no longer in the sweep, still in progress: {status.first_of(some, 3)}; they go on, "
            f"`vitpa sweep cancel {context.suffix} --gone` ends them"
        )


def _status(context: Context) -> int:
    states, left = context.look_around()
    standing = None if context.options.watch else Standing.now(context.sweep, context.states_of, context.root)
    if context.options.watch:
        context.say_changed()
        _say_left(context, left)
        runs = [state.run for state in states]
        try:
            states = watch_table(context, runs, follow=True)
        except KeyboardInterrupt:
            return OK
    elif context.options.json:
        rows, rows_left = ([_row_with_goodput(context, state) for state in some] for some in (states, left))
        total = Goodput.of_runs(states, context.root)
        goodput = None if total is None else total.as_json()
        document = {"sweep": context.sweep.name, "goodput": goodput, "runs": rows, "no_longer_in_sweep": rows_left}
        document["changed"] = context.drift.describe()
        context.say_json(document | ({"search": search_report.as_json(standing)} if standing else {}))
    else:
        rows = [status.row_of(state, context.root) for state in states]
        context.console.print(status.table_of(rows, f"{context.sweep.name}: {status.summary(states)}"))
        context.say_changed()
        for line in [*status.held_out(states), *status.ran_other_code(context.root, states)]:
            context.say(line)
        for line in search_report.lines(standing):
            context.say(line)
        if left:
            rows = [status.row_of(state, context.root) for state in left]
            context.console.print(status.table_of(rows, f"no longer in the sweep, still in progress: {len(left)}"))
            context.say(f"to end them: vitpa sweep cancel {context.suffix} --gone")
        _say_left_alone(context, states)
    return OK if _is_well(context, states) else PARTIAL


def _row_with_goodput(context: Context, state: RunState) -> dict[str, Any]:
    goodput = Goodput.of_runs([state], context.root)
    return {**status.row_of(state, context.root), "goodput": None if goodput is None else goodput.as_json()}


def _logs(context: Context) -> int:
    states, left = context.look_around()
    states += left
    if context.options.follow:
        try:
            logs.follow([state.run for state in states], context.root, context.console)
        except KeyboardInterrupt:
            return OK
    elif context.options.failed:
        logs.show_failures(states, context.options.lines, context.console)
    else:
        logs.show(states, context.options.lines, context.console)
    return OK


def _collect(context: Context) -> int:
    return OK if print_collected(context) else PARTIAL


def _tensorboard(context: Context) -> int:
    from jobs.report.tensorboard import show  # noqa: PLC0415 - brings tensorboard, which no other verb has to wait for

    return show(context)


def _watch(context: Context) -> int:
    try:
        states = watch(context)
    except KeyboardInterrupt:
        return OK
    return OK if _is_well(context, states) else PARTIAL


def _report(context: Context) -> int:
    from jobs.report.document.command import report  # noqa: PLC0415 - jinja2 and numpy, which no other verb has to wait for

    return OK if report(context) else PARTIAL


VERBS: dict[str, Callable[[Context], int]] = {
    "plan": _plan,
    "submit": _submit,
    "status": _status,
    "logs": _logs,
    "cancel": cancel,
    "retry": _retry,
    "collect": _collect,
    "frame": frame,
    "tensorboard": _tensorboard,
    "watch": _watch,
    "report": _report,
}

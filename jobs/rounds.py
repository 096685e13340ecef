"""What `submit` does for a search: round after round, until the budget is used up.

A round is over when each of its trials has the scores of all its runs, or is given up. Then the next one is written into the
ledger, and its runs are submitted like any. Between the two nothing is remembered: whoever is killed goes on by `submit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jobs.context import Context, select
from jobs.errors import SweepError
from jobs.report import search as report
from jobs.search.ledger import Ledger, Round
from jobs.standing import Standing
from jobs.state import SUBMITTABLE, RunState
from jobs.sweep import Sweep, SweepDir, with_ledger
from vitpa.terminal import printable

PARTIAL = 4  # exit code: runs failed, or are missing
STARTS = 3  # of the same round by one `submit --wait`: what ends without having come to its epoch is started again

Start = Callable[[Context, list[RunState], list[RunState]], int]


def search(context: Context, start: Start) -> int:
    """Submit what the present round needs, and with --wait go on to the last; the exit code of `start`, or 4 if runs failed.

    Args:
        context: Of the search.
        start: Submits runs: the context, all the states that were looked at, those of the runs to be started.

    Raises:
        SweepError: the user says where runs pause, or the next round cannot be decided.
        RunError: a record of a run or of the ledger cannot be used.
    """
    for override in context.overrides:
        if override.key == "runtime.stop_after_epoch":
            raise SweepError(f"{override.text}: where runs pause is for search.halving to say; leave it out")
    starts = 0
    while True:
        states = context.states_of(context.sweep.runs)
        standing = Standing.of(context.sweep, states, context.root)
        given_up = dict(standing.failed) if context.options.give_up else standing.hopeless
        if not standing.waiting and standing.failed.keys() == given_up.keys():
            following = standing.next_round(given_up)
            if standing.ledger.over and not following.trials:
                return _say_end(context, standing)
            context, starts = _go_on(context, standing, following), 0
            continue
        missing = [state for state in standing.waiting if state.state in SUBMITTABLE or state.ended_early]
        if starts and (not missing or starts == STARTS):
            return _say_stuck(context, standing)
        code = start(context, select(states, context.filters), select(missing, context.filters))
        starts += 1
        if not context.options.wait or context.options.dry_run or code not in (0, PARTIAL):
            return code


def begin(sweep: Sweep) -> None:
    """Write the first round of a search into its ledger, if there is none.

    Raises:
        SweepError: another launcher has begun it at the same time, and otherwise.
    """
    assert sweep.ledger is not None
    folder, first = sweep.ledger.folder, sweep.ledger.rounds[0]
    if Ledger(folder).append(first).rounds[0] != first:
        raise SweepError(f"{folder}: another submit has just begun this search with other settings; submit again")


def _go_on(context: Context, standing: Standing, following: Round) -> Context:
    """The search with a round more, unless nothing is to be done: then as it would be."""
    ledger = standing.ledger
    dry = context.options.dry_run
    if not dry:  # of a round whose runs had their results already nothing was started
        begin(context.sweep)
        SweepDir(context.root, context.sweep.name).record(context.sweep)
    ledger = replace(ledger, rounds=[*ledger.rounds, following]) if dry else ledger.append(following)
    for number, reason in ledger.rounds[-1].out.items():
        context.say(f"{ledger.trials[int(number)].label} is given up: {printable(reason)}")
    context.say(report.round_line(ledger))
    return replace(context, sweep=with_ledger(context.sweep, ledger))


def _say_end(context: Context, standing: Standing) -> int:
    for line in [
        *report.lines(standing),
        *report.best_trials(standing),
        *report.advice(context.sweep, standing, context.root, context.place),
    ]:
        context.say(line)
    return 0


def _say_stuck(context: Context, standing: Standing) -> int:
    for line in report.lines(standing):
        context.say(line)
    if standing.failed:
        labels = ", ".join(standing.trials[number].label for number in standing.failed)
        context.say(
            f"runs of {labels} failed or were cancelled, and the search waits: vitpa sweep retry {context.start_suffix}; "
            f"or go on without: vitpa sweep submit {context.start_suffix} --give-up"
        )
    return PARTIAL

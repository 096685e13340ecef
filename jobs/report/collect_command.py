"""`vitpa sweep collect SWEEP`: collect, print the table, write it; the report of a sweep collects in the same way."""

from __future__ import annotations

from pathlib import Path

from jobs.context import Context
from jobs.errors import SweepError
from jobs.report.collect import CollectedTable, MixedRunsError, collect
from jobs.report.tables import markdown, set_report_aside, write_report
from jobs.standing import trial_number
from jobs.state import RunState
from jobs.sweep import SweepDir


def print_collected(context: Context) -> bool:
    """Print the table of the runs that the filters select, and write that of a whole sweep; whether all runs are in it.

    Raises:
        SweepError: runs of different code or data, or an axis that the sweep has not.
        OSError: it cannot be written; it has been printed.
    """
    states, options = context.look(), context.options
    whole = len(states) == len(context.sweep.runs)
    folder = SweepDir(context.root, context.sweep.name).report
    table = collected(context, trained_to_the_end(context, states), folder if whole else None, compare=options.compare)
    if options.json:
        context.say_json(table.as_json())
    else:
        context.say(markdown(table))
    if whole:
        write_report(table, folder)  # of somebody else's sweep the table is printed all the same
    if not options.json:
        context.say(f"written to {folder}" if whole else "a filtered table is not written to files")
    return table.complete


def trained_to_the_end(context: Context, states: list[RunState]) -> list[RunState]:
    """The runs that belong in a table: of a search those of trials that are to be trained to the end; else all.

    Other trials were stopped on purpose. Of such a trial some run must have a result; then all count, also missing ones.
    """
    search, ledger = context.sweep.search, context.sweep.ledger
    if search is None or ledger is None:
        return states
    to_the_end = {trial.number for trial in ledger.trials if trial.epochs == search.most_epochs}
    with_result = {trial_number(state.run) for state in states if state.result is not None}
    return [state for state in states if trial_number(state.run) in to_the_end & with_result] or states


def collected(context: Context, states: list[RunState], folder: Path | None, *, compare: str | None) -> CollectedTable:
    """What `collect` says of these runs; if it refuses, a report that stands in `folder` is set aside.

    Raises:
        SweepError: it refuses.
    """
    options = context.options
    try:
        return collect(
            context.sweep,
            states,
            context.root,
            allow_mixed=options.allow_mixed,
            compare=compare,
            pivot=options.pivot and tuple(options.pivot),
            changed=context.drift.describe(),
        )
    except MixedRunsError as error:
        older = set_report_aside(folder) if folder else None
        raise SweepError(f"{error}; the report that was there is in {older} now" if older else str(error)) from error

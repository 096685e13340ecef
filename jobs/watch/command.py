"""`vitpa sweep watch`: the screen on a terminal; elsewhere what `vitpa sweep status --watch` prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.context import Context
from jobs.report import search as search_report
from jobs.report import status
from jobs.standing import Standing
from jobs.state import RunState, StateReader
from jobs.sweep import Run
from jobs.watch.look import Look
from vitpa.errors import UserError

if TYPE_CHECKING:
    from jobs.watch.app import WatchApp


def watch(context: Context) -> list[RunState]:
    """Watch the runs that the filters select, until the user leaves; without a terminal until nothing is in progress.

    Returns the states then.
    """
    runs = [state.run for state in context.look()]
    if not (context.console.is_terminal and sys.stdin is not None and sys.stdin.isatty()):
        return watch_table(context, runs)
    screen_of(context).run()
    return context.states_of(runs)


def watch_table(context: Context, runs: list[Run]) -> list[RunState]:
    """Show the table of these runs, with what `status` says about a search, until none is in progress; the states then."""

    def more(reader: StateReader) -> list[str]:
        return _search_lines(context, reader)

    return status.watch(runs, context.root, context.sweep.name, context.console, tell=context.tell, more=more)


def _search_lines(context: Context, reader: StateReader) -> list[str]:
    """What `status` says about a search, or why that cannot be said: the runs go on, and so does watching them."""
    try:
        return search_report.lines(Standing.now(context.sweep, reader.states, context.root))
    except UserError as error:
        return [str(error)]


def screen_of(context: Context) -> WatchApp:
    """The screen for the runs that the filters select as they are now."""
    from jobs.watch.app import WatchApp  # noqa: PLC0415 - brings textual, which no other verb has to wait for

    runs = [state.run for state in context.look()]

    def look() -> Look:
        reader = StateReader(context.root, context.scheduler)
        states = reader.states(runs)
        if not reader.scheduler_error:
            context.tell(states)
        rows = [status.row_of(state, context.root) for state in states]
        return Look(rows, reader.scheduler_error, status.pause_s(reader), _search_lines(context, reader))

    def command(verb: str, terms: Sequence[str]) -> list[str]:
        options = context.options
        return [sys.executable, "-m", "vitpa.cli", "sweep", verb, options.sweep, "--root", options.root, *terms]

    return WatchApp(context.sweep.name, context.root, look, command)

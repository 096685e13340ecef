"""`vitpa sweep watch`: the screen on a terminal; elsewhere what `vitpa sweep status --watch` prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from jobs.context import Context, select
from jobs.report import search as search_report
from jobs.report import status
from jobs.standing import Standing
from jobs.state import RunState, StateReader
from jobs.sweep import Run, with_newest_rounds
from jobs.watch.look import Look
from vitpa.errors import UserError

if TYPE_CHECKING:
    from jobs.watch.app import WatchApp


BETWEEN_ROUNDS_S = 30.0  # of a search: `submit --wait` decides the next round and submits it in less


class WatchedRuns:
    """Runs that are looked at again and again."""

    def __init__(self, runs: list[Run], search: Context | None = None) -> None:
        """`search`: of the command line, if the runs of a search's later rounds are to join as they begin."""
        self._runs, self._search = runs, search
        self._sweep = None if search is None else search.sweep

    def states(self, reader: StateReader) -> list[RunState]:
        """Those of the moment."""
        with suppress(UserError):  # of the ledger: the lines about the search say it
            self._take_in(reader)
        return reader.states(self._runs)

    def _take_in(self, reader: StateReader) -> None:
        """Runs of rounds that have begun since the last look, as far as the filters select them."""
        if self._search is None or self._sweep is None:
            return
        newest = with_newest_rounds(self._sweep)
        if newest is self._sweep:
            return
        old = {run.signature for run in self._sweep.runs}
        added = select(reader.states(run for run in newest.runs if run.signature not in old), self._search.filters)
        wanted = {run.signature for run in self._runs} | {state.run.signature for state in added}
        self._runs = [run for run in newest.runs if run.signature in wanted]  # those of before may go on to another epoch
        self._sweep = newest

    def patience_s(self) -> float:
        """How long to wait, when the last run has ended, for others to join."""
        ledger = None if self._sweep is None else self._sweep.ledger
        return 0.0 if ledger is None or ledger.over else BETWEEN_ROUNDS_S


def watch(context: Context) -> list[RunState]:
    """Watch the runs that the filters select, until the user leaves; without a terminal until nothing is in progress.

    Returns the states then.
    """
    runs = [state.run for state in context.look()]
    if not (context.console.is_terminal and sys.stdin is not None and sys.stdin.isatty()):
        return watch_table(context, runs, follow=True)
    screen_of(context).run()
    return context.states_of(runs)


def watch_table(context: Context, runs: list[Run], *, follow: bool = False) -> list[RunState]:
    """Show the table of these runs, with what `status` says about a search, until none is in progress; the states then.

    With `follow`, runs of a search's later rounds join as they begin.
    """
    watched = WatchedRuns(runs, context if follow else None)

    def more(reader: StateReader) -> list[str]:
        return _search_lines(context, reader)

    return status.watch(watched, context.root, context.sweep.name, context.console, tell=context.tell, more=more)


def _search_lines(context: Context, reader: StateReader) -> list[str]:
    """What `status` says about a search, or why that cannot be said: the runs go on, and so does watching them."""
    try:
        return search_report.lines(Standing.now(context.sweep, reader.states, context.root))
    except UserError as error:
        return [str(error)]


def screen_of(context: Context) -> WatchApp:
    """The screen for the runs that the filters select as they are now."""
    from jobs.watch.app import WatchApp  # noqa: PLC0415 - brings textual, which no other verb has to wait for

    watched = WatchedRuns([state.run for state in context.look()], context)

    def look() -> Look:
        reader = StateReader(context.root, context.scheduler)
        states = watched.states(reader)
        if not reader.scheduler_error:
            context.tell(states)
        rows = [status.row_of(state, context.root) for state in states]
        return Look(rows, reader.scheduler_error, status.pause_s(reader), _search_lines(context, reader))

    def command(verb: str, terms: Sequence[str]) -> list[str]:
        options = context.options
        return [sys.executable, "-m", "vitpa.cli", "sweep", verb, options.sweep, "--root", options.root, *terms]

    return WatchApp(context.sweep.name, context.root, look, command)

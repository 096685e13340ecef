"""`vitpa sweep watch`: the screen on a terminal; elsewhere what `vitpa sweep status --watch` prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.context import Context
from jobs.report import status
from jobs.state import RunState, StateReader
from jobs.watch.look import Look

if TYPE_CHECKING:
    from jobs.watch.app import WatchApp


def watch(context: Context) -> list[RunState]:
    """Watch the runs that the filters select, until the user leaves; without a terminal until nothing is in progress.

    Returns the states then.
    """
    runs = [state.run for state in context.look()]
    if not (context.console.is_terminal and sys.stdin is not None and sys.stdin.isatty()):
        return status.watch(runs, context.root, context.sweep.name, context.console, context.tell)
    screen_of(context).run()
    return context.states_of(runs)


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
        return Look(rows, reader.scheduler_error, status.pause_s(reader))

    def command(verb: str, terms: Sequence[str]) -> list[str]:
        options = context.options
        return [sys.executable, "-m", "vitpa.cli", "sweep", verb, options.sweep, "--root", options.root, *terms]

    return WatchApp(context.sweep.name, context.root, look, command)

"""What there is to tell about the runs of a sweep, as far as their records say it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.failures import cause_of, essence
from jobs.notify.config import Kind
from jobs.state import MAX_EARLY_ENDS, RunState, early_ends
from vitpa.documents import lines_at_end
from vitpa.records import RunError, read_json
from vitpa.statistics import Estimate

GIVEN_UP = "given up"  # as jobs/execute/requeue.py says it
LINES, CHARACTERS = 10, 1200  # of a log


@dataclass(frozen=True)
class Event:
    """Something that is told once: `key` says what."""

    kind: Kind
    key: str
    text: str


def events_of(sweep: str, states: Iterable[RunState], root: Path) -> list[Event]:
    """Of single runs: finished; failed, with nobody going on; given up."""
    found = []
    for state in states:
        run, config = state.run, state.run.config
        if state.result is not None:
            text = f"{sweep}: {run.label} finished: {config.top1_name} {100 * state.result.top1:.2f} %"
            found.append(Event("finished", f"{run.signature}-finished", text))
        elif state.attempt is not None and state.state in ("failed", "interrupted"):
            given_up = _given_up(state, root)
            if state.state == "failed" or given_up:
                kind: Kind = "given_up" if given_up else "failed"
                text = f"{sweep}: {run.label} {_failure(state, given_up)}"
                found.append(Event(kind, f"{run.signature}-{state.attempt.number:04d}-failed", text))
    return found


def complete_cells(sweep: str, states: Sequence[RunState]) -> list[Event]:
    """Of the cells (all axes but the seed) of these runs, which are all of theirs: that every seed is done."""
    cells: dict[str, list[RunState]] = {}
    for state in states:
        cells.setdefault(state.run.cell, []).append(state)
    found = []
    for name, its in cells.items():
        top1 = [state.result.top1 for state in its if state.result is not None]
        if len(top1) == len(its):
            mean = Estimate.of(top1)
            std = "" if mean.std is None else f" ± {100 * mean.std:.2f}"
            text = f"{sweep}: {name} complete: {100 * (mean.mean or 0):.2f}{std} % over {mean.n} seeds"
            key = hashlib.sha256(" ".join([name, *sorted(state.run.signature for state in its)]).encode()).hexdigest()[:16]
            found.append(Event("cell", f"{key}-cell", text))
    return found


def _given_up(state: RunState, root: Path) -> str:
    """Why nobody goes on by himself; empty if it has just failed."""
    assert state.attempt is not None
    if state.reason.startswith(GIVEN_UP):
        return state.reason
    try:
        refusal = str((read_json(state.attempt.exit_json) or {}).get("not_requeued", ""))
    except RunError:
        refusal = ""
    if refusal.startswith(GIVEN_UP):
        return refusal
    ends = early_ends(state, root)
    return f"{GIVEN_UP}: {ends} jobs in a row ended before they started it" if ends >= MAX_EARLY_ENDS else ""


def _failure(state: RunState, given_up: str) -> str:
    assert state.attempt is not None
    try:
        log = lines_at_end(state.attempt.log)
    except OSError:
        log = []
    cause = cause_of(state.reason, "\n".join(log))
    told = "\n".join((essence(log) or log)[-LINES:])[-CHARACTERS:]
    lines = [f"{'was ' + given_up if given_up else 'failed'} ({cause.name}): {state.reason}", told, cause.advice]
    return "\n".join(filter(None, lines))

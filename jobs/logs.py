"""What the training processes printed: ends of logs, tracebacks of failures, and following what is being written."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from jobs.grid import Run
from jobs.state import LIVE, RunState, Survey

POLL_S = 0.5
TAIL_BYTES = 200_000


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log; none if it is not there."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def last_traceback(path: Path, lines: int) -> list[str]:
    """The last traceback of a log to its end, without what comes after it; the last lines if there is none."""
    every = tail(path, 10_000)
    starts = [index for index, line in enumerate(every) if "Traceback (most recent call last)" in line]
    return every[starts[-1] :] if starts else every[-lines:]


def show(states: list[RunState], lines: int, console: Console) -> None:
    """Path and last lines of each run's last attempt."""
    for state in states:
        if state.attempt is None:
            continue
        _heading(state, console)
        for line in tail(state.attempt.log, lines):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_failures(states: list[RunState], lines: int, console: Console) -> None:
    """The last traceback of each kind of failure, and which runs failed in that way."""
    groups: dict[str, list[RunState]] = {}
    for state in states:
        if state.state == "failed":
            groups.setdefault(state.reason, []).append(state)
    for reason, members in groups.items():
        console.print(f"{len(members)} failed: {reason}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"  {', '.join(member.run.label for member in members)}", markup=False, highlight=False, soft_wrap=True)
        _heading(members[0], console)
        assert members[0].attempt is not None, "a run fails in an attempt"
        for line in last_traceback(members[0].attempt.log, lines):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not groups:
        console.print("no run has failed")


def follow(runs: list[Run], root: Path, console: Console) -> None:
    """Print what the runs print, until none of them is in progress."""
    offsets: dict[Path, int] = {}
    while True:
        states = Survey(root).states(runs)
        for state in states:
            if state.attempt is None:
                continue
            log = state.attempt.log
            if log not in offsets and state.state not in LIVE:
                offsets[log] = log.stat().st_size if log.is_file() else 0  # over before we came
            prefix = f"{state.run.label}: " if len(runs) > 1 else ""
            offsets[log] = _print_new(log, offsets.get(log, 0), prefix, console)
        if not any(state.state in LIVE for state in states):
            return
        time.sleep(POLL_S)


def _print_new(log: Path, offset: int, prefix: str, console: Console) -> int:
    """Print the whole lines beyond `offset`; the new offset."""
    if not log.is_file():
        return offset
    with log.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        console.print(prefix + line, markup=False, highlight=False, soft_wrap=True)
    return offset + len(whole)


def _heading(state: RunState, console: Console) -> None:
    assert state.attempt is not None
    heading = f"== {state.run.label} {state.state}, attempt {state.attempts}: {state.attempt.log}"
    console.print(heading, style="bold", markup=False, highlight=False, soft_wrap=True)

"""What the training processes printed: ends of logs, failures by cause, and following what is being written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from jobs.failures import Cause, cause_of, essence, without_particulars
from jobs.report.status import pause_s
from jobs.scheduler.job_output import output_of
from jobs.state import LIVE, RunState, StateReader
from jobs.sweep import Run
from vitpa.documents import open_regular, read_end
from vitpa.rundir import AttemptDir
from vitpa.terminal import printable

POLL_S = 0.5
TAIL_BYTES = 200_000


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log; none if it is not there, and why if it cannot be read."""
    try:
        return _lines(read_end(path, TAIL_BYTES))[-lines:]
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]


def _lines(data: bytes) -> list[str]:
    """The lines of a log, whatever other characters for ends of lines are in them; of a progress bar's, the last state."""
    lines = data.decode(errors="replace").replace("\r\n", "\n").removesuffix("\n").split("\n")
    return [line.rpartition("\r")[2] or line for line in lines] if data else []


def show(states: list[RunState], lines: int, console: Console) -> None:
    """Path and last lines of each run's last attempt; of runs that train together once.

    Of one that was never started it is what its job has printed.
    """
    same_logs: dict[tuple[Path, ...], list[RunState]] = {}
    for state in states:
        if state.attempt is not None:
            logs = early_output(state) or [state.attempt.log.resolve()]
            same_logs.setdefault(tuple(logs), []).append(state)
    for files, together in same_logs.items():
        for log in files:
            for state in together:
                _heading(state, console, log)
            for line in tail(log, lines):
                _say(line, console)


def early_output(state: RunState) -> list[Path]:
    """What the job of a run has printed, where that has ended before it started the run; errors first."""
    early = state.ended_early or (state.state == "uncertain" and not state.job_id)
    return output_of(state.attempt, state.job_id) if early and state.attempt is not None else []


@dataclass(frozen=True)
class Failure:
    """What is known of a run that failed.

    Attributes:
        state: Of the run.
        cause: The kind of failure, with how to fix it.
        told: The traceback, or our line; where there is none, the last lines of the log.
        log: Where they stand.
        alike: The same for failures that are alike.
    """

    state: RunState
    cause: Cause
    told: list[str]
    log: Path
    alike: str


def failure_of(state: RunState, lines: int) -> Failure | None:
    """The failure of a run, with `lines` of its log where that has no traceback; None of one that has not failed."""
    early = early_output(state)
    if state.attempt is None or not (state.state == "failed" or (state.state == "uncertain" and early)):
        return None
    of_nodes = [state.attempt.log, *sorted(state.attempt.path.glob("log.node*.txt"))]
    log = [line for path in early or of_nodes for line in tail(path, 10_000)]
    told = essence(log)
    alike = without_particulars("\n".join(told) or state.reason)
    return Failure(state, cause_of(state.reason, "\n".join(log)), told or log[-lines:], [*early, state.attempt.log][0], alike)


def show_failures(states: list[RunState], lines: int, console: Console) -> None:
    """Failures by their cause, each with how to fix it; every different traceback once, with the runs that ended so."""
    causes: dict[str, tuple[Cause, dict[str, list[Failure]]]] = {}
    for found in filter(None, (failure_of(state, lines) for state in states)):
        _, alike = causes.setdefault(found.cause.name, (found.cause, {}))
        alike.setdefault(found.alike, []).append(found)
    for cause, alike in causes.values():
        failed = sum(len(members) for members in alike.values())
        _say(f"{cause.name}: {failed} failed. To fix it: {cause.advice}", console, style="bold")
        for members in alike.values():
            first = members[0].state
            _say(f"{', '.join(each.state.run.label for each in members)}: {first.reason}", console)
            _heading(first, console, next(iter(early_output(first)), None))
            for line in members[0].told:
                _say(line, console)
    if not causes:
        console.print("no run has failed")


def follow(runs: list[Run], root: Path, console: Console) -> None:
    """Print what the runs print, through all their attempts, until none of them is in progress."""
    printed: dict[Path, str] = {}
    followed = {
        run.signature: _Followed(run, root, f"{run.label}: " if len(runs) > 1 else "", console, printed) for run in runs
    }
    while True:
        reader = StateReader(root)
        states = reader.states(runs)
        for state in states:
            followed[state.run.signature].update(state)
        if not any(state.state in LIVE for state in states):
            return
        for _ in range(max(1, round(pause_s(reader) / POLL_S))):  # files may be looked at more often than the scheduler
            time.sleep(POLL_S)
            for each in followed.values():
                each.print_new()


class _Followed:
    """One run whose log is followed: where in which attempt we are."""

    def __init__(self, run: Run, root: Path, prefix: str, console: Console, printed: dict[Path, str]) -> None:
        self._directory = run.directory(root)
        self._label = run.label
        self._prefix = prefix
        self._console = console
        self._printed = printed  # the run under whose name each log is printed; those that train together have one
        self._attempt: AttemptDir | None = None
        self._offset: int | None = None  # None: nothing printed yet

    def update(self, state: RunState) -> None:
        """Print what is new, of the attempt that we know to its end and then of those after it."""
        if state.attempt is None:
            return
        if self._attempt is None:
            self._attempt = state.attempt
            if state.state not in LIVE:  # over before we came
                self._offset = self._attempt.log.stat().st_size if self._attempt.log.is_file() else 0
        while self._attempt.number < state.attempt.number:
            self.print_new(to_the_end=True)
            self._attempt, self._offset = self._directory.attempt(self._attempt.number + 1), None
        self.print_new(to_the_end=state.state not in LIVE)
        for path in [] if state.state in LIVE else early_output(state):
            _say(f"== {self._label} attempt {self._attempt.number}: {path}", self._console, style="bold")
            for line in tail(path, 10_000):
                _say(self._prefix + line, self._console)

    def print_new(self, *, to_the_end: bool = False) -> None:
        """Print what has come since; as long as it is being written, whole lines only."""
        if self._attempt is None:
            return
        try:
            with open_regular(self._attempt.log) as file:
                file.seek(self._offset or 0)
                data = file.read()
        except FileNotFoundError:
            return
        if self._offset is None:
            _say(f"== {self._label} attempt {self._attempt.number}: {self._attempt.log}", self._console, style="bold")
        if self._printed.setdefault(self._attempt.log.resolve(), self._label) != self._label:
            self._offset = self._offset or 0
            return
        shown = data if to_the_end else data[: data.rfind(b"\n") + 1]
        for line in _lines(shown):
            _say(self._prefix + line, self._console)
        self._offset = (self._offset or 0) + len(shown)


def _say(text: str, console: Console, style: str = "") -> None:
    console.print(printable(text, keep="\t"), style=style or None, markup=False, highlight=False, soft_wrap=True)


def _heading(state: RunState, console: Console, log: Path | None = None) -> None:
    assert state.attempt is not None
    own = state.attempt.log
    shown = own if log is None or log == own.resolve() else log  # of several that train together each has its own name for it
    heading = f"== {state.run.label} {state.state}, attempt {state.attempts}: {shown}"
    _say(heading, console, style="bold")

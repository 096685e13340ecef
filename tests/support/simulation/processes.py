"""Hosts, processes and a clock that are simulated: one process runs at a time, and a seed says which is next.

A process is a thread that runs the real code. It gives way where it sleeps, waits, or touches a file, and then the clock goes
on to what comes next. A killed process ends where it stands: all that it still calls does nothing.
"""

from __future__ import annotations

import heapq
import itertools
import random
import signal
import subprocess
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

_HERE = threading.local()
BIRTH_S = 1_800_000_000.0  # what the clock on the wall shows when a history begins
IGNORED = "ignored"


class Killed(BaseException):
    """Ends the thread of a process that was killed."""


class Host:
    """A machine."""

    def __init__(self, name: str) -> None:
        self.name, self.boots = name, 0

    @property
    def boot_id(self) -> str:
        return f"{self.name}-{self.boots}"


class Process:
    """A process of a host, in a thread of its own."""

    def __init__(
        self,
        park: Park,
        host: Host,
        name: str,
        target: Callable[[], object],
        *,
        environment: dict[str, str],
        parent: Process | None = None,
        step: Process | None = None,
        on_words: Callable[[str], None] = lambda words: None,
    ) -> None:
        """`parent` is that with which it dies; `step` the process of a job to whose signals it listens, too."""
        self.park, self.host, self.name, self.target = park, host, name, target
        self.environment, self.parent, self.step, self.on_words = environment, parent, step, on_words
        self.pid = park.next_pid()
        self.started_ticks = self.pid * 7
        self.exit_code: int | None = None
        self.error = ""  # a traceback
        self.dead = False  # was killed
        self.handlers: dict[int, Any] = {}
        self.pending: list[int] = []  # signals that have come
        self.blocked: set[int] = set()
        self.on_end: list[Callable[[], None]] = []
        self._waits = 0  # counts; a wake-up for an earlier one is not for this one
        self._turn = threading.Lock()
        self._turn.acquire()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._begun = False

    @property
    def alive(self) -> bool:
        return self.exit_code is None

    def _run(self) -> None:
        _HERE.process = self
        self._turn.acquire()
        try:
            if not self.dead:
                self._end(self._call())
        except Killed:
            pass
        finally:
            self.park.thread_is_over()

    def _call(self) -> int:
        try:
            found = self.target()
        except SystemExit as end:
            if isinstance(end.code, str):
                self.on_words(f"{end.code}\n")
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception as error:
            self.error = "".join(traceback.format_exception(error))
            self.on_words(self.error)
            return 1
        return found if isinstance(found, int) else 0

    def _end(self, code: int) -> None:
        self.exit_code = code
        self.park.has_ended(self)

    def give_turn(self) -> None:
        """Run it until it gives way; by the park alone."""
        if not self._begun:
            self._begun = True
            self._thread.start()
        self._turn.release()

    def wait_until(self, time_s: float | None) -> None:
        """Give way, until that time or until `wake`."""
        self._waits += 1
        number = self._waits
        if time_s is not None:
            self.park.at(time_s, lambda: self._resume(number))
        self.park.thread_gives_way()
        self._turn.acquire()
        if self.dead:
            raise Killed
        self._handle_signals()

    def wake(self) -> None:
        number = self._waits
        self.park.at(self.park.now_s, lambda: self._resume(number))

    def _resume(self, number: int) -> None:
        if self.alive and number == self._waits:
            self.park.give_turn(self)

    def unwind(self) -> None:
        """End the thread of a process that was killed."""
        if self._begun and self._thread.is_alive():
            self.park.give_turn(self)
            self._thread.join()

    def get_signal(self, number: int) -> None:
        if not self.alive or self.handlers.get(number) == IGNORED:
            return
        if number == signal.SIGKILL or (number not in self.handlers and number not in self.blocked):
            self.park.kill(self, -number)
            return
        self.pending.append(number)
        self.wake_for_signal()

    def wake_for_signal(self) -> None:
        """A sleep goes on after a signal, and none is long: it is handled at its end."""

    def _handle_signals(self) -> None:
        for number in [each for each in self.pending if each not in self.blocked]:
            self.pending.remove(number)
            handler = self.handlers.get(number)
            if handler is None:
                self.park.kill(self, -number)
            elif handler != IGNORED:
                handler(number, None)

    def block(self, how: int, numbers: set[int]) -> set[int]:
        before = set(self.blocked)
        if how == signal.SIG_BLOCK:
            self.blocked |= numbers
        else:
            self.blocked = set(numbers)
            self._handle_signals()
        return before


class Park:
    """All processes of a history, and its clock."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.processes: dict[int, Process] = {}
        self.ended: Callable[[Process], None] = lambda process: None
        self._events: list[tuple[float, float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._pids = itertools.count(1000)
        self._idle = threading.Lock()
        self._idle.acquire()
        self._killed: list[Process] = []

    def next_pid(self) -> int:
        return next(self._pids)

    def start(self, process: Process, after_s: float = 0.0) -> Process:
        self.processes[process.pid] = process
        self.at(self.now_s + after_s, lambda: process._resume(0))
        return process

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Do something at a time; what is due at the same time is done in any order."""
        heapq.heappush(self._events, (time_s, self.random.random(), next(self._order), action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, action)

    def run(self, until_s: float | None = None, until: Callable[[], bool] | None = None) -> bool:
        """Let time pass up to then, or until something holds; False if nothing more will happen before it does."""
        while until is None or not until():
            if not self._events:
                if until_s is not None:
                    self.now_s = max(self.now_s, until_s)
                return until is None
            if until_s is not None and self._events[0][0] > until_s:
                self.now_s = max(self.now_s, until_s)
                return until is None
            time_s, _, _, action = heapq.heappop(self._events)
            self.now_s = max(self.now_s, time_s)
            action()
            self._unwind()
        return True

    def give_turn(self, process: Process) -> None:
        process.give_turn()
        self._idle.acquire()

    def thread_gives_way(self) -> None:
        self._idle.release()

    thread_is_over = thread_gives_way

    def has_ended(self, process: Process) -> None:
        self.processes.pop(process.pid, None)
        for child in [each for each in self.processes.values() if each.parent is process]:
            self.kill(child)
        self.ended(process)
        for action in process.on_end:
            action()

    def kill(self, process: Process, code: int = -signal.SIGKILL) -> None:
        if not process.alive:
            return
        process.dead, process.exit_code = True, code
        self.has_ended(process)
        if process is this_process():
            raise Killed
        self._killed.append(process)

    def _unwind(self) -> None:
        while self._killed:
            self._killed.pop().unwind()

    def close(self) -> None:
        """End all threads."""
        for process in list(self.processes.values()):
            self.kill(process)
        self._unwind()


def this_process() -> Process | None:
    """The simulated process whose thread this is; None in any other thread."""
    return getattr(_HERE, "process", None)


def set_this_process(process: Process | None) -> None:
    _HERE.process = process


class Child:
    """What `subprocess.Popen` is to a simulated process."""

    def __init__(self, process: Process, arguments: Sequence[str]) -> None:
        self.process, self.args, self.pid = process, arguments, process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exit_code

    def poll(self) -> int | None:
        return self.process.exit_code

    def wait(self, timeout: float | None = None) -> int:
        waiting, park = this_process(), self.process.park
        assert waiting is not None
        deadline_s = None if timeout is None else park.now_s + timeout
        if self.process.alive:
            self.process.on_end.append(waiting.wake)
        while self.process.exit_code is None:
            if deadline_s is not None and park.now_s >= deadline_s:
                self.process.on_end.remove(waiting.wake)
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
            waiting.wait_until(deadline_s)
        return self.process.exit_code

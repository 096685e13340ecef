"""The clock of an attempt: how its wall-clock time divides into the parts of vitpa/seconds.py. No step but the first waits."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vitpa.records import ProcessId
from vitpa.rundir import CLAIMED
from vitpa.seconds import PARTS

COMMANDS = ("vitpa", "vitpa.cli", "vitpa.train")  # as which a process that trains is started


class Clock:
    """Time is in one part at any moment; by time.monotonic()."""

    def __init__(self, imports_s: float = 0.0) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0) | {"imports": imports_s}
        self._part, self._since_s = "set_up", time.monotonic()
        self.first_step_s: float | None = None  # when the first optimiser step was done
        self._evaluations: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # whose time is still counted as steps'

    @staticmethod
    def of_process() -> Clock | None:
        """Begun with this process, if it was started for a training; to be called when all is imported."""
        main = sys.modules["__main__"].__spec__
        if CLAIMED not in os.environ and (main.name if main else Path(sys.argv[0]).name) not in COMMANDS:
            return None
        started_s = ProcessId.mine().start_ticks / os.sysconf("SC_CLK_TCK")
        return Clock(max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s))

    def enter(self, part: str) -> str:
        """From now on it is the time of `part`; the part before."""
        before, now_s = self._part, time.monotonic()
        self._seconds[before] += now_s - self._since_s
        self._part, self._since_s = part, now_s
        return before

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """The time of the body is that of `part`."""
        before = self.enter(part)
        yield
        self.enter(before)

    @contextmanager
    def evaluating(self, device: torch.device) -> Iterator[None]:
        """The body is an evaluation. On a GPU, which does it while the host goes on, its events are what is measured."""
        if device.type != "cuda":
            with self.within("evaluations"):
                yield
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._evaluations.append((begin, end))

    def first_step(self, device: torch.device) -> None:
        """The first step has been begun: wait for its end, and note when it was."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.first_step_s = math.fsum(self.seconds().values())

    def seconds(self) -> dict[str, float]:
        """Seconds up to now by part, as a record has them."""
        self.enter(self._part)
        done = [pair for pair in self._evaluations if pair[1].query()]
        self._evaluations = [pair for pair in self._evaluations if pair not in done]
        moved_s = min(sum(begin.elapsed_time(end) for begin, end in done) / 1000, self._seconds["steps"])
        self._seconds["steps"] -= moved_s
        self._seconds["evaluations"] += moved_s
        return {f"{part}_s": seconds for part, seconds in self._seconds.items()}

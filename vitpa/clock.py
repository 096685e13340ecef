"""The clock of an attempt: how its wall-clock time divides into the parts of vitpa/seconds.py. It makes no step wait."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitpa.records import ProcessId
from vitpa.rundir import CLAIMED
from vitpa.seconds import PARTS


class Clock:
    """Time is in one part at any moment; by time.monotonic()."""

    def __init__(self, imports_s: float = 0.0) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0) | {"imports": imports_s}
        self._part, self._since_s = "set_up", time.monotonic()
        self._evaluations: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # whose time is still counted as steps'

    @staticmethod
    def of_launched() -> Clock | None:
        """Begun with this process, if a launcher has started it for the attempt; to be called when all is imported."""
        if CLAIMED not in os.environ:
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

    def seconds(self) -> dict[str, float]:
        """Seconds up to now by part, as a record has them."""
        self.enter(self._part)
        done = [pair for pair in self._evaluations if pair[1].query()]
        self._evaluations = [pair for pair in self._evaluations if pair not in done]
        moved_s = min(sum(begin.elapsed_time(end) for begin, end in done) / 1000, self._seconds["steps"])
        self._seconds["steps"] -= moved_s
        self._seconds["evaluations"] += moved_s
        return {f"{part}_s": seconds for part, seconds in self._seconds.items()}

"""How far each run has been at each moment, and what its interruptions took: seen from outside, in its files.

Times are seconds after the first moment at which faults may strike, by one clock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slurm.chaos.sweep import document
from vitpa.documents import DocumentError, parse_json, read_end

TAIL_BYTES = 8192
SLACK_S = 10.0  # a row may come up to that long after the fault that ends its attempt
EXPLAINS_S = 300.0  # a fault is no reason for what happens later


@dataclass(frozen=True)
class Sample:
    """A run's last row of training at a moment: its step, and the seconds of training behind it that were kept."""

    at_s: float
    step: int
    trained_s: float


NOTHING = Sample(0.0, 0, 0.0)


@dataclass(frozen=True)
class Start:
    """An attempt of a run has been started, for a submission (a path below the root)."""

    at_s: float
    number: int
    submission: str


@dataclass
class Life:
    """What was seen of a run."""

    label: str
    folder: Path
    samples: list[Sample] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    done_s: float | None = None
    twice_s: float = 0.0  # how long more than one process has trained it at a time

    def look(self, now_s: float) -> None:
        """Take in what is new."""
        if self.done_s is not None:
            return
        done = (self.folder / "result.json").exists()  # before its last row is read
        for path in sorted(self.folder.glob("attempts/*/start.json"))[len(self.starts) :]:
            if started := document(path):
                submission = "" if started.get("withdrawn") else str(document(path.with_name("claim.json")).get("submission"))
                self.starts.append(Start(now_s, int(path.parent.name), submission))
        row = _last_row(self.folder / "metrics.jsonl")
        if row is not None and (not self.samples or row != (self.samples[-1].step, self.samples[-1].trained_s)):
            self.samples.append(Sample(now_s, *row))
        if done:
            self.done_s = now_s

    @property
    def executions(self) -> list[Start]:
        """The starts of what was trained: not of attempts that somebody has withdrawn."""
        return [start for start in self.starts if start.submission]


def _last_row(metrics_jsonl: Path) -> tuple[int, float] | None:
    """Step and seconds of the last whole row of training."""
    with contextlib.suppress(OSError):
        for line in reversed(read_end(metrics_jsonl, TAIL_BYTES).split(b"\n")):
            with contextlib.suppress(DocumentError, KeyError, TypeError, ValueError):
                row = parse_json(line)
                return int(row["step"]), float(row["time_s"])
    return None


@dataclass(frozen=True)
class Outage:
    """A run did not get on, from its last row before an attempt ended until it was again at that step.

    Attributes:
        lost_s: Seconds of that which are no training that was kept; None if it never got there.
        attempts: Starts within; several where it was interrupted again before it was back.
    """

    began_s: float
    lost_s: float | None
    attempts: tuple[Start, ...]
    before: Start  # the attempt that was interrupted

    @property
    def submissions(self) -> set[str]:
        """Those that started it again, other than that which had it."""
        return {start.submission for start in self.attempts} - {self.before.submission}


def outages(life: Life) -> list[Outage]:
    """The interruptions of a run, each until the run was again at the step where it was."""
    found: list[Outage] = []
    executions = life.executions
    index = 1
    while index < len(executions):
        before, first = executions[index - 1], index
        last = next((sample for sample in reversed(life.samples) if sample.at_s <= executions[index].at_s), None)
        left = last or Sample(before.at_s, 0, 0.0)
        back = _back(life, left, executions[index].at_s)
        index += 1
        while index < len(executions) and (back is None or executions[index].at_s < back.at_s):
            back = _back(life, left, executions[index].at_s)
            index += 1
        lost_s = None if back is None else max(0.0, (back.at_s - left.at_s) - (back.trained_s - left.trained_s))
        found.append(Outage(left.at_s, lost_s, tuple(executions[first:index]), before))
    return found


def _back(life: Life, left: Sample, since_s: float) -> Sample | None:
    """The first row after `since_s` that is as far as `left`."""
    return next((each for each in life.samples if each.at_s > since_s and each.step >= left.step), None)


@dataclass(frozen=True)
class Strike:
    """A fault that has struck, and the runs that it may have interrupted."""

    at_s: float
    kind: str
    runs: tuple[str, ...]  # labels
    what: str  # for people


def cause(outage: Outage, label: str, strikes: Sequence[Strike]) -> Strike | None:
    """The last fault that touched the run before it stopped; None if there is none that explains it."""
    return _last(strikes, label, min(outage.attempts[0].at_s, outage.began_s + SLACK_S))


def causes(outage: Outage, label: str, strikes: Sequence[Strike]) -> list[Strike | None]:
    """For each attempt of an outage, the fault that made it necessary: the run may be interrupted again on its way back."""
    later = [_last(strikes, label, start.at_s) for start in outage.attempts[1:]]
    return [cause(outage, label, strikes), *later]


def _last(strikes: Sequence[Strike], label: str, before_s: float) -> Strike | None:
    touched = [strike for strike in strikes if label in strike.runs and before_s - EXPLAINS_S <= strike.at_s <= before_s]
    return max(touched, key=lambda strike: strike.at_s, default=None)


def trained_s(life: Life, at_s: float) -> float:
    """Seconds of training that a run had at a moment, by its rows."""
    return max(
        (sample for sample in life.samples if sample.at_s <= at_s), key=lambda each: each.at_s, default=NOTHING
    ).trained_s


def kept_s(life: Life, at_s: float) -> float:
    """The same without what it had lost by then, or was to lose."""
    return min([trained_s(life, at_s), *(sample.trained_s for sample in life.samples if sample.at_s > at_s)])

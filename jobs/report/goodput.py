"""Where the time of runs went, over all their attempts, and what share of it has trained them: the ETTR.

ETTR, effective training time ratio: steps and evaluations that were kept, by the wall-clock time of all attempts. Set-up,
restoring, compilation, checkpoints and steps that were done again are in that time, waiting in a queue is not (as in Kokolis
et al. 2024, arXiv 2410.21680, whose ETTR is a share of the time that a job runs). All of it is read from records:
what none says is not guessed. No clocks of two hosts are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from jobs.records import Start
from jobs.state import RunState
from vitpa.records import Holder, RunError, read_json, read_record, record_of
from vitpa.rundir import AttemptDir, RunDir
from vitpa.seconds import PARTS, Seconds


@dataclass(frozen=True)
class Goodput:
    """Seconds of one or more runs by part, each run with those of all attempts; runs trained together count apart.

    Attributes:
        wall_s: All attempts from their starts to their ends; of one that was killed with its supervisor, or goes on, as far as
            its records reach.
        other_s: Of `wall_s` what no record accounts for: starts and ends of processes, attempts killed before they trained.
        lost_steps: Steps after a checkpoint that were done again; `lost_s` is what they took the first time.
        queue_s: Waiting of attempts in the queue: of a SLURM job, at first and after each requeue, by SLURM's own times; else
            between claim and start, where both were on one host. None if it is known of no attempt.
        untimed: Attempts, in none of the figures, that were killed before they had written any time.
    """

    wall_s: float
    imports_s: float
    data_s: float
    set_up_s: float
    restore_s: float
    compilation_s: float
    steps_s: float
    evaluations_s: float
    checkpoints_s: float
    lost_s: float
    other_s: float
    lost_steps: int
    queue_s: float | None
    untimed: int

    @property
    def ettr(self) -> float | None:
        """The effective training time ratio; None before there is any time."""
        return min(1.0, (self.steps_s + self.evaluations_s) / self.wall_s) if self.wall_s else None

    def as_json(self) -> dict[str, float | int | None]:
        """Plain data."""
        return {"ettr": self.ettr, **{each.name: getattr(self, each.name) for each in fields(self)}}

    @staticmethod
    def of_runs(states: Iterable[RunState], root: Path) -> Goodput | None:
        """That of the runs whose records say it, together; None if none do."""
        found = [its for state in states if (its := Goodput.of_run(state.run.directory(root))) is not None]
        if not found:
            return None
        sums: dict[str, Any] = {each.name: sum(getattr(its, each.name) or 0 for its in found) for each in fields(Goodput)}
        return Goodput(**sums | ({"queue_s": None} if all(its.queue_s is None for its in found) else {}))

    @staticmethod
    def of_run(run: RunDir) -> Goodput | None:
        """That of a run; None if it has not trained yet, or not all with a version that records it, or a record is damaged."""
        try:
            executions = [its for attempt in run.attempts() if (its := _Execution.of(attempt)) is not None]
        except RunError:
            return None
        recorded = [its for its in executions if its.seconds is not None]
        if not recorded or any(its.is_of_earlier_version for its in executions):
            return None
        return _sum_of(executions)


@dataclass(frozen=True)
class _Execution:
    """What an attempt that was started says of its time."""

    seconds: Seconds | None
    duration_s: float | None  # as its supervisor saw it
    queue_s: float | None
    is_of_earlier_version: bool

    @staticmethod
    def of(attempt: AttemptDir) -> _Execution | None:
        """None of one that was not started, or withdrawn."""
        document = read_json(attempt.start_json)
        if document is None:
            return None
        start = record_of(Start, document, attempt.start_json)
        if start.withdrawn:
            return None
        seconds = read_record(Seconds, attempt.seconds_json)
        duration_s = (read_json(attempt.exit_json) or {}).get("duration_s")
        return _Execution(
            seconds,
            float(duration_s) if isinstance(duration_s, int | float) else None,
            _queue_s(attempt, start),
            seconds is None and attempt.env_json.exists(),  # which is written later
        )


def _queue_s(attempt: AttemptDir, start: Start) -> float | None:
    """As SLURM says it; else from claim to start by the clock of one host."""
    if start.job is not None and start.job.queue_s is not None:
        return start.job.queue_s
    claim = read_json(attempt.claim_json) or {}
    with suppress(KeyError, TypeError, ValueError, RunError):
        before = record_of(Holder, claim, attempt.path).process
        if before.host == start.process.host and before != start.process and start.started_utc is not None:
            waited = datetime.fromisoformat(start.started_utc) - datetime.fromisoformat(claim["utc"])
            return max(0.0, waited.total_seconds())
    return None


def _sum_of(executions: list[_Execution]) -> Goodput:
    """Together. The next attempt knows how much of an attempt was kept: the checkpoint that it went on from."""
    walls: list[float | None] = []
    kept_s, owner = 0.0, 0  # the correction of steps; the last attempt that has trained
    parts = {f"{part}_s": 0.0 for part in PARTS}
    lost_steps, lost_s, before = 0, 0.0, None
    for number, its in enumerate(executions):
        walls.append(None if its.seconds is None else its.seconds.wall_s)
        if its.seconds is None:
            continue
        for name, seconds in its.seconds.by_part().items():
            parts[name] += seconds
        lost_steps, lost_s = lost_steps + its.seconds.lost_steps, lost_s + its.seconds.lost_s
        if before is not None:
            change_s = its.seconds.resumed_train_time_s - before.train_time_s
            kept_s += change_s
            walls[owner] = (walls[owner] or 0.0) + change_s + its.seconds.lost_s
        before, owner = its.seconds, number
    parts["steps_s"] = max(0.0, parts["steps_s"] + kept_s)
    known = [
        max(its.duration_s or 0.0, wall or 0.0)
        for its, wall in zip(executions, walls, strict=True)
        if its.duration_s is not None or wall is not None
    ]
    wall_s = math.fsum(known)
    queued = [its.queue_s for its in executions if its.queue_s is not None]
    return Goodput(
        wall_s=wall_s,
        **parts,
        lost_s=lost_s,
        other_s=max(0.0, wall_s - math.fsum(parts.values()) - lost_s),
        lost_steps=lost_steps,
        queue_s=math.fsum(queued) if queued else None,
        untimed=len(executions) - len(known),
    )

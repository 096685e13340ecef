"""What the screen shows of a sweep at one moment: rows in groups, those that the typed words leave, how long it will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jobs.report.status import by_count, duration
from vitpa.statistics import Estimate

Row = Mapping[str, Any]  # as jobs.report.status.row_of makes it
Grouping = Literal["cells", "jobs"]
SEARCHED = ("run", "state", "node", "job", "reason")  # columns that typed words are looked for in


@dataclass(frozen=True)
class Look:
    """All runs that are watched."""

    rows: Sequence[Row]
    warning: str = ""  # why SLURM could not be asked
    pause_s: float = 1.0  # until the next look
    search: Sequence[str] = ()  # lines about a search

    def title(self, name: str) -> str:
        """Counts of states, and when the sweep will be done."""
        eta_s = sweep_eta_s(self.rows)
        parts = [f"{name}: {by_count([row['state'] for row in self.rows])}"]
        parts += [f"done in about {duration(eta_s)}"] if eta_s else []
        return "; ".join(parts + ([self.warning] if self.warning else []))


@dataclass(frozen=True)
class Group:
    """Runs under one heading: a cell of the sweep, or a job (array) of SLURM."""

    name: str
    rows: Sequence[Row]

    @property
    def states(self) -> str:
        """How many are done."""
        return f"{sum(row['state'] == 'done' for row in self.rows)}/{len(self.rows)} done"

    @property
    def top1(self) -> str:
        """Mean and standard deviation of the finished runs, in per cent; empty without any."""
        found = Estimate.of([100 * row["val_top1"] for row in self.rows if row["state"] == "done"])
        if found.mean is None:
            return ""
        return f"{found.mean:.2f}" + (f" ± {found.std:.2f}" if found.std is not None else "")

    @property
    def eta_s(self) -> float | None:
        """Seconds until its running ones are done."""
        return max((row["eta_s"] for row in self.rows if row["eta_s"] is not None), default=None)


def groups_of(rows: Sequence[Row], grouping: Grouping) -> list[Group]:
    """The rows in groups, in the order of their first ones."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["cell"] if grouping == "cells" else job_of(row), []).append(row)
    return [Group(name, its) for name, its in found.items()]


def job_of(row: Row) -> str:
    """The job, or array of jobs, that a run has in SLURM."""
    array = str(row["job"]).partition("_")[0]
    return f"job {array}" if array else "no job in SLURM"


def matching(rows: Sequence[Row], typed: str) -> list[Row]:
    """The rows in which every typed word is found, in whatever case."""
    words = typed.lower().split()

    def text(row: Row) -> str:
        return " ".join(str(row[column]) for column in SEARCHED).lower()

    return [row for row in rows if all(word in text(row) for word in words)]


def sweep_eta_s(rows: Sequence[Row]) -> float | None:
    """Seconds until all runs are done if as many train at a time as now; None if none trains or nobody knows how fast.

    A run that has not begun is taken to have as many epochs to go as it is long, and epochs as long as those of the others.
    """
    training = [row for row in rows if row["eta_s"] is not None and row["epoch"] is not None]
    epochs_per_s = sum((row["epochs"] - row["epoch"]) / row["eta_s"] for row in training if row["eta_s"] > 0)
    if not epochs_per_s:
        return None
    ended = ("done", "paused", "failed", "cancelled", "broken")
    left = sum(row["epochs"] - (row["epoch"] or 0) for row in rows if row["state"] not in ended)
    return float(max(left / epochs_per_s, *(row["eta_s"] for row in training)))


def terms_of(rows: Sequence[Row]) -> list[str]:
    """What follows `vitpa sweep VERB SWEEP` to mean these runs of one cell, and no other."""
    first, seeds = rows[0], ",".join(str(row["seed"]) for row in rows)
    chosen = {"dataset": first["dataset"], "attention": first["attention"], **first["settings"], "seed": seeds}
    return [f"{key}={value}" for key, value in chosen.items()]

"""The results of a sweep as statistics over seeds.

Mean, standard deviation (n - 1 in the denominator), 95 % interval of the mean by Student's t, and the difference
content - positional paired by seed. Fractions everywhere. Only valid results count; everything else is listed with its
reason, never averaged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jobs.errors import SweepError
from jobs.grid import Attention
from jobs.report.compare import Best, Comparison, Scores, axis_named, best_cells, comparisons, paired, value_named
from jobs.report.goodput import Goodput
from jobs.scheduler.client import ranges
from jobs.state import RunState
from jobs.sweep import Sweep
from vitpa.metrics_file import damaged_lines
from vitpa.mixture import HOW, data_version, mixtures
from vitpa.records import utc_now
from vitpa.rundir import Result
from vitpa.statistics import Estimate

JOULES_PER_KWH = 3.6e6


class MixedRunsError(SweepError):
    """Runs of one data set were made by different code or from different data."""


@dataclass(frozen=True)
class Cell:
    """One data set, network and setting of the sweep's axes."""

    dataset: str
    attention: Attention
    network: str  # the attention, or another kind of network
    settings: dict[str, str]  # the values on the axes
    wanted: int  # seeds in the sweep
    val_top1: Estimate
    seeds: list[int]  # that are in the mean
    gpu_hours: float
    code_versions: list[str]
    data_versions: list[str]
    reference_val_top1: float | None
    reference_source: str
    evaluated_on: str = "val"  # or the part of train that was held out
    energy_kwh: float | None = None  # of the GPUs; None: not all of it was counted
    ettr: float | None = None  # of its runs, a fraction; None: not recorded

    @property
    def complete(self) -> bool:
        """Whether every seed is in the mean."""
        return self.val_top1.n == self.wanted


@dataclass(frozen=True)
class Difference:
    """content - positional on one data set and setting of the axes, over the seeds that both have."""

    dataset: str
    settings: dict[str, str]
    wanted: int
    val_top1: Estimate
    seeds: list[int]


@dataclass(frozen=True)
class CollectedTable:
    """Everything `collect` finds out."""

    sweep: str
    description: str
    collected_utc: str
    mixed: list[str]  # data sets whose runs are of different code or data, averaged because the user said so
    cells: list[Cell]
    differences: list[Difference]
    results: list[Result]
    absent: list[dict[str, str]]  # runs without a valid result: run, state, reason
    damaged: list[dict[str, str]] = field(default_factory=list)  # runs whose result counts, but not all of their curve
    settings: dict[str, dict[str, str]] = field(default_factory=dict)  # of each result, by its signature: values on the axes
    compared: str = ""  # the axis of the comparisons
    comparisons: list[Comparison] = field(default_factory=list)
    best: list[Best] = field(default_factory=list)  # of each data set, if the sweep has axes
    pivot: tuple[str, str] | None = None  # the axes of rows and columns
    scores: list[Scores] = field(default_factory=list)  # the accuracies that each cell is made of, in their order
    goodput: Goodput | None = None  # of all runs
    changed: str = ""  # how the sweep's file differs from the submitted sweep, which the table is of; empty: not at all

    @property
    def axes(self) -> list[str]:
        """The names of the sweep's axes."""
        return list(dict.fromkeys(key for cell in self.cells for key in cell.settings))

    @property
    def evaluated_on(self) -> dict[str, str]:
        """The images that all accuracies of a data set are of: val, or the part of train that was held out."""
        return {cell.dataset: cell.evaluated_on for cell in self.cells}

    @property
    def complete(self) -> bool:
        """Whether every run is in it."""
        return not self.absent

    def as_json(self) -> dict[str, Any]:
        """Plain data: accuracies are fractions."""
        return {
            "sweep": self.sweep,
            "description": self.description,
            "collected_utc": self.collected_utc,
            "complete": self.complete,
            "changed": self.changed,
            "mixed": self.mixed,
            "cells": [{**asdict(cell), "complete": cell.complete} for cell in self.cells],
            "differences_content_minus_positional": [asdict(difference) for difference in self.differences],
            "compared": self.compared,
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "best": [asdict(best) for best in self.best],
            "absent": self.absent,
            "damaged": self.damaged,
            "goodput": None if self.goodput is None else self.goodput.as_json(),
            "results": [
                {**result.model_dump(mode="json"), "settings": self.settings[result.signature]} for result in self.results
            ],
        }


def collect(
    sweep: Sweep,
    states: list[RunState],
    root: Path,
    *,
    allow_mixed: bool = False,
    compare: str | None = None,
    pivot: tuple[str, str] | None = None,
    changed: str = "",
) -> CollectedTable:
    """The table of a sweep from the states of its runs below `root`.

    Args:
        sweep: Whose runs they are.
        states: Of its runs, or of some of them.
        root: Folder of runs/ and sweeps/.
        allow_mixed: Average results of different code or data.
        compare: An axis, or `attention`, along which every two cells are compared; AXIS=VALUE: each with that value's.
        pivot: Two of them, for the rows and columns of tables of means.
        changed: How the sweep's file differs from `sweep`, for the table to say it; empty: not at all.

    Raises:
        MixedRunsError: and `allow_mixed` is not set.
        SweepError: an axis, or a value of it, that the sweep has not.
    """
    axes = ["attention", *(states[0].run.settings if states else ())]
    axis, against, value = (compare or "").partition("=")
    compared = axis_named(axis, axes) if compare else ""
    rows_columns = (axis_named(pivot[0], axes), axis_named(pivot[1], axes)) if pivot else None
    if rows_columns and rows_columns[0] == rows_columns[1]:
        raise SweepError(f"--pivot {rows_columns[0]} twice: name two axes, one for the rows and one for the columns")
    mixed = mixtures((state.run.label, state.result) for state in states if state.result is not None)
    if mixed and not allow_mixed:
        raise MixedRunsError("; ".join(mixed.values()) + _MIXED_HINT)
    groups = by_cell(states)
    absent = [
        {"run": state.run.label, "state": state.state, "reason": state.reason} for state in states if state.result is None
    ]
    scores = [_scores(members) for members in groups]
    base = value_named(value, compared, scores) if against else None
    return CollectedTable(
        compared=compared,
        comparisons=comparisons(scores, compared, base) if compared else [],
        best=best_cells(scores) if len(axes) > 1 else [],
        pivot=rows_columns,
        sweep=sweep.name,
        description=sweep.config.description,
        collected_utc=utc_now(),
        mixed=list(mixed),
        cells=[_cell(sweep, members, root) for members in groups],
        scores=scores,
        differences=_differences(scores),
        results=[state.result for state in states if state.result is not None],
        absent=absent,
        settings={state.result.signature: state.run.settings for state in states if state.result is not None},
        damaged=[{"run": state.run.label, "reason": reason} for state in states if (reason := _damage(state, root))],
        goodput=Goodput.of_runs(states, root),
        changed=changed,
    )


def by_cell(states: Sequence[RunState]) -> list[list[RunState]]:
    """The states of the runs that differ in the seed alone, by data set, network and the sweep's axes in their order."""
    datasets = list(dict.fromkeys(state.run.dataset for state in states))
    groups: dict[tuple[str, str, str], list[RunState]] = {}
    for state in states:
        key = (state.run.dataset, state.run.config.network_name, json.dumps(state.run.settings))
        groups.setdefault(key, []).append(state)
    return [groups[key] for key in sorted(groups, key=lambda group: (datasets.index(group[0]), group[1]))]


_MIXED_HINT = f". {HOW}, select with filters, or average all the same with --allow-mixed"


def _damage(state: RunState, root: Path) -> str:
    """What is damaged of a finished run's curve; empty if nothing is. Its end was compared with its result."""
    if state.result is None:
        return ""
    path = state.run.directory(root).metrics_jsonl
    try:
        lines = damaged_lines(path)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return f"{path}: damaged in line{'s' if lines[1:] else ''} {ranges(lines)}" if lines else ""


def _cell(sweep: Sweep, members: list[RunState], root: Path) -> Cell:
    """Of runs that differ in their seeds."""
    run, results = members[0].run, [state.result for state in members if state.result is not None]
    reference = sweep.config.reference.get(run.dataset, {}).get(run.attention)
    goodput = Goodput.of_runs(members, root)
    if run.config.train.holdout:  # what was published is of val
        reference = None
    return Cell(
        dataset=run.dataset,
        attention=run.attention,
        network=run.config.network_name,
        settings=run.settings,
        wanted=len(members),
        val_top1=Estimate.of([result.top1 for result in results]),
        seeds=sorted(result.seed for result in results),
        gpu_hours=math.fsum(result.gpu_hours for result in results),
        code_versions=sorted({result.code_version for result in results}),
        data_versions=sorted({data_version(result) for result in results}),
        reference_val_top1=reference.val_top1 if reference else None,
        reference_source=reference.source if reference else "",
        evaluated_on=run.config.evaluated_on,
        energy_kwh=energy_kwh(results),
        ettr=None if goodput is None else goodput.ettr,
    )


def energy_kwh(results: Sequence[Result]) -> float | None:
    """What the GPUs took for all of them together; None unless it was counted for each."""
    joules = [result.energy_j for result in results if result.energy_j is not None]
    return math.fsum(joules) / JOULES_PER_KWH if joules and len(joules) == len(results) else None


def _scores(members: list[RunState]) -> Scores:
    run = members[0].run
    val_top1 = {state.run.seed: state.result.top1 if state.result else None for state in members}
    return Scores(run.dataset, {"attention": run.config.network_name, **run.settings}, val_top1)


def _differences(scores: Sequence[Scores]) -> list[Difference]:
    """Paired by seed, wherever the sweep has both attentions."""
    at = {(each.dataset, *each.position.values()): each for each in scores}
    found = []
    for (dataset, attention, *values), content in at.items():
        positional = at.get((dataset, "positional", *values))
        if attention != "content" or positional is None:
            continue
        wanted, differences, _ = paired(positional, content)
        settings = {axis: value for axis, value in content.position.items() if axis != "attention"}
        if wanted:
            found.append(Difference(dataset, settings, wanted, Estimate.of(list(differences.values())), list(differences)))
    return found

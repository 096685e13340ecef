"""The seventh section: what the sweep took: time, GPU-hours, energy where it was counted, and where the time went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from jobs.grid import short_name
from jobs.report.collect import by_cell, energy_kwh
from jobs.report.document.content import Block, Section, Table, Text
from jobs.report.goodput import Goodput
from jobs.report.status import duration, first_of
from jobs.report.tables import hours
from jobs.state import RunState
from jobs.sweep import Run
from vitpa.records import RunError, read_json
from vitpa.statistics import Estimate

NOTE = "Time: steps, evaluations and checkpoints that led to a run's result; runs that trained together share it."
GOODPUT = (
    "ETTR (effective training time ratio, goodput): the share of steps and evaluations that were kept in the wall-clock time "
    "of all attempts, of unfinished runs, too; without waiting in the queue, which SLURM says of its jobs, and which else is "
    "known only where they were submitted on the host that ran them. Runs that trained together count each; those of "
    "versions that did not record it do not."
)
PARTS = {
    "imports": "imports_s",
    "data": "data_s",
    "set-up": "set_up_s",
    "compilation": "compilation_s",
    "restore": "restore_s",
    "steps": "steps_s",
    "evaluations": "evaluations_s",
    "checkpoints": "checkpoints_s",
    "repeated steps": "lost_s",
    "other": "other_s",
    "queue, not in it": "queue_s",
}


def section(states: Sequence[RunState], root: Path, command: str) -> Section:
    """The costs of the runs below `root`, a row for each cell and one for all."""
    axes = list(dict.fromkeys(axis for state in states for axis in state.run.settings))
    energy = any(state.result is not None and state.result.energy_j is not None for state in states)
    header = ["data set", "network", *map(short_name, axes), "runs", "mean time of a run", "time of all", "GPU-hours"]
    header += ["mean images/s of a run"]
    header += [*(["kWh (GPUs)"] if energy else []), "attempts"]
    keys = 2 + len(axes)
    rows = []
    for members in by_cell(states):
        rows.append([*_name(members[0].run), *_costs(members, energy)])
    if len(rows) > 1:
        rows.append(["all", *([""] * (keys - 1)), *_costs(states, energy)])
    table = Table("What the finished runs took", [header, *rows], keys=keys)
    notes = [NOTE, *_what_else(states, root, energy)]
    goodput = _goodput(states, root, axes)
    if goodput is None and any(state.result is not None for state in states):
        notes.append("Goodput: not known; these runs are of versions that did not record where the time went.")
    blocks: list[Block] = [table, Text(notes)]
    if goodput is not None:
        blocks += [goodput, Text([GOODPUT])]
    return Section("costs", "Time, GPU-hours, energy and goodput", blocks, [command])


def _name(run: Run) -> list[str]:
    return [run.dataset, run.config.network_name, *run.settings.values()]


def _goodput(states: Sequence[RunState], root: Path, axes: Sequence[str]) -> Table | None:
    """Where the time of the runs went, a row for each cell and one for all; None if no record says it."""
    groups: list[tuple[list[str], Sequence[RunState]]] = [(_name(its[0].run), its) for its in by_cell(states)]
    if len(groups) > 1:
        groups.append((["all", *([""] * (1 + len(axes)))], states))
    header = ["data set", "network", *map(short_name, axes), "ETTR", "all attempts", *PARTS]
    rows = []
    for name, members in groups:
        goodput = Goodput.of_runs(members, root)
        if goodput is not None:
            ettr = "-" if goodput.ettr is None else f"{100 * goodput.ettr:.1f} %"
            seconds = [goodput.wall_s, *(getattr(goodput, each) for each in PARTS.values())]
            rows.append([*name, ettr, *(duration(each) or "-" for each in seconds)])
    return Table("Where the time of all attempts went", [header, *rows], keys=2 + len(axes)) if rows else None


def _what_else(states: Sequence[RunState], root: Path, energy: bool) -> list[str]:
    """Lines about what stands in no row: what unfinished runs took, and why there are no GPU-hours, or no energy."""
    results = [state.result for state in states if state.result is not None]
    notes = []
    if results and not any(result.gpu_hours for result in results):
        notes.append("The finished runs trained on CPUs: they took no GPU-hours, and there is no counter of a GPU's energy.")
    elif results and not energy:
        notes.append("Energy: not known; the GPUs of these runs had no counter, or it was not read.")
    others = [state for state in states if state.result is None]
    attempts = {state.run.label: len(state.run.directory(root).attempts()) for state in others}
    if tried := [label for label, count in attempts.items() if count]:
        known_s = math.fsum(_attempts_s(state, root) or 0 for state in others)
        count, took = sum(attempts.values()), f", which took {duration(known_s)} of wall-clock time" if known_s else ""
        said = f"{count} attempt{'s' if count > 1 else ''} of runs that are not finished: {first_of(tried, 3)}{took}"
        notes.append(f"Not in the table: {said}.")
    return notes


def _costs(states: Sequence[RunState], energy: bool) -> list[str]:
    results = [state.result for state in states if state.result is not None]
    time = Estimate.of([result.train_time_s for result in results])
    speed = Estimate.of([result.images_per_s for result in results])
    kwh = energy_kwh(results)
    return [
        f"{len(results)}/{len(states)}",
        duration(time.mean) or "-",
        duration(math.fsum(result.train_time_s for result in results)) if results else "-",
        hours(math.fsum(result.gpu_hours for result in results)),
        "-" if speed.mean is None else f"{speed.mean:,.0f}",
        *(["-" if kwh is None else f"{kwh:.3g}"] if energy else []),
        str(sum(result.attempts for result in results)),
    ]


def _attempts_s(state: RunState, root: Path) -> float | None:
    """The wall-clock time of all attempts of a run; None if one of them has left no record of it."""
    try:
        exits = [read_json(attempt.exit_json) for attempt in state.run.directory(root).attempts()]
    except RunError:
        return None
    found = [(each or {}).get("duration_s") for each in exits]
    times = [float(each) for each in found if isinstance(each, int | float)]
    return math.fsum(times) if times and len(times) == len(found) else None

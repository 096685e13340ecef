"""The fifth section: spatial structure over the training, with initialisation and chance, as `vitpa analyze` measured it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.report.collect import by_cell
from jobs.report.document.cells import CellName, shown_cells
from jobs.report.document.content import Block, Chart, Charts, Line, Point, Section, Table, Text
from jobs.report.status import first_of
from jobs.state import RunState
from vitpa.analysis.findings import AVERAGED, MEANINGS, MEASURES, Finding, read_structure, unusable_reason
from vitpa.records import RunError
from vitpa.statistics import Estimate

EPOCHS = 8  # columns of a table
HOW = (
    "Means over the measured seeds (bands: 95 % t intervals), and for attention over layers and heads. Epoch 0 is the "
    "initialisation. Chance: the patches of a run change places at random; its line is what is expected then, and 95 % of the "
    "orders fall into the grey band. Chance depends on how uneven a run's own map is: the table has it for each cell, as "
    "means over the seeds, and the band in a chart reaches from the lowest to the highest of the cells."
)


@dataclass(frozen=True)
class Measured:
    """A run's numbers that are means over layers and heads, or of no attention; by measure and epoch."""

    findings: dict[tuple[str, float], Finding]
    grid: int  # patches along a side
    neighbours: int
    averaged: bool  # at the end

    @property
    def epochs(self) -> list[float]:
        """After which it was measured."""
        return sorted({epoch for _, epoch in self.findings})


def section(states: Sequence[RunState], root: Path, command: str) -> Section:
    """The structure of the finished runs below `root`; `command` measures it."""
    done = [state for state in states if state.state == "done" and state.run.config.model.kind == "vit"]
    without = [state.run.label for state in states if state.state == "done" and state.run.config.model.kind != "vit"]
    read = {state.run.signature: _read(state, root) for state in done}
    measured = {signature: found for signature, found in read.items() if isinstance(found, Measured)}
    notes = _notes({state.run.label: read[state.run.signature] for state in done}, command)
    if without:
        notes.append(f"{first_of(without)}: a network without positional encodings; there is nothing to measure.")
    blocks: list[Block] = []
    if measured:
        blocks += [Text([HOW]), Text(_meanings(measured.values()))]
    for dataset in dict.fromkeys(state.run.dataset for state in done):
        cells = by_cell([state for state in done if state.run.dataset == dataset and state.run.signature in measured])
        if cells:
            named = [(name, [measured[each.run.signature] for each in members]) for name, members in shown_cells(cells)]
            blocks.append(_of_dataset(dataset, named))
    if not done:
        notes.append("No run is finished yet; then: " + command)
    return Section("structure", "Spatial structure over the training", [*blocks, *([Text(notes)] if notes else [])], [command])


def _read(state: RunState, root: Path) -> Measured | str:
    """What was found about a finished run; or why that cannot be used."""
    try:
        read = read_structure(state.run.directory(root).path / "analysis")
    except RunError as error:
        return str(error)
    if read is None:
        return "not analysed yet"
    record, findings = read
    assert state.result is not None
    if reason := unusable_reason(record, state.run.config, state.result):
        return reason
    overall = {(each.measure, each.epoch): each for each in findings if each.layer is None}
    return Measured(overall, record.grid, record.neighbours, bool(record.averaged_epochs))


def _notes(read: dict[str, Measured | str], command: str) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for label, found in read.items():
        if isinstance(found, str):
            reasons.setdefault(found, []).append(label)
    return [f"{first_of(labels, 3)}: {reason}; measure with: {command}" for reason, labels in reasons.items()]


def _meanings(runs: Iterable[Measured]) -> list[str]:
    """What the measures in these runs mean, a line for each, and how large the images' grids of patches are."""
    runs = list(runs)
    sides, counts = (sorted(set(its)) for its in ([run.grid for run in runs], [run.neighbours for run in runs]))
    grids = ", ".join(f"{side} x {side}" for side in sides)
    patches = f"Images are grids of {grids} patches; neighbours of a patch: the {' or '.join(map(str, counts))} nearest."
    found = {measure for run in runs for measure, _ in run.findings}
    averaged = [AVERAGED] if any(run.averaged for run in runs) else []
    return [patches, *averaged, *(f"{about['what']}: {MEANINGS[name]}." for name, about in MEASURES.items() if name in found)]


def _of_dataset(dataset: str, cells: Sequence[tuple[CellName, Sequence[Measured]]]) -> Charts:
    """A chart for each measure, and a table of all."""
    charts, rows = list[Chart](), list[list[str]]()
    epochs = sorted({epoch for _, members in cells for each in members for epoch in each.epochs})
    count = min(EPOCHS, len(epochs))
    some = sorted({epochs[round(index * (len(epochs) - 1) / max(1, count - 1))] for index in range(count)})
    for measure, about in MEASURES.items():
        found = {name: _over_seeds(measure, members) for name, members in cells}
        found = {name: its for name, its in found.items() if its}
        if not found:
            continue
        lines = [Line(name.text, [_point(*each) for each in its.items()], name.colour) for name, its in found.items()]
        chance = {name.text: points for name, members in cells if (points := _chance(measure, members))}
        lines += [Line("chance", _envelope(list(chance.values())), -1)] if chance else []
        what = f"{about['what']} ({about['unit']})"
        own = [[what, name.text, *(_text(its.get(epoch)) for epoch in some)] for name, its in found.items()]
        rows += [*own, *([what, *row] for row in _chance_rows(chance, some))]
        ends = "; ".join(f"{row[1]} {row[2]} initially, {row[-1]} at the end" for row in own)
        title = f"{dataset}: {about['what']}"
        charts.append(Chart(title, about["unit"], f"{title}, in {about['unit']}, over epochs. {ends}", lines))
    header = ["measure", "cell", *("initially" if epoch == 0 else f"epoch {epoch:g}" for epoch in some)]
    seeds = max(len(members) for _, members in cells)
    of = f"{seeds} seeds" if seeds > 1 else "one seed"
    return Charts(charts, Table(f"{dataset}: spatial structure, mean ± standard deviation, {of}", [header, *rows], keys=2))


def _over_seeds(measure: str, members: Sequence[Measured]) -> dict[float, Estimate]:
    """Statistics over the runs of a cell at the epochs that all of them have."""
    own = [each for each in members if any(name == measure for name, _ in each.findings)]
    if not own:
        return {}
    epochs = sorted(set.intersection(*(set(each.epochs) for each in own)))
    return {epoch: Estimate.of([each.findings[measure, epoch].value for each in own]) for epoch in epochs}


def _point(epoch: float, found: Estimate) -> Point:
    assert found.mean is not None
    return Point(epoch, found.mean, found.ci95_low, found.ci95_high)


def _chance(measure: str, runs: Sequence[Measured]) -> list[Point]:
    """What is expected by chance, and the interval: means over the runs of a cell."""
    found: dict[float, list[Finding]] = {}
    for run in runs:
        for (name, epoch), each in run.findings.items():
            if name == measure and each.chance is not None:
                found.setdefault(epoch, []).append(each)

    def mean(findings: Sequence[Finding], name: str) -> float | None:
        return Estimate.of([value for each in findings if (value := getattr(each, name)) is not None]).mean

    points = []
    for epoch, its in sorted(found.items()):
        chance = mean(its, "chance")
        assert chance is not None
        points.append(Point(epoch, chance, mean(its, "chance_low"), mean(its, "chance_high")))
    return points


def _envelope(cells: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean of the cells' chances, with a band that holds the bands of all of them."""
    found: dict[float, list[Point]] = {}
    for point in itertools.chain.from_iterable(cells):
        found.setdefault(point.x, []).append(point)
    return [
        Point(
            epoch,
            math.fsum(point.y for point in its) / len(its),
            min((point.low for point in its if point.low is not None), default=None),
            max((point.high for point in its if point.high is not None), default=None),
        )
        for epoch, its in sorted(found.items())
    ]


def _chance_rows(cells: Mapping[str, Sequence[Point]], epochs: Sequence[float]) -> Iterator[list[str]]:
    """Of each cell what is expected by chance and where 95 % of the orders fall; one row where all cells have the same."""

    def expected(point: Point) -> str:
        return f"{round(point.y, 3) + 0.0:.3f}"  # never -0.000

    def interval(point: Point) -> str:
        return "-" if point.low is None or point.high is None else f"{point.low:.3f} to {point.high:.3f}"

    for title, text in (("chance", expected), ("95 % of chance", interval)):
        texts = {name: {point.x: text(point) for point in points} for name, points in cells.items()}
        rows = {name: [its.get(epoch, "-") for epoch in epochs] for name, its in texts.items()}
        if len({tuple(row) for row in rows.values()}) == 1:
            yield [title, *next(iter(rows.values()))]
        elif rows:
            yield from ([f"{title}, {name}", *row] for name, row in rows.items())


def _text(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.3f}" + (f" ± {found.std:.3f}" if found.std is not None else "")

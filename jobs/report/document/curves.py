"""The fourth section: learning curves, val and train, as means over the finished seeds with their spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.report.collect import by_cell
from jobs.report.document.cells import MAX_CELLS, CellName, shown_cells
from jobs.report.document.content import Block, Chart, Charts, Line, Point, Section, Table, Text
from jobs.state import RunState
from vitpa.metrics_file import read_metrics
from vitpa.statistics import Estimate

MAX_POINTS = 100  # of a line
ROWS = 6  # epochs in the table of a data set
Curve = dict[float, float]  # a value by epoch


@dataclass(frozen=True)
class Quantity:
    """What a chart shows: a column of metrics.jsonl, its unit, the factor to that unit, and the largest value there can be."""

    metric: str
    title: str
    unit: str
    factor: float = 1
    most: float = math.inf


QUANTITIES = (
    Quantity("", "top-1 accuracy", "%", 100, 100),  # the one that counts, of val or of what was held out
    Quantity("train/top1", "top-1 accuracy on train, as augmented", "%", 100, 100),
    Quantity("val/loss", "loss", "nats"),  # of the weights' average where a run keeps one, as is the accuracy
    Quantity("train/loss", "loss on train, as optimised", "nats"),
)


def section(states: Sequence[RunState], root: Path, command: str) -> Section:
    """The curves of the runs below `root`, a group of charts for each data set."""
    blocks: list[Block] = []
    for dataset in dict.fromkeys(state.run.dataset for state in states):
        cells = by_cell([state for state in states if state.run.dataset == dataset])
        named = shown_cells(cells)
        curves = {name: _curves(members, root) for name, members in named}
        if not any(curve for its in curves.values() for _, _, curve in its):
            blocks.append(Text([f"{dataset}: no run has written a metric yet."]))
            continue
        part = states_part(cells)
        charts = [chart for quantity in QUANTITIES if (chart := _chart(dataset, part, quantity, curves)) is not None]
        blocks.append(Charts(charts, _numbers(dataset, part, curves)))
        if len(cells) > len(named):
            blocks.append(Text([f"{dataset}: the {MAX_CELLS} best of {len(cells)} cells are drawn."]))
    drawn = [line for block in blocks if isinstance(block, Charts) for chart in block.charts for line in chart.lines]
    note = "Lines: means over the finished seeds; bands: ± standard deviation (n - 1)."
    if any(line.dashed for line in drawn):
        note += " Thin dotted lines: single runs that are not finished."
    return Section("curves", "Learning curves", [Text([note]), *blocks], [command])


def states_part(cells: Sequence[Sequence[RunState]]) -> str:
    """The images that the accuracies are of: val, or such as held-out 10 % of train."""
    return cells[0][0].run.config.evaluated_on


def _curves(members: Sequence[RunState], root: Path) -> list[tuple[RunState, str, Curve]]:
    """Of each run of a cell and each quantity: the run, the metric, its values."""
    found = []
    for state in members:
        try:
            rows = read_metrics(state.run.directory(root).metrics_jsonl)
        except OSError:  # its state, or the first section, says so
            continue
        for quantity in QUANTITIES:
            config = state.run.config
            average = "ema_" if config.train.ema_decay and quantity.metric.startswith("val/") else ""
            metric = average + quantity.metric if quantity.metric else config.top1_metric
            curve = {
                round(float(row["epoch"]), 4): quantity.factor * float(row[metric])
                for row in rows
                if _is_number(row.get(metric)) and _is_number(row.get("epoch"))
            }
            if curve:
                found.append((state, quantity.metric, curve))
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def mean_line(curves: Sequence[Curve]) -> list[tuple[float, Estimate]]:
    """Statistics over the curves at the epochs that all of them have, at most MAX_POINTS, the last one among them."""
    if not curves:
        return []
    epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
    step = -(-len(epochs) // MAX_POINTS)
    return [(epoch, Estimate.of([curve[epoch] for curve in curves])) for epoch in epochs[::-1][:: step or 1][::-1]]


def _chart(
    dataset: str, part: str, quantity: Quantity, curves: Mapping[CellName, list[tuple[RunState, str, Curve]]]
) -> Chart | None:
    lines, ends = [], []
    for name, its in curves.items():
        own = [(state, curve) for state, metric, curve in its if metric == quantity.metric]
        finished = mean_line([curve for state, curve in own if state.state == "done"])
        if finished:
            points = [_point(epoch, found, quantity.most) for epoch, found in finished]
            lines.append(Line(name.text, points, name.colour))
            ends.append(f"{name.text} {_value(finished[-1][1])} after epoch {finished[-1][0]:g}")
        for state, curve in own:
            if state.state != "done":
                points = [_point(epoch, found, quantity.most) for epoch, found in mean_line([curve])]
                lines.append(Line(f"{state.run.label} ({state.state})", points, name.colour, dashed=True))
    title = f"{dataset}: {quantity.title}" + (f" on {part}" if not quantity.metric.startswith("train") else "")
    description = f"{title}, in {quantity.unit}, over epochs. " + "; ".join(ends)
    return Chart(title, quantity.unit, description, lines) if lines else None


def _point(epoch: float, found: Estimate, most: float) -> Point:
    """The mean, with a band of a standard deviation as far as there can be values."""
    assert found.mean is not None
    if found.std is None:
        return Point(epoch, found.mean)
    return Point(epoch, found.mean, max(0.0, found.mean - found.std), min(most, found.mean + found.std))


def _value(found: Estimate) -> str:
    return f"{found.mean:.2f}" + (f" ± {found.std:.2f}" if found.std is not None else "")


def _numbers(dataset: str, part: str, curves: Mapping[CellName, list[tuple[RunState, str, Curve]]]) -> Table:
    """Some epochs of the accuracy, in rows."""
    means = {
        name.text: dict(mean_line([curve for state, metric, curve in its if not metric and state.state == "done"]))
        for name, its in curves.items()
    }
    epochs = sorted({epoch for its in means.values() for epoch in its})
    some = sorted({epochs[round(index * (len(epochs) - 1) / (ROWS - 1))] for index in range(ROWS)}) if epochs else []
    rows = [[text, *(_value(its[epoch]) if epoch in its else "-" for epoch in some)] for text, its in means.items()]
    header = ["cell", *(f"epoch {epoch:g}" for epoch in some)]
    return Table(f"{dataset}: top-1 % on {part}, mean ± standard deviation over the finished seeds", [header, *rows])

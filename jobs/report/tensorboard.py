"""`vitpa sweep tensorboard`: a sweep as TensorBoard's users want to see it: each cell's mean over the seeds, with its band.

Views of the runs' metrics.jsonl, written to `<sweep>/tb` and brought up to date where a run has new rows:

    CELL/mean                     each metric's mean over the seeds that have it at that step; how many seeds have a row there
                                  (`seeds`); band/METRIC/lower and .../upper; the final accuracy of finished runs
                                  (final/...), and goodput/ettr
    CELL/mean+std, CELL/mean-std  the band as curves of their own
    .                             the layout of the CUSTOM SCALARS tab, a chart with bands per metric; the columns of HPARAMS:
                                  a row per cell, its place on the sweep's axes, final/... and goodput/ettr

A cell is all axes but the seed. std: n - 1 in the denominator, from two seeds on.
"""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2 as layouts
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

from jobs.context import Context
from jobs.errors import SweepError
from jobs.report.frame import kind_of_texts
from jobs.report.goodput import Goodput
from jobs.state import RunState
from jobs.sweep import SweepDir
from vitpa.event_file import EventFile
from vitpa.metrics_file import read_metrics
from vitpa.records import RunError, read_json, write_json
from vitpa.statistics import Estimate

LOGGER = logging.getLogger(__name__)
UPDATE_EVERY_S = 60.0
INPUTS = "inputs.json"  # of a cell: what its views were written from
FINAL = {  # tags of the final accuracy, with what they are of an Estimate
    "final/top1_mean": "mean",
    "final/top1_std": "std",
    "final/top1_ci95_low": "ci95_low",
    "final/top1_ci95_high": "ci95_high",
    "final/seeds": "n",
}
ETTR = "goodput/ettr"  # of the cell's runs so far (jobs/report/goodput.py)
Curves = dict[str, dict[int, list[float]]]  # by metric and step: a value per seed that has one


@dataclass(frozen=True)
class Cell:
    """The runs of a cell, a seed each."""

    name: str
    states: list[RunState]

    @property
    def place(self) -> dict[str, str]:
        """Where it is: data set, network, and its value on each axis."""
        run = self.states[0].run
        return {"dataset": run.dataset, "attention": run.config.network_name, **run.settings}


def show(context: Context) -> int:
    """Write the views, and unless they are only to be written show them until the user leaves; the exit code."""
    directory, options = SweepDir(context.root, context.sweep.name), context.options
    context.say_changed()
    states = context.look()
    whole = len(states) == len(context.sweep.runs)
    written, cells = write_views(states, context.root, directory.tensorboard, whole=whole)
    context.say(f"{written} of {cells} cells written to {directory.tensorboard}; the others have no new rows")
    if options.no_serve:
        return 0
    logdir = directory.path if options.runs else directory.tensorboard
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1"]
    command += ["--port", str(options.port), "--window_title", f"vitpa: {context.sweep.name}"]
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the server ends with us
    server = subprocess.Popen(command)
    try:
        while server.poll() is None:
            try:
                server.wait(UPDATE_EVERY_S)
            except subprocess.TimeoutExpired:
                write_views(context.look(), context.root, directory.tensorboard, whole=whole)
    except KeyboardInterrupt:
        return 0
    finally:
        server.terminate()
        server.wait()
        signal.signal(signal.SIGTERM, before)
    if server.returncode:
        raise SweepError(f"tensorboard ended with exit code {server.returncode}: see above; another --port may help")
    return 0


def write_views(states: Sequence[RunState], root: Path, folder: Path, *, whole: bool) -> tuple[int, int]:
    """Bring the views of these runs up to date; those of other cells go if these are the whole sweep.

    Returns:
        how many cells were written, and how many there are.
    """
    groups: dict[str, list[RunState]] = {}
    for state in states:
        groups.setdefault(state.run.cell, []).append(state)
    cells = [Cell(name, members) for name, members in groups.items()]
    for path in folder.glob(f"*/{INPUTS}") if whole else ():
        if path.parent.name not in groups:
            shutil.rmtree(path.parent)
    written = [_write_cell(cell, root, folder / cell.name) for cell in cells]
    tags = sorted({tag for inputs in (_inputs(folder / cell.name) for cell in cells) for tag in inputs.get("metrics", [])})
    head = {"metrics": tags, "cells": [cell.place for cell in cells]}
    before = _inputs(folder).get("head")
    if before is None or (whole and before != head):
        _replace(folder, [(None, _layout(tags)), (None, _columns(cells))])
        write_json(folder / INPUTS, {"head": head})
    return sum(written), len(cells)


def _inputs(folder: Path) -> dict[str, Any]:
    """What the views in a folder were written from; empty if that is not known."""
    try:
        return read_json(folder / INPUTS) or {}
    except RunError:
        return {}


def _write_cell(cell: Cell, root: Path, folder: Path) -> bool:
    """Write the three runs of a cell; False if nothing is new, or nothing is there yet."""
    runs: dict[str, list[Any]] = {}
    for state in cell.states:
        path = state.run.directory(root).metrics_jsonl
        if path.is_file():
            found = path.stat()
            runs[state.run.signature] = [found.st_size, found.st_mtime_ns, state.result is not None]
    if not runs or _inputs(folder).get("runs") == runs:
        return False
    curves, counts = _curves([read_metrics(state.run.directory(root).metrics_jsonl) for state in cell.states])
    mean, upper, lower = [], [], []
    for tag, values in curves.items():
        for step, its in values.items():
            estimate = Estimate.of(its)
            if estimate.mean is None:
                continue
            mean.append((step, _scalar(tag, estimate.mean)))
            if estimate.std is not None:
                above, below = estimate.mean + estimate.std, estimate.mean - estimate.std
                upper.append((step, _scalar(tag, above)))
                lower.append((step, _scalar(tag, below)))
                mean.append((step, _scalar(_band(tag, "upper"), above)))
                mean.append((step, _scalar(_band(tag, "lower"), below)))
    mean += [(step, _scalar("seeds", count)) for step, count in counts.items()]
    _replace(folder / "mean", [*_session(cell, Goodput.of_runs(cell.states, root)), *mean])
    _replace(folder / "mean+std", upper)
    _replace(folder / "mean-std", lower)
    write_json(folder / INPUTS, {"runs": runs, "metrics": list(curves)})
    return True


def _curves(rows_of_seeds: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[Curves, dict[int, int]]:
    """The values of each metric at each step, and of how many seeds there is a row at a step."""
    curves: Curves = {}
    counts: dict[int, int] = {}
    for rows in rows_of_seeds:
        own: dict[str, dict[int, float]] = {}  # of one step the last row counts
        for row in rows:
            for tag, value in row.items():
                if tag not in ("step", "epoch") and isinstance(value, int | float):
                    own.setdefault(tag, {})[row["step"]] = value
        for tag, values in own.items():
            for step, value in values.items():
                curves.setdefault(tag, {}).setdefault(step, []).append(value)
        for step in sorted({row["step"] for row in rows}):
            counts[step] = counts.get(step, 0) + 1
    return {tag: dict(sorted(values.items())) for tag, values in curves.items()}, dict(sorted(counts.items()))


def _replace(folder: Path, summaries: Sequence[tuple[int | None, Summary]]) -> None:
    """Write an event file in place of those that are there: the new one is there before they go, and purges what they have."""
    old = list(folder.glob("events.out.tfevents.*"))
    events = EventFile(folder, 0, 0.0)
    for step, summary in summaries:
        events.add(summary, step)
    events.close()
    for path in old:
        path.unlink()


def _scalar(tag: str, value: float) -> Summary:
    return Summary(value=[Summary.Value(tag=tag, simple_value=value)])


def _band(tag: str, side: str) -> str:
    return f"band/{tag}/{side}"


def _session(cell: Cell, goodput: Goodput | None) -> list[tuple[int | None, Summary]]:
    """The cell as a row of HPARAMS, with the final accuracy of its finished runs, and what share of the time trained them."""
    results = [state.result for state in cell.states if state.result is not None]
    found = Estimate.of([result.top1 for result in results])
    step = max((result.steps for result in results), default=0)
    summaries: list[tuple[int | None, Summary]] = [(None, hparams.hparams_pb(_typed(cell.place), trial_id=cell.name))]
    for tag, name in FINAL.items():
        if (value := getattr(found, name)) is not None and results:
            summaries.append((step, _scalar(tag, value)))
    if goodput is not None and goodput.ettr is not None:
        summaries.append((step, _scalar(ETTR, goodput.ettr)))
    status = Status.STATUS_SUCCESS if len(results) == len(cell.states) else Status.STATUS_RUNNING
    end = metadata.create_summary_metadata(HParamsPluginData(session_end_info=SessionEndInfo(status=status)))
    tag = metadata.SESSION_END_INFO_TAG
    return [*summaries, (None, Summary(value=[Summary.Value(tag=tag, metadata=end, tensor=metadata.NULL_TENSOR)]))]


def _typed(place: Mapping[str, str]) -> dict[str, str | float]:
    return {name: kind_of_texts([text])(text) for name, text in place.items()}


def _columns(cells: Sequence[Cell]) -> Summary:
    """What HPARAMS has a column for: the axes along which cells differ, and the final accuracy."""
    places = [_typed(cell.place) for cell in cells]
    infos = []
    for name in places[0] if places else ():
        values = list(dict.fromkeys(place[name] for place in places))
        if len(values) > 1 or name == "attention":
            same = [value if isinstance(value, str) else float(value) for value in values]
            domain = hparams.Discrete(same if len({type(value) for value in same}) == 1 else list(map(str, same)))
            infos.append(hparams.HParam(name, domain))
    metrics = [hparams.Metric(tag, display_name=tag.partition("/")[2]) for tag in (*FINAL, ETTR)]
    return hparams.hparams_config_pb(infos, metrics)


def _layout(tags: Sequence[str]) -> Summary:
    """The CUSTOM SCALARS tab: of each metric a chart with the band of every cell's mean, val before train."""
    groups: dict[str, list[Any]] = {}
    for tag in sorted(tags, key=lambda tag: (not tag.startswith(("val/", "ema_val/")), tag)):
        series = layouts.MarginChartContent.Series(value=tag, lower=_band(tag, "lower"), upper=_band(tag, "upper"))
        chart = layouts.Chart(title=tag, margin=layouts.MarginChartContent(series=[series]))
        groups.setdefault(tag.partition("/")[0], []).append(chart)
    layout = layouts.Layout(category=[layouts.Category(title=title, chart=charts) for title, charts in groups.items()])
    tensor = TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()], tensor_shape=TensorShapeProto())
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="custom_scalars"))
    return Summary(value=[Summary.Value(tag="custom_scalars__config__", tensor=tensor, metadata=plugin)])

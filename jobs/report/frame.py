"""`vitpa sweep frame`: the results of a sweep, or all curves of its runs, as one table for other programs: CSV or Parquet.

A row per run, or per row of the runs' metrics.jsonl. Accuracies are fractions. Runs are written one after the other: the
curves of a large sweep have millions of rows.
"""

from __future__ import annotations

import csv
import logging
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from jobs.context import Context
from jobs.errors import SweepError
from jobs.grid import column_of
from jobs.report.goodput import Goodput
from jobs.report.trackers import write_mlflow, write_wandb
from jobs.state import RunState
from vitpa.arguments import parse_float, parse_integer
from vitpa.metrics_file import read_metrics
from vitpa.mixture import data_version
from vitpa.rundir import Result

LOGGER = logging.getLogger(__name__)
OK, PARTIAL = 0, 4
JUDGED = ("top1", "top5", "loss")  # of the weights' average where a run keeps one, else val_*
IDENTITY = ("signature", "dataset", "attention", "seed", "beton_sha256")  # of a result: said otherwise
RESULT = (*JUDGED, *(name for name in Result.model_fields if name not in IDENTITY))
GOODPUT = tuple(each.name for each in fields(Goodput))
OWN = ("run", *IDENTITY, "state", "evaluated_on", *RESULT, "data_version", "ettr", *GOODPUT, "step", "epoch")  # no axis's
PARQUET = ".parquet"
Row = dict[str, Any]


@dataclass(frozen=True)
class Frame:
    """A table.

    Attributes:
        kinds: The type of each column, in their order: int, float or str.
        parts: Its rows, of a run or more each; a row need not have all columns.
    """

    kinds: Mapping[str, type]
    parts: Iterable[Sequence[Row]]


def frame(context: Context) -> int:
    """Write or print what the options ask for; the exit code: 4 if runs have no result."""
    states, out, options = context.look(), context.options.out, context.options
    if context.drift.describe():
        LOGGER.warning(context.drift.describe())  # what is printed is the table
    if options.wandb or options.mlflow:
        write_runs = write_wandb if options.wandb else write_mlflow
        folder = Path(options.wandb or options.mlflow)
        written = write_runs(states, context.root, context.sweep.name, folder)
        context.say(f"{written} of {len(states)} runs written to {folder}")
        return OK if all(state.result is not None for state in states) else PARTIAL
    table = curves(states, context.root) if options.curves else results(states, context.root)
    if out is None:
        write_csv(table, sys.stdout)
    else:
        write(table, Path(out))
        context.say(f"written to {out}: {', '.join(list(table.kinds)[:8])} and {max(0, len(table.kinds) - 8)} more columns")
    return OK if all(state.result is not None for state in states) else PARTIAL


def results(states: Sequence[RunState], root: Path) -> Frame:
    """A row per run, finished or not: what it is, its state, what it is evaluated on, its result, where its time went."""
    rows = []
    for identity, state in zip(_identities(states), states, strict=True):
        row = {**identity, "state": state.state, "evaluated_on": state.run.config.evaluated_on}
        if state.result is not None:
            row |= {name: getattr(state.result, name) for name in RESULT} | {"data_version": data_version(state.result)}
        if (goodput := Goodput.of_runs([state], root)) is not None:
            row |= goodput.as_json()
        rows.append(row)
    names = list(dict.fromkeys([*(rows[0] if rows else ()), *RESULT, "data_version", "ettr", *GOODPUT]))
    found = {name: _kind(row.get(name) for row in rows) for name in names}
    return Frame(found, [rows])


def curves(states: Sequence[RunState], root: Path) -> Frame:
    """The rows of all metrics.jsonl, each with the run it is of; a column per metric."""
    identities = _identities(states)
    names: dict[str, None] = {}
    for state in states:
        for row in read_metrics(state.run.directory(root).metrics_jsonl):
            names |= dict.fromkeys(row)

    def parts() -> Iterator[list[Row]]:
        for identity, state in zip(identities, states, strict=True):
            yield [{**identity, **row} for row in read_metrics(state.run.directory(root).metrics_jsonl)]

    kinds = {name: _kind(row[name] for row in identities) for name in (identities[0] if identities else ())}
    return Frame({**kinds, **{name: int if name == "step" else float for name in names}}, parts())


def _identities(states: Sequence[RunState]) -> list[Row]:
    """What each run is: name, signature, data set, attention (none of a ResNet), its place on the axes, seed."""
    rows: list[Row] = []
    for state in states:
        run = state.run
        attention = run.attention if run.config.model.kind == "vit" else None
        its: Row = {"run": run.label, "signature": run.signature, "dataset": run.dataset, "attention": attention}
        rows.append({**its, **{column_of(axis, OWN): value for axis, value in run.settings.items()}, "seed": run.seed})
    for column in [column_of(axis, OWN) for axis in states[0].run.settings] if states else ():
        kind = kind_of_texts([row[column] for row in rows])
        for row in rows:
            row[column] = kind(row[column])
    return rows


def kind_of_texts(texts: Sequence[str]) -> type[int] | type[float] | type[str]:
    """What all of them are, as we write numbers; of labels such as 1 and 01 numbers would be the same."""
    numbers = [parse_float(text) for text in texts]
    if None in numbers or len(set(numbers)) < len(set(texts)):
        return str
    return int if all(parse_integer(text) is not None and text.isdigit() for text in texts) else float


def _kind(values: Iterable[object]) -> type:
    kinds = {type(value) for value in values if value is not None}
    return int if kinds == {int} else float if kinds <= {int, float} else str


def write(table: Frame, out: Path) -> None:
    """Write it into a file, which is there when all is written: Parquet if its name ends so, else CSV.

    Raises:
        SweepError: Parquet without pyarrow.
    """
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        if out.suffix == PARQUET:
            _write_parquet(table, draft)
        else:
            with draft.open("x", encoding="utf-8", newline="") as file:
                write_csv(table, file)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def write_csv(table: Frame, file: IO[str]) -> None:
    """Write it as CSV with a header; what a row has not is empty."""
    writer = csv.DictWriter(file, list(table.kinds), lineterminator="\n", restval="")
    writer.writeheader()
    for rows in table.parts:
        writer.writerows(rows)


def _write_parquet(table: Frame, path: Path) -> None:
    try:
        import pyarrow  # noqa: PLC0415 - an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        raise SweepError(
            f"--out: {PARQUET} needs pyarrow, which is not installed; pip install 'vitpa[parquet]', or name a .csv"
        ) from None
    types = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in table.kinds.items()])
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in table.parts:
            writer.write_table(pyarrow.Table.from_pylist(list(rows), schema))

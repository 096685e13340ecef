"""What a run says while it trains: metrics.jsonl for programs, TensorBoard for the eye; and one live line for a person.

metrics.jsonl is the record, TensorBoard is a view of it. On resume the rows up to the restored step are those that the
checkpoint holds; the others go, in TensorBoard, too: one curve over all attempts, whose times never go back. Runs that are
trained together share the line.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import summary

from vitpa.appended_file import AppendedFile
from vitpa.console import PrintableConsole
from vitpa.documents import open_regular
from vitpa.event_file import EventFile
from vitpa.metrics_file import EVALUATED, parse_line, read_metrics, to_line
from vitpa.records import write_atomic
from vitpa.rundir import RunDir
from vitpa.seconds import Seconds
from vitpa.terminal import LINES

PLAIN_LINE_EVERY_S = 10.0
SHOWN: dict[str, Callable[[float], str]] = {  # on the live line
    "train/loss": "loss {:.3f}".format,
    "val/top1": lambda top1: f"{100 * top1:.2f} %",
    "perf/images_per_s": "{:,.0f} images/s".format,
    "perf/images_per_s_together": "{:,.0f} images/s together".format,
}
LOGGER = logging.getLogger(__name__)


class Logs:
    """The files of one attempt; used by the main process only."""

    def __init__(
        self, run: RunDir, *, restored_step: int, restored_rows: str | None, not_before_s: float, tensorboard: bool
    ) -> None:
        """Go on after `restored_step` and the time `not_before_s`.

        `restored_rows` are those up to that step, None for those in the file.
        """
        if restored_rows is None:
            restored_rows = "".join(to_line(row) for row in read_metrics(run.metrics_jsonl) if row["step"] <= restored_step)
        else:
            _warn_if_others(run, restored_step, restored_rows)
        self._lines = [restored_rows]
        write_atomic(run.metrics_jsonl, restored_rows)
        self._file = AppendedFile(run.metrics_jsonl)
        self._board = EventFile(run.tensorboard, restored_step + 1, not_before_s) if tensorboard else None
        self._not_before_s = not_before_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        with suppress(OSError) if error is not None else nullcontext():  # a full disk has been said
            self._file.close()
        if self._board is not None:
            with suppress(OSError) if error is not None else nullcontext():
                self._board.close()

    @property
    def rows(self) -> str:
        """What metrics.jsonl holds."""
        return "".join(self._lines)

    @property
    def evaluated_at(self) -> int | None:
        """The step of the last row, if it is an evaluation's."""
        last = self.rows.rstrip("\n").rpartition("\n")[2]
        row = parse_line(last) if last else {}
        return row["step"] if EVALUATED[0] in row else None

    @property
    def wall_time_s(self) -> float:
        """The last time written, in seconds since the epoch: what comes after it in this run is not earlier."""
        return self._not_before_s if self._board is None else self._board.wall_time_s

    def row(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Record `metrics` after `step` optimiser steps: one row, one point on each curve. A full disk gets them later."""
        line = to_line({"step": step, "epoch": round(epoch, 4), **metrics})
        self._lines.append(line)
        self._file.append(line.encode())
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add(summary.scalar(name, value), step)
            self._board.flush()

    def goodput(self, step: int, seconds: Seconds) -> None:
        """Show in TensorBoard where this attempt's time has gone up to `step`: goodput/ettr, goodput/steps_s, ..."""
        if self._board is not None:
            for name, value in {"ettr": seconds.ettr, **seconds.by_part()}.items():
                self._board.add(summary.scalar(f"goodput/{name}", value), step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Show an image (C, H, W), uint8 or floats in [0, 1], in TensorBoard."""
        if self._board is not None:
            self._board.add(summary.image(name, image, dataformats="CHW"), step)

    def hparams(self, parameters: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Show the run in TensorBoard's HPARAMS tab, `parameters` with their sections as section.key.

        Written into the run's own directory, unlike add_hparams.
        """
        if self._board is not None:
            flat: dict[str, Any] = {}
            for name, value in parameters.items():
                flat |= {f"{name}.{key}": its for key, its in value.items()} if isinstance(value, Mapping) else {name: value}
            plain = {key: its if isinstance(its, bool | int | float | str) else str(its) for key, its in flat.items()}
            for each in summary.hparams(plain, dict(metrics)):
                self._board.add(each)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        if self._board is not None:
            self._board.flush()

    def sync(self) -> None:
        """Have the disk hold all rows: what is written next relies on them, also after a crash of the machine."""
        self.flush()
        self._file.sync()


def _warn_if_others(run: RunDir, step: int, rows: str) -> None:
    """Say so if metrics.jsonl does not begin with `rows`, those up to `step` by the checkpoint."""
    path = run.metrics_jsonl
    try:
        with open_regular(path) as file:
            found = file.read(len(rows.encode()))
    except FileNotFoundError:
        found = b""
    pairs = zip(found.splitlines(True), rows.encode().splitlines(True), strict=False)
    if not found.startswith(rows.encode()):
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        what = f"damaged, cut or edited from line {same + 1} on; its rows up to step {step} are restored from the checkpoint"
        LOGGER.warning(f"{path}: {what}")


class ProgressLine:
    """One live line on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(
        self, name: str, steps_total: int, step: int, top1_name: str = "val top-1", *, work: Callable[[int], float] = float
    ) -> None:
        """`work` is what the first so many steps take, in any unit: steps on larger images take longer."""
        self._name, self._total, self._top1_name, self._work = name, steps_total, top1_name, work
        self._shown: dict[str, float] = {}
        self._first_step, self._started_s, self._printed_s = step, time.monotonic(), time.monotonic()
        self._live: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            shown = TextColumn("{task.fields[metrics]}", markup=False)
            self._live = Progress(*columns, shown, console=PrintableConsole(stderr=True))
            self._task = self._live.add_task(name, total=work(steps_total), metrics="")
            self._live.update(self._task, completed=work(step))
            self._live.start()
            # as they are: print() takes [this] for markup and breaks long paths
            LINES.print_above = partial(self._live.console.out, highlight=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            LINES.print_above = None
            self._live.stop()  # leaves its last state on the screen

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Take over the newest values of the metrics that are shown."""
        self._shown.update(metrics)

    def move(self, step: int) -> None:
        """The run has done `step` steps."""
        now_s = time.monotonic()
        if self._live is not None:
            self._live.update(self._task, completed=self._work(step), metrics=self._text())
        elif now_s - self._printed_s >= PLAIN_LINE_EVERY_S:
            self._printed_s = now_s
            left, done = (
                self._work(end) - self._work(begin) for begin, end in ((step, self._total), (self._first_step, step))
            )
            left_s = left * (now_s - self._started_s) / done if done else 0.0
            LOGGER.info(f"{self._name}: step {step}/{self._total} {self._text()} {left_s:.0f} s left")

    def _text(self) -> str:
        names = {"val/top1": f"{self._top1_name} "}
        return "  ".join(names.get(name, "") + form(self._shown[name]) for name, form in SHOWN.items() if name in self._shown)

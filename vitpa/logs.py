"""What a run says while it trains: metrics.jsonl for programs, TensorBoard for the eye; and one live line for a person.

metrics.jsonl is the record, TensorBoard is a view of it. On resume the rows beyond the restored step go, here and, through
`purge_step`, in TensorBoard: one curve over all attempts. Runs that are trained together share the line.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from vitpa.rundir import RunDir, write_atomic

PLAIN_LINE_EVERY_S = 10.0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a half-written last line is ignored, a damaged one before it with a warning."""
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text(errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            warnings.warn(f"{path}: line {number} is damaged and left out", RuntimeWarning, stacklevel=2)
    return rows


class Logs:
    """The files of one attempt; used by the main process only."""

    def __init__(self, run: RunDir, *, restored_step: int, tensorboard: bool) -> None:
        kept = [row for row in read_metrics(run.metrics_jsonl) if row["step"] <= restored_step]
        write_atomic(run.metrics_jsonl, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = run.metrics_jsonl.open("a", buffering=1)
        self._board = None
        if tensorboard:
            wait_until_newest(run.tensorboard)
            self._board = SummaryWriter(str(run.tensorboard), purge_step=restored_step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def row(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Record `metrics` after `step` optimiser steps: one row, one point on each curve."""
        self._file.write(json.dumps({"step": step, "epoch": round(epoch, 4), **metrics}) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Show an image (C, H, W), uint8 or floats in [0, 1], in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, image, step)

    def hparams(self, parameters: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Show the run in TensorBoard's HPARAMS tab. Written into the run's own directory, unlike add_hparams."""
        if self._board is not None:
            flat = {
                name: value if isinstance(value, bool | int | float | str) else str(value)
                for name, value in parameters.items()
            }
            for summary in hparams(flat, dict(metrics)):
                self._board._get_file_writer().add_summary(summary)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()
        if self._board is not None:
            self._board.flush()


def wait_until_newest(folder: Path) -> None:
    """Wait until an event file opened now sorts after those in `folder`: TensorBoard reads them by the second in their names.

    At most five seconds: beyond that the clocks of two nodes disagree, and only the order of points suffers.
    """
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    late_s = max(seconds, default=0) + 1 - time.time()
    if 0 < late_s < 5:
        time.sleep(late_s)


class ProgressLine:
    """One live line on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, name: str, steps_total: int, step: int) -> None:
        self._name, self._total = name, steps_total
        self._shown: dict[str, float] = {}
        self._first_step, self._step, self._started_s, self._printed_s = step, step, time.monotonic(), time.monotonic()
        self._live: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn(), TimeRemainingColumn())
            self._live = Progress(*columns, TextColumn("{task.fields[metrics]}"), console=Console(stderr=True))
            self._task = self._live.add_task(name, total=steps_total, completed=step, metrics="")
            self._live.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()  # leaves its last state on the screen

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Take over the newest values of the metrics that are shown."""
        self._shown.update(metrics)

    def move(self, step: int) -> None:
        """The run has done `step` steps."""
        self._step = step
        now_s = time.monotonic()
        if self._live is not None:
            self._live.update(self._task, completed=step, metrics=self._text())
        elif now_s - self._printed_s >= PLAIN_LINE_EVERY_S:
            self._printed_s = now_s
            left_s = (self._total - step) * (now_s - self._started_s) / max(1, step - self._first_step)
            print(f"{self._name}: step {step}/{self._total} {self._text()} {left_s:.0f} s left", file=sys.stderr, flush=True)

    def _text(self) -> str:
        shown = self._shown
        parts = []
        if "train/loss" in shown:
            parts.append(f"loss {shown['train/loss']:.3f}")
        if "val/top1" in shown:
            parts.append(f"val top-1 {100 * shown['val/top1']:.2f} %")
        if "perf/images_per_s" in shown:
            parts.append(f"{shown['perf/images_per_s']:,.0f} images/s")
        if "perf/images_per_s_together" in shown:
            parts.append(f"{shown['perf/images_per_s_together']:,.0f} images/s together")
        return "  ".join(parts)

    def say(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        if self._live is not None:
            self._live.console.out(text, highlight=False)  # as it is: print() takes [this] for markup and breaks long paths
        else:
            print(text, file=sys.stderr, flush=True)

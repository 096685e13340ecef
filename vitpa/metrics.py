"""The metrics of a training, from sums on the device to rows of metrics.jsonl; no step waits for them.

A window is some training steps; its row is written when its sums have arrived on the host, some steps after its last one.
The device goes on meanwhile, by no more than one window and an evaluation. The bytes of a row are vitpa/metrics_file.py's.

Axes: R replicas.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from vitpa.distributed import Group
from vitpa.logs import ProgressLine
from vitpa.replica import Replica
from vitpa.step.accumulator import NEVER, AsyncHostCopy
from vitpa.step.step import ReplicaSteps


class _OpenRow(NamedTuple):
    """A row that is not written yet, of `steps` steps (0: an evaluation) in this process up to `step`."""

    step: int
    steps: int
    values: AsyncHostCopy


class Metrics:
    """The rows of runs that are trained together, and their means on the live line.

    `poll` and `flush` return the replicas whose loss or gradient was not finite in the window that they have written, each
    with the first such step: no more rows are written of them, and the caller drops them.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        steps: ReplicaSteps,
        group: Group,
        *,
        global_batch_size: int,
        num_val: int,
        epoch_steps: int,
    ) -> None:
        """`num_val` images are in the val split, `epoch_steps` steps in an epoch."""
        self._replicas, self._steps, self._group = replicas, steps, group
        self._global_batch_size, self._num_val, self._epoch_steps = global_batch_size, num_val, epoch_steps
        self._line: ProgressLine | None = None
        self._window: _OpenRow | None = None
        self._evaluation: _OpenRow | None = None
        self._nonfinite: set[int] = set()  # replicas whose loss or gradient was not finite
        self._closed_step = 0  # at which the last window ended
        self._row_s = 0.0  # time.monotonic() of the last row

    def begin(self, step: int, line: ProgressLine | None) -> None:
        """Begin a window after `step` steps; the means go to `line`, in the main process."""
        self._line, self._closed_step, self._row_s = line, step, time.monotonic()

    def close(self, step: int) -> None:
        """End the window of training metrics at `step`; `flush` has written the one before. All processes at once."""
        assert self._window is None
        accumulator = self._steps.accumulator
        self._group.all_reduce_sum(accumulator.sums)
        self._group.all_reduce_min(accumulator.first_nonfinite_step)
        self._window = _OpenRow(step, step - self._closed_step, accumulator.take())
        self._closed_step = step

    def evaluated(self, step: int, sums: Tensor) -> None:
        """Take the sums (R, 4 or 8) over all processes of an evaluation at `step`, as `ReplicaSteps.evaluate` gives them."""
        self._evaluation = _OpenRow(step, 0, AsyncHostCopy.start(sums.clone()))

    def poll(self) -> dict[int, int]:
        """Write the rows that have arrived."""
        if self._evaluation is not None and self._evaluation.values.done():
            return self.flush()
        if self._window is not None and self._window.values.done():
            return self._write_window()
        return {}

    def flush(self) -> dict[int, int]:
        """Write the rows that are open, waiting for them: of the window, then of the evaluation after it."""
        nonfinite = self._write_window()
        return nonfinite | self._write_evaluation()

    def _write_window(self) -> dict[int, int]:
        if self._window is None:
            return {}
        (step, steps, copy), self._window = self._window, None
        values = copy.result().tolist()
        first_steps = {number: int(values[number][4]) for number, _ in self._written()}
        nonfinite = {number: first for number, first in first_steps.items() if first < NEVER}
        self._nonfinite |= nonfinite.keys()
        now_s = time.monotonic()
        images_per_s = steps * self._global_batch_size / (now_s - self._row_s)
        self._row_s = now_s
        shown = []
        for number, replica in self._written():
            loss_sum, correct, images, grad_norm, _ = values[number]
            metrics = {
                "train/loss": loss_sum / images,
                "train/top1": correct / images,
                "train/lr": self._steps.learning_rate(number, step - 1),
                "train/grad_norm": grad_norm,
                "perf/images_per_s": images_per_s,
                "time_s": replica.train_time_s,
            }
            if replica.logs is not None:
                replica.logs.row(step, step / self._epoch_steps, metrics)
            shown.append(metrics)
        self._show(shown)
        return nonfinite

    def _write_evaluation(self) -> dict[int, int]:
        if self._evaluation is None:
            return {}
        (step, _, copy), self._evaluation = self._evaluation, None
        found = evaluation_metrics(copy.result(), num_samples=self._num_val)
        self._row_s = time.monotonic()
        nonfinite = {number: step for number, _ in self._written() if not all(map(math.isfinite, found[number].values()))}
        self._nonfinite |= nonfinite.keys()
        for number, replica in self._written():
            replica.progress.val = found[number]
            if replica.logs is not None:
                replica.logs.row(step, step // self._epoch_steps, found[number])
        counts = self._replicas[0].config.top1_metric
        self._show([{**found[number], "val/top1": found[number][counts]} for number, _ in self._written()])
        return nonfinite

    def _written(self) -> Iterator[tuple[int, Replica]]:
        """The replicas that rows are written of, with their numbers."""
        for number, replica in enumerate(self._replicas):
            if not replica.left and number not in self._nonfinite:
                yield number, replica

    def _show(self, metrics: Sequence[dict[str, float]]) -> None:
        """Put the mean of the replicas' metrics on the live line, and the images per second of all."""
        if self._line is not None and metrics:
            means = {name: sum(each[name] for each in metrics) / len(metrics) for name in metrics[0]}
            if "perf/images_per_s" in means and len(metrics) > 1:
                means["perf/images_per_s_together"] = means.pop("perf/images_per_s") * len(metrics)
            self._line.metrics(means)


def evaluation_metrics(sums: Tensor, *, num_samples: int) -> list[dict[str, float]]:
    """Per replica: top-1, top-5 (fractions) and cross-entropy without smoothing, from the sums over all processes.

    `sums` are (R, 4), or (R, 8) with those of the weights' average after those of the weights.
    """
    metrics = []
    for values in sums.tolist():
        found: dict[str, float] = {}
        for prefix, at in zip(("", "ema_"), range(0, len(values), 4), strict=False):
            loss_sum, top1, top5, count = values[at : at + 4]
            assert count == num_samples, f"evaluated {count} of {num_samples} images"  # every image once
            its = {"val/loss": loss_sum / count, "val/top1": top1 / count, "val/top5": top5 / count}
            found |= {prefix + name: value for name, value in its.items()}
        metrics.append(found)
    return metrics

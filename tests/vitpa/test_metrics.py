"""Metrics from the device's sums to rows, with sums that are put there by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from vitpa.config import RunConfig
from vitpa.distributed import Group
from vitpa.logs import Logs, ProgressLine
from vitpa.metrics import Metrics, evaluation_metrics
from vitpa.replica import Replica
from vitpa.step.accumulator import AsyncHostCopy, MetricAccumulator
from vitpa.step.step import ReplicaSteps

CPU = torch.device("cpu")
EPOCH_STEPS, BATCH = 10, 8


class Rows:
    """Stands in for Logs and for the live line."""

    def __init__(self) -> None:
        self.found: list[tuple[int, float, dict[str, float]]] = []
        self.means: dict[str, float] = {}

    def row(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        self.found.append((step, epoch, dict(metrics)))

    def metrics(self, metrics: Mapping[str, float]) -> None:
        self.means.update(metrics)


class Case:
    """Metrics of so many runs, after `step` steps."""

    def __init__(self, runs: int, step: int = 0) -> None:
        self.accumulator = MetricAccumulator(runs, CPU)
        self.logs, self.line = [Rows() for _ in range(runs)], Rows()
        self.replicas = [
            Replica(RunConfig(dataset="digits", seed=seed), cast(Any, None), None, logs=cast(Logs, rows))
            for seed, rows in enumerate(self.logs)
        ]
        steps = SimpleNamespace(accumulator=self.accumulator, learning_rate=lambda _, step: step / 100)
        self.metrics = Metrics(
            self.replicas,
            cast(ReplicaSteps, steps),
            Group(0, 1, 0, 1, CPU),
            global_batch_size=BATCH,
            num_val=4,
            epoch_steps=EPOCH_STEPS,
        )
        self.metrics.begin(step, cast(ProgressLine, self.line))

    def step(self, number: int, *losses: float) -> None:
        values = torch.tensor(losses)
        self.accumulator.add(values, torch.full((len(losses),), 2), BATCH)
        self.accumulator.check(number, values, torch.full((len(losses),), 0.5))


def sums(*losses: float) -> torch.Tensor:
    return torch.tensor([[loss, 1, 3, 4] for loss in losses], dtype=torch.float64)


def test_a_row_is_the_mean_of_its_window_and_is_written_when_it_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, step=10)
    for number in (11, 12):
        case.step(number, 1.0 * number, 2.0 * number)
    case.metrics.close(12)
    assert case.accumulator.sums.tolist() == [[0.0] * 3] * 2
    with monkeypatch.context() as patch:
        patch.setattr(AsyncHostCopy, "done", lambda _: False)
        assert case.metrics.poll() == {}
        assert not case.logs[0].found
    assert case.metrics.poll() == {}
    for rows, loss in zip(case.logs, (11.5, 23.0), strict=True):
        ((step, epoch, row),) = rows.found
        assert (step, epoch) == (12, 1.2)
        assert list(row) == ["train/loss", "train/top1", "train/lr", "train/grad_norm", "perf/images_per_s", "time_s"]
        assert (row["train/loss"], row["train/top1"], row["train/lr"], row["train/grad_norm"]) == (loss, 2 / BATCH, 0.11, 0.5)
    assert case.line.means["train/loss"] == 17.25
    rate = case.logs[0].found[0][2]["perf/images_per_s"]
    assert case.line.means["perf/images_per_s_together"] == pytest.approx(2 * rate)
    assert case.metrics.poll() == case.metrics.flush() == {}
    assert len(case.logs[0].found) == 1


def test_an_evaluation_comes_after_the_window_before_it() -> None:
    case = Case(1)
    case.step(10, 1.0)
    case.metrics.close(10)
    case.metrics.evaluated(10, sums(8.0))
    assert case.metrics.flush() == {}
    (train, val) = case.logs[0].found
    assert train[:2] == (10, 1.0) and "train/loss" in train[2]
    assert val == (10, 1, {"val/loss": 2.0, "val/top1": 0.25, "val/top5": 0.75})
    assert case.replicas[0].progress.val == val[2]


def test_of_what_is_not_finite_nothing_is_written() -> None:
    case = Case(3)
    case.replicas[2].left = "stopped"
    case.step(9, 1.0, math.nan, math.nan)
    case.step(10, 1.0, 1.0, 1.0)
    case.metrics.close(10)
    case.metrics.evaluated(10, sums(8.0, math.nan, 8.0))
    assert case.metrics.flush() == {1: 9}  # who has left is nobody's business any more
    assert [len(rows.found) for rows in case.logs] == [2, 0, 0]
    assert case.replicas[1].progress.val == {}
    assert case.line.means["val/loss"] == 2.0
    case.step(11, 1.0, 1.0, 1.0)
    case.metrics.close(11)
    assert case.metrics.flush() == {}  # it is said once
    assert [len(rows.found) for rows in case.logs] == [3, 0, 0]


def test_every_image_is_evaluated_once() -> None:
    with pytest.raises(AssertionError, match=r"evaluated 4\.0 of 5 images"):
        evaluation_metrics(sums(1.0), num_samples=5)

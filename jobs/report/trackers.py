"""The runs of a sweep as folders of Weights & Biases (offline) or MLflow, written from the runs' own files, on a login node.

metrics.jsonl stays the record: a run that has gone on is written anew. Nothing is sent anywhere; the user's next step is
`wandb sync FOLDER/wandb/*` or `mlflow ui --backend-store-uri FOLDER`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from jobs.errors import SweepError
from jobs.state import RunState
from vitpa.metrics_file import read_metrics

Point = tuple[int, dict[str, float]]  # a step, and the metrics after it
METRICS_AT_ONCE, PARAMETERS_AT_ONCE = 1000, 100  # that MLflow takes
T = TypeVar("T")
SIGNATURE = "vitpa.signature"


def write_wandb(states: Sequence[RunState], root: Path, sweep: str, folder: Path) -> int:
    """Write offline runs, with the signature as their id, grouped by cell; how many have begun.

    Raises:
        SweepError: wandb is not installed.
    """
    try:
        import wandb  # noqa: PLC0415 - an extra
    except ImportError:
        raise SweepError("--wandb needs wandb, which is not installed; pip install 'vitpa[wandb]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True)
    started = [(state, points) for state in states if (points := _points(state, root))]
    for state, points in started:
        run = state.run
        for old in folder.glob(f"wandb/offline-run-*-{run.signature}"):
            shutil.rmtree(old)
        its = {"project": sweep, "id": run.signature, "name": run.label, "group": state.run.cell, "config": _parameters(state)}
        tracked = wandb.init(mode="offline", dir=str(folder), settings=settings, **its)
        for step, metrics in points:
            tracked.log(metrics, step=step)
        tracked.summary.update(_final(state))
        tracked.finish()
    wandb.teardown()  # its process has written everything then
    return len(started)


def write_mlflow(states: Sequence[RunState], root: Path, sweep: str, folder: Path) -> int:
    """Write runs into MLflow's file store, in an experiment called as the sweep; how many have begun.

    Raises:
        SweepError: mlflow is not installed.
    """
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # which is what a folder is
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow.entities import Metric, Param  # noqa: PLC0415 - an extra
        from mlflow.tracking import MlflowClient  # noqa: PLC0415
    except ImportError:
        raise SweepError("--mlflow needs mlflow, which is not installed; pip install 'vitpa[mlflow]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=folder.resolve().as_uri())
    found = client.get_experiment_by_name(sweep)
    experiment = client.create_experiment(sweep) if found is None else found.experiment_id
    started = [(state, points) for state in states if (points := _points(state, root))]
    for state, points in started:
        run = state.run
        for old in client.search_runs([experiment], f"tags.`{SIGNATURE}` = '{run.signature}'"):
            client.delete_run(old.info.run_id)
        tags = {SIGNATURE: run.signature, "vitpa.cell": state.run.cell, "vitpa.state": state.state}
        tracked = client.create_run(experiment, run_name=run.label, tags=tags).info.run_id
        for some in _batched((Param(name, str(value)) for name, value in _parameters(state).items()), PARAMETERS_AT_ONCE):
            client.log_batch(tracked, params=some)
        last = max(step for step, _ in points)
        for some in _batched(_values([*points, (last, _final(state))]), METRICS_AT_ONCE):
            client.log_batch(tracked, metrics=[Metric(name, value, 0, step) for name, value, step in some])
        client.set_terminated(tracked, "FINISHED" if state.result is not None else "RUNNING")
    return len(started)


def _points(state: RunState, root: Path) -> list[Point]:
    """The metrics of a run by step; rows of one step are one point."""
    points: dict[int, dict[str, float]] = {}
    for row in read_metrics(state.run.directory(root).metrics_jsonl):
        numbers = {name: its for name, its in row.items() if name != "step" and isinstance(its, int | float)}
        points.setdefault(row["step"], {}).update(numbers)
    return sorted(points.items())


def _batched(values: Iterable[T], most: int) -> Iterator[list[T]]:
    """The values in lists of at most so many."""
    left = iter(values)
    while some := list(islice(left, most)):
        yield some


def _values(points: Sequence[Point]) -> Iterator[tuple[str, float, int]]:
    for step, metrics in points:
        for name, value in metrics.items():
            yield name, value, step


def _parameters(state: RunState) -> dict[str, Any]:
    """The configuration without `runtime`, by dotted keys, and the place on the axes."""
    flat: dict[str, Any] = {}
    for name, value in state.run.config.model_dump(mode="json", exclude={"runtime"}).items():
        flat |= {f"{name}.{key}": its for key, its in value.items()} if isinstance(value, Mapping) else {name: value}
    return {**flat, **{axis: value for axis, value in state.run.settings.items() if axis not in flat}}


def _final(state: RunState) -> dict[str, float]:
    """What counts of a finished run."""
    its = state.result
    return {} if its is None else {"final/top1": its.top1, "final/top5": its.top5, "final/loss": its.loss}

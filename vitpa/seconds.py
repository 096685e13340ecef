"""Where the time of an attempt went: `attempts/NNNN/seconds.json`, written by the trainer with each checkpoint. Torch-free."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

from pydantic import Field

from vitpa.documents import read_end
from vitpa.metrics_file import parse_line
from vitpa.records import Record, write_json

PARTS = ("imports", "data", "set_up", "restore", "compilation", "steps", "evaluations", "checkpoints")
TAIL_BYTES = 65_536


class Seconds(Record):
    """The seconds of an attempt up to its newest checkpoint, or its orderly end, by part; they add up to its wall-clock time.

    They begin with the process that was started for the training, else when a program that trains has the run. Checkpoints are
    what training waits for: they are written beside it. Of runs that are trained together each has the seconds of all.

    Attributes:
        imports_s: From the start of the process until its command begins; 0 in records of versions that
            had it, and `data_s`, in `set_up_s`.
        data_s: Copying the data to the node, opening them, moving them to the device.
        set_up_s: Building the models, opening the logs.
        steps_s: Training steps, with waiting for their data.
        train_time_s: Of the run, over all attempts, at the newest checkpoint (`Progress.train_time_s`).
        resumed_train_time_s: The same at the checkpoint that the attempt went on from; 0 without one.
        first_step_s: From the beginning until the first optimiser step was done; None before.
        graphs_compiled: Graphs of the step and the evaluation that were compiled.
        graphs_reused: Those that had been compiled by an earlier start.
        lost_steps: Steps of earlier attempts beyond that checkpoint, as far as metrics.jsonl had rows of them.
        lost_s: The time that those took, by the clock of the attempt that did them.
    """

    imports_s: float = Field(0.0, ge=0)
    data_s: float = Field(0.0, ge=0)
    set_up_s: float = Field(ge=0)
    restore_s: float = Field(ge=0)
    compilation_s: float = Field(ge=0)
    steps_s: float = Field(ge=0)
    evaluations_s: float = Field(ge=0)
    checkpoints_s: float = Field(ge=0)
    train_time_s: float = Field(ge=0)
    resumed_train_time_s: float = Field(ge=0)
    first_step_s: float | None = Field(None, ge=0)
    graphs_compiled: int = Field(0, ge=0)
    graphs_reused: int = Field(0, ge=0)
    lost_steps: int = Field(ge=0)
    lost_s: float = Field(ge=0)

    def by_part(self) -> dict[str, float]:
        """The parts, such as steps_s."""
        return {f"{part}_s": getattr(self, f"{part}_s") for part in PARTS}

    @property
    def wall_s(self) -> float:
        """All parts together."""
        return math.fsum(self.by_part().values())

    @property
    def ettr(self) -> float:
        """The share of steps and evaluations in it."""
        return (self.steps_s + self.evaluations_s) / self.wall_s if self.wall_s else 0.0

    def write(self, path: Path) -> None:
        """Write it, atomically; where it cannot be written, as on a full disk, the training goes on without."""
        with suppress(OSError):
            write_json(path, self.model_dump())


def lost_beyond(metrics_jsonl: Path, step: int, train_time_s: float) -> tuple[int, float]:
    """Steps, and their seconds, that the last row of training has beyond those of a checkpoint; none where there is no row."""
    try:
        lines = read_end(metrics_jsonl, TAIL_BYTES).decode(errors="replace").split("\n")
    except OSError:
        return 0, 0.0
    for line in reversed(lines):
        with suppress(ValueError):
            row = parse_line(line)
            if isinstance(row.get("time_s"), int | float):
                return max(0, row["step"] - step), max(0.0, row["time_s"] - train_time_s)
    return 0, 0.0

"""One of the runs that are trained together, as the training sees it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from vitpa.checkpoint import Progress
from vitpa.config import RunConfig
from vitpa.logs import Logs
from vitpa.rundir import RunDir


@dataclass
class Replica:
    """One of the runs that are trained together; most often the only one."""

    config: RunConfig
    run: RunDir
    model: Any  # timm's VisionTransformer: the weights
    progress: Progress = field(default_factory=Progress)  # as of the newest checkpoint, but for the newest evaluation
    rows: str | None = ""  # of metrics.jsonl up to there; None: as the file has them
    logs: Logs | None = None  # in the main process
    left: str = ""  # why it is not trained any more, while the others are
    failed: bool = False  # whether that is a failure
    counted_s: float = 0.0  # time.monotonic() up to which progress.train_time_s counts

    @property
    def train_time_s(self) -> float:
        """Wall-clock time of training over all attempts: steps, evaluations and checkpoints that led to this state."""
        return self.progress.train_time_s + time.monotonic() - self.counted_s

    def count_time(self, now_s: float, gpus: float) -> None:
        """Add the time up to `now_s` (time.monotonic()) to what the run has taken, of so many GPUs."""
        new_s, self.counted_s = now_s - self.counted_s, now_s
        self.progress.train_time_s += new_s
        self.progress.gpu_time_s += new_s * gpus

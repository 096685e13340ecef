"""The state of a training in one process: the runs it trains, their step, data and logs; vitpa/train.py is what happens."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from vitpa import checkpoint
from vitpa.clock import Clock
from vitpa.config import RunConfig
from vitpa.data.open import Data
from vitpa.distributed import Group
from vitpa.energy import EnergyMeter
from vitpa.flops import full_size_epochs
from vitpa.logs import ProgressLine
from vitpa.metrics import Metrics
from vitpa.replica import Replica
from vitpa.step.compile_cache import CompileCache
from vitpa.step.step import ReplicaSteps

LOGGER = logging.getLogger(__name__)


@dataclass
class Training:
    """Everything one process needs to train its runs."""

    config: RunConfig  # of the first; the others may differ as vitpa/together.py says
    group: Group
    data: Data
    replicas: list[Replica]
    steps: ReplicaSteps
    metrics: Metrics
    epoch_steps: int
    step: int = 0  # done, by all
    line: ProgressLine | None = None  # in the main process
    meter: EnergyMeter | None = None
    checkpoints: checkpoint.Writer | None = None  # in the main process
    saved_s: float = 0.0  # time.monotonic() of the newest checkpoint
    polled_s: float = 0.0  # of the last look at the clock and the files `stop`
    clock: Clock = field(default_factory=Clock)
    compile_cache: CompileCache | None = None

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.train.epochs * self.epoch_steps

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0 on."""
        return self.step // self.epoch_steps

    def work(self, step: int) -> float:
        """The arithmetic of the first `step` steps, in that of a step on images of the model's size."""
        return full_size_epochs(self.config, step / self.epoch_steps) * self.epoch_steps

    @property
    def active(self) -> list[tuple[int, Replica]]:
        """The replicas that are still trained, with their numbers."""
        return [(number, replica) for number, replica in enumerate(self.replicas) if not replica.left]


def say(t: Training, text: str) -> None:
    """Log a line, in the main process."""
    if t.group.is_main:
        LOGGER.info(text)

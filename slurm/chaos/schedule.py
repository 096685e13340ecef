"""Which fault strikes when: a Poisson process that a seed replays."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = {
    "trainer killed": "SIGKILL to a run's training process, as the kernel sends when memory runs out",
    "wrapper killed": "SIGKILL to the job's own process, which supervises the training",
    "slurmd killed": "SIGKILL to a node's slurmd alone, which comes back after a while; its jobs go on meanwhile",
    "node down": "SIGKILL to a node's slurmd and all its jobs, as if it had lost power; it comes back after a while",
    "requeue": "scontrol requeue",
    "preemption": "a job of a partition with precedence takes the node",
    "time limit": "the job's time limit is set to what is left of this minute and the next",
    "controller restart": "slurmctld ends, and starts again after a while",
    "launcher killed": "a job is killed whole, and so is the `submit` that is to start its run again, at a random moment",
    "disk full": "for a while nothing can be written below the sweep's root (ENOSPC)",
}
LASTS_S = {  # how long what has no other end stays broken; SLURM misses a node after SlurmdTimeout, 10 s and its next look
    "slurmd killed": (2.0, 60.0),
    "node down": (5.0, 90.0),
    "preemption": (5.0, 60.0),
    "controller restart": (1.0, 30.0),
    "launcher killed": (0.0, 3.0),
    "disk full": (5.0, 60.0),
}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        at_s: Seconds after the first moment at which faults may strike.
        whom: In [0, 1): says which of the runs that train then, in order of their names, is struck.
        lasts_s: How long it stays broken; of `launcher killed`, how long the launcher lives. 0 where that has no meaning.
    """

    at_s: float
    kind: str
    whom: float
    lasts_s: float


def schedule(seed: int, *, mean_s: float, duration_s: float, kinds: Sequence[str] = tuple(KINDS)) -> list[Fault]:
    """The faults of `duration_s` seconds: a Poisson process with `mean_s` seconds between two on average.

    Kinds come in shuffled rounds, so that each is as frequent as the others and none is missing for long. Equal arguments give
    equal faults on every machine: only `random.Random.random` is used, whose numbers Python promises to keep.
    """
    rng = random.Random(seed)
    faults: list[Fault] = []
    at_s, left = 0.0, [""] * 0
    while kinds:
        at_s -= mean_s * math.log(1.0 - rng.random())
        if at_s >= duration_s:
            break
        left = left or sorted(kinds, key=lambda _: rng.random())
        kind = left.pop()
        low_s, high_s = LASTS_S.get(kind, (0.0, 0.0))
        faults.append(Fault(at_s, kind, rng.random(), low_s + (high_s - low_s) * rng.random()))
    return faults

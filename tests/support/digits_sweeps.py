"""Sweeps of real trainings of the digits on a real SLURM."""

from __future__ import annotations

from jobs.sweep import Run
from tests.support.slurm_sweeps import MODEL, Cell

TRAIN = {"global_batch_size": 64, "precision": "float32"}
DIGITS = {
    "dataset": "digits",
    "model": MODEL,
    "augment": {"crop": "none", "hflip": False},
    "train": {**TRAIN, "epochs": 50},
    "optim": {"warmup_epochs": 0},
}
TERM = "interrupted: signal SIGTERM"


def assert_ended(cell: Cell, run: Run, *expected: str) -> None:
    """How the attempts of a run ended; on a busy machine SIGKILL may come before one that got SIGTERM has written it."""
    ends = cell.ends(run)
    assert len(ends) == len(expected), ends
    for end, wanted in zip(ends, expected, strict=True):
        assert end == wanted or (wanted == TERM and (end == "" or end.startswith(TERM))), ends

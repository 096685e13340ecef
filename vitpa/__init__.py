"""vitpa: what a run is, how it trains, and what it has learnt. Knows nothing of sweeps' jobs or SLURM.

For notebooks: `load_run` and `load_sweep`. Whatever else a program needs it imports from where it is defined.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vitpa import installation

if TYPE_CHECKING:
    from vitpa.trained import TrainedRun, TrainedSweep

__version__ = installation.VERSION
__all__ = ["__version__", "load_run", "load_sweep"]


def load_run(path: str | os.PathLike[str]) -> TrainedRun:
    """The run in a folder, such as `outputs/runs/<signature>` or a link below a sweep's `by-name`.

    Returns:
        its `config`, `result` (None if it is not finished), `metrics` (a pandas DataFrame) and `model()` with its weights.

    Raises:
        RunError: the folder holds no run, or one that cannot be used.
        ConfigError: its configuration has been edited.
    """
    from vitpa import trained  # noqa: PLC0415 - torch and pandas are needed here only

    return trained.load_run(path)


def load_sweep(path: str | os.PathLike[str]) -> TrainedSweep:
    """The sweep in a folder, such as `outputs/sweeps/<name>`.

    Returns:
        its `runs`, and `frame()`: a pandas DataFrame with a row per run; `broken`: why other runs cannot be used.

    Raises:
        RunError: the folder holds no sweep, or its record cannot be used.
    """
    from vitpa import trained  # noqa: PLC0415

    return trained.load_sweep(path)

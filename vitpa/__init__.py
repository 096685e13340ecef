"""vitpa: what a run is and how it trains. Knows nothing of sweeps or SLURM."""

from pathlib import Path

__version__ = "0.1.0"
CODE = Path(__file__).resolve().parent.parent  # the folder of the packages that run: a checkout, a snapshot, or site-packages

"""vitpa: what a run is and how it trains. Knows nothing of sweeps or SLURM."""

__version__ = "0.1.0"

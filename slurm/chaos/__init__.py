"""A sweep under faults on a real SLURM, and the certificate of how it came through."""

"""SLURM: its commands, their answers and their options."""

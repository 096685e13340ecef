"""What a sweep needs before it is submitted: its jobs, its cost, and what SLURM would refuse."""

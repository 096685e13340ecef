"""The sweep: a grid of runs, its submission, its status, its collected table. Training is started as a process."""

"""How fast the pieces are, on this machine: each benchmark runs the old way and the new one in one process."""

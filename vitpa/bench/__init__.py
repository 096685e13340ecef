"""How fast the pieces are on this machine, the usual way beside ours: `vitpa bench NAME` (command.py)."""

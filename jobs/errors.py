"""The errors that the commands of sweeps end with."""

from __future__ import annotations

from vitpa.errors import UserError


class SweepError(UserError):
    """Something the user has to fix: one line saying what, where and how."""

"""Programs of tests that run on a disk of their own, which can be full; skipped where a machine gives no such disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.repository import ROOT
from tests.support.waiting import run_to_end

NO_DISK = 77
BEGINNING = f"""
import sys
from pathlib import Path
from slurm.chaos.disk import PrivateDisk
folder = Path(sys.argv[1])
try:
    disk = PrivateDisk(folder)
except OSError:
    sys.exit({NO_DISK})
"""


def run_on_private_disk(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `program` to its end in a process that alone sees an empty `disk` at `folder`: two names that it has."""
    done = run_to_end([sys.executable, "-c", BEGINNING + program, str(folder)], cwd=ROOT)
    if done.returncode == NO_DISK:
        pytest.skip("this machine gives no mount namespaces")
    return done

"""Running kernels on the CPU: Triton's interpreter is chosen before Triton is imported, so in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.support.repository import ROOT


def report_of(module: str) -> dict[str, Any]:
    """What `python -m module` prints, as JSON, when Triton interprets its kernels."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report

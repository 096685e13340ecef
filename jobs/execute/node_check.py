"""The pre-flight of a node, run as a program of its own: what it reports, also where it hangs or dies."""

from __future__ import annotations

import os
import subprocess
from typing import Any

from jobs.execute.attempt import BOUND
from jobs.execute.die_with_parent import PARENT
from vitpa.child_process import child_environment
from vitpa.documents import parse_json

PREFLIGHT_LIMIT_S = 180.0


def preflight(command: list[str], log: Any) -> dict[str, Any]:
    """Run the pre-flight and return its report; one that fails or hangs is a report against the node."""
    environment = {**child_environment(), PARENT: str(os.getpid())}
    try:
        answer = subprocess.run(
            [*BOUND, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            timeout=PREFLIGHT_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _verdict(f"no answer in {PREFLIGHT_LIMIT_S:.0f} s", "node")
    try:
        report: dict[str, Any] = parse_json(answer.stdout)
        assert isinstance(report["checks"], list)
    except (ValueError, KeyError, TypeError, AssertionError):
        return _verdict(f"vitpa.preflight ended with code {answer.returncode} and no report; see the log", "run")
    return report


def _verdict(detail: str, blames: str) -> dict[str, Any]:
    return {"checks": [{"name": "preflight", "ok": False, "detail": detail, "blames": blames}]}

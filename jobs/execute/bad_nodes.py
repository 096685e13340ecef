"""Nodes that failed a pre-flight: `<root>/nodes/<node>.json`, one file each, left out of the next submissions.

A node stays recorded until its file is deleted, or for a day: it may have been fixed.
"""

from __future__ import annotations

import time
from pathlib import Path

from vitpa.records import RunError, read_json, utc_now, write_json

PREFLIGHT = "failed its pre-flight"
FORGET_AFTER_S = 24 * 3600


def record(root: Path, node: str, reason: str) -> None:
    """Write down that `node` has failed."""
    path = path_of(root, node)
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"node": node, "reason": reason, "utc": utc_now()})


def path_of(root: Path, node: str) -> Path:
    """Where it is written down."""
    return root / "nodes" / f"{node}.json"


def failed(root: Path) -> dict[str, str]:
    """The nodes that have failed lately, each with the reason."""
    found = {}
    for path in sorted((root / "nodes").glob("*.json")):
        try:
            if time.time() - path.stat().st_mtime < FORGET_AFTER_S:  # the file server's clock, to a day's precision
                found[path.stem] = str((read_json(path) or {}).get("reason"))
        except (RunError, FileNotFoundError):
            continue
    return found

"""Nodes that failed a pre-flight: `<root>/nodes/<cluster>/<node>.json`, one file each, left out of the next submissions.

A node stays recorded until its file is deleted, or for a day: it may have been fixed. Earlier versions wrote
`<root>/nodes/<node>.json`, without a cluster.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from jobs.scheduler.client import Scheduler
from vitpa.records import RunError, make_folders, read_json, utc_now, write_json

PREFLIGHT = "failed its pre-flight"
FORGET_AFTER_S = 24 * 3600


@dataclass(frozen=True)
class BadNode:
    """A node that has failed lately."""

    name: str
    reason: str
    utc: str
    path: Path  # where it is written down

    @property
    def again(self) -> str:
        """The command after which it is used again."""
        return f"rm {shlex.quote(str(self.path))}"


def record(root: Path, cluster: str, node: str, reason: str) -> None:
    """Write down that `node` of a cluster has failed."""
    folder = root / "nodes" / cluster
    make_folders(folder)
    write_json(folder / f"{node}.json", {"node": node, "reason": reason, "utc": utc_now()})


def failed(root: Path, cluster: str, scheduler: Scheduler) -> list[BadNode]:
    """The nodes of a cluster that have failed lately, without those that it does not know: sbatch would refuse the list.

    Raises:
        SchedulerError: SLURM does not answer.
    """
    found: dict[str, BadNode] = {}
    for folder in (root / "nodes", root / "nodes" / cluster):
        for path in folder.glob("*.json"):
            try:
                if time.time() - path.stat().st_mtime < FORGET_AFTER_S:  # the file server's clock, to a day's precision
                    document = read_json(path) or {}
                    found[path.stem] = BadNode(path.stem, str(document.get("reason")), str(document.get("utc")), path)
            except (RunError, FileNotFoundError):
                continue
    known = scheduler.nodes() if found else set()
    return [found[name] for name in sorted(found.keys() & known)]

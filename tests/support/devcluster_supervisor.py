"""The supervisor of a `FaultyCluster` (cluster.py), which takes the orders to break it, too; started as the real one is."""

from __future__ import annotations

import signal
import sys
import time
from datetime import datetime

from slurm.chaos.devcluster_supervisor import BreakableSupervisor
from slurm.devcluster_supervisor import main

LINGERS_S = 0.3  # the end of its own process, which may take a while on a busy machine, too


class FaultySupervisor(BreakableSupervisor):
    """The daemons of one cluster, which can be killed and started again one by one, with waits for what comes back."""

    def start_node(self, name: str) -> None:
        """Start slurmd of a node again and wait until slurmctld has heard of it."""
        begin = int(time.time())
        self.start_slurmd(name)
        self._wait(f"node {name}'s return", lambda: self._in_service(name, begin), daemon=f"slurmd.{name}")

    def _in_service(self, name: str, since: int) -> bool:
        facts = dict(word.split("=", 1) for word in self._ask("scontrol", "-o", "show", "node", name).split() if "=" in word)
        started = facts.get("SlurmdStartTime", "None")
        if started == "None" or datetime.fromisoformat(started).timestamp() < since:
            return False
        return facts["State"].partition("+")[0] in ("IDLE", "MIXED", "ALLOCATED")

    def restart_controller(self) -> None:
        """End slurmctld as one does, start it and wait until it answers."""
        self.stop_controller()
        self.start_controller()

    def stop_accounting(self) -> None:
        """End slurmdbd: sacct fails from here on."""
        self._end("slurmdbd", signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1:], FaultySupervisor)
    time.sleep(LINGERS_S)

"""The supervisor of a `FaultyCluster` (cluster.py), which takes the orders to break it, too; started as the real one is."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import datetime

from slurm import devcluster_processes as processes
from slurm import devcluster_supervisor
from slurm.devcluster_supervisor import FailedError, Supervisor


class FaultySupervisor(Supervisor):
    """The daemons of one cluster, which can be killed and started again one by one."""

    def kill_node(self, name: str) -> None:
        """End slurmd of a node and its steps, by SIGKILL, as if the node had lost power."""
        below, log = processes.descendants([os.getpid()]), self.layout.log(f"slurmd.{name}")
        steps = [pid for pid in below if processes.writes_below(pid, log)]  # slurmd and every slurmstepd do
        self._end(f"slurmd.{name}", signal.SIGKILL)
        processes.kill([*steps, *processes.descendants(steps)])

    def start_node(self, name: str) -> None:
        """Start slurmd of a node again and wait until slurmctld has heard of it."""
        begin = int(time.time())
        self._spawn(f"slurmd.{name}", "-D", "-N", name)
        self._wait(f"node {name}'s return", lambda: self._in_service(name, begin), daemon=f"slurmd.{name}")

    def _in_service(self, name: str, since: int) -> bool:
        facts = dict(word.split("=", 1) for word in self._ask("scontrol", "-o", "show", "node", name).split() if "=" in word)
        started = facts.get("SlurmdStartTime", "None")
        if started == "None" or datetime.fromisoformat(started).timestamp() < since:
            return False
        return facts["State"].partition("+")[0] in ("IDLE", "MIXED", "ALLOCATED")

    def restart_controller(self) -> None:
        """End slurmctld as one does, start it and wait until it answers."""
        self._end("slurmctld", signal.SIGTERM)
        self._start_controller()

    def stop_accounting(self) -> None:
        """End slurmdbd: sacct fails from here on."""
        self._end("slurmdbd", signal.SIGTERM)

    def _end(self, name: str, signal_number: int) -> None:
        if self.daemons[name].returncode is not None:
            raise FailedError(f"{name} does not run")
        self._end_all([name], signal_number)


if __name__ == "__main__":
    devcluster_supervisor.Supervisor = FaultySupervisor  # type: ignore[misc]
    devcluster_supervisor.main(sys.argv[1:])

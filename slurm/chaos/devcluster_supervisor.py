"""The supervisor of a `BreakableCluster` (cluster.py): it takes the orders to break the cluster, too."""

from __future__ import annotations

import os
import signal
import sys

from slurm import devcluster_processes as processes
from slurm.devcluster_supervisor import FailedError, Supervisor, main


class BreakableSupervisor(Supervisor):
    """The daemons of one cluster, which can be killed and started again one by one."""

    def kill_node(self, name: str) -> None:
        """End slurmd of a node and its steps, by SIGKILL, as if the node had lost power."""
        below, log = processes.descendants([os.getpid()]), self.layout.log(f"slurmd.{name}")
        steps = [pid for pid in below if processes.writes_below(pid, log)]  # slurmd and every slurmstepd do
        self._end(f"slurmd.{name}", signal.SIGKILL)
        processes.kill([*steps, *processes.descendants(steps)])

    def kill_slurmd(self, name: str) -> None:
        """End slurmd of a node by SIGKILL; its steps go on."""
        self._end(f"slurmd.{name}", signal.SIGKILL)

    def start_slurmd(self, name: str) -> None:
        """Start slurmd of a node again, and do not wait for it: slurmctld may be away."""
        self._spawn(f"slurmd.{name}", "-D", "-N", name)

    def stop_controller(self) -> None:
        """End slurmctld as one does; jobs run on."""
        self._end("slurmctld", signal.SIGTERM)

    def start_controller(self) -> None:
        """Start slurmctld again and wait until it answers."""
        self._start_controller()

    def _end(self, name: str, signal_number: int) -> None:
        if self.daemons[name].returncode is not None:
            raise FailedError(f"{name} does not run")
        self._end_all([name], signal_number)


if __name__ == "__main__":
    main(sys.argv[1:], BreakableSupervisor)

"""A development cluster of which parts can be killed and started again."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Self

from slurm.devcluster import DevCluster, stop_cluster


class BreakableCluster(DevCluster):
    """It lives as long as the body of `with`, and takes orders from several threads, one after the other."""

    supervisor = "slurm.chaos.devcluster_supervisor"

    def __init__(self, root: Path, **sizes: int) -> None:
        super().__init__(root, **sizes)
        self._turn = threading.Lock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._supervisor is not None:
            stop_cluster(self.root)
            self._leave()

    def kill_node(self, name: str) -> None:
        """End slurmd of a node, its job steps and their processes by SIGKILL, as if it had lost power."""
        self._order("kill_node", name=name)

    def kill_slurmd(self, name: str) -> None:
        """End slurmd of a node by SIGKILL; its jobs go on."""
        self._order("kill_slurmd", name=name)

    def start_slurmd(self, name: str) -> None:
        """Start slurmd of a node again."""
        self._order("start_slurmd", name=name)

    def stop_controller(self) -> None:
        """End slurmctld; jobs go on."""
        self._order("stop_controller")

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers."""
        self._order("start_controller")

    def _order(self, what: str, **arguments: str) -> None:
        with self._turn:
            super()._order(what, **arguments)

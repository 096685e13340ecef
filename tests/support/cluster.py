"""The fixture `cluster`: a real SLURM on this machine for the tests marked `slurm`, started once per session."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from slurm.chaos.cluster import BreakableCluster
from slurm.devcluster import DevCluster, check_host_name, check_programs, stop_cluster
from slurm.devcluster_folder import DevClusterError


def require_slurm() -> None:
    """Skip where SLURM cannot run; in CI that is a failure."""
    try:
        check_programs()
        check_host_name(socket.gethostname())
    except DevClusterError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI runs the tests on SLURM, too: {error}")
        pytest.skip(str(error))


def short_folder() -> Path:
    """A new folder with a path that leaves room for the names of unix sockets; pytest's own do not."""
    return Path(tempfile.mkdtemp(prefix="vitpa-", dir="/tmp"))


class BoundCluster(DevCluster):
    """A cluster that lives as long as the body of `with`."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def node_names(self) -> list[str]:
        return self.settings.node_names

    def stop(self) -> None:
        """Cancel the jobs, end everything, remove the folder. Nothing happens if it is stopped already."""
        if self._supervisor is not None:
            stop_cluster(self.root)
            self._leave()


class FaultyCluster(BoundCluster, BreakableCluster):
    """A cluster of which parts can be killed and started again, with waits for what comes back."""

    supervisor = "tests.support.devcluster_supervisor"

    def start_node(self, name: str) -> None:
        """Bring a node back and wait until it is in service."""
        self._order("start_node", name=name)

    def restart_controller(self) -> None:
        """Restart slurmctld and wait until it answers; jobs run on."""
        self._order("restart_controller")

    def stop_accounting(self) -> None:
        """End slurmdbd: sacct fails until `start_accounting`."""
        self._order("stop_accounting")

    def start_accounting(self) -> None:
        """Start slurmdbd again."""
        self._order("start_accounting")


def guardian_pid(cluster: DevCluster) -> int:
    """The process whose descendants are the whole cluster."""
    return cluster.layout.recorded_pid()


@pytest.fixture(scope="session")
def cluster() -> Iterator[FaultyCluster]:
    """4 nodes with 2 pretended GPUs each; `cluster.environment` is for the clients."""
    require_slurm()
    with FaultyCluster(short_folder(), nodes=4, gpus=2) as running:
        yield running

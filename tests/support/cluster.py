"""The fixture `cluster`: a real SLURM on this machine for the tests marked `slurm`, started once per session."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.devcluster import DevCluster, check_host_name, check_programs
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


@pytest.fixture(scope="session")
def cluster() -> Iterator[DevCluster]:
    """4 nodes with 2 pretended GPUs each; `cluster.environment` is for the clients."""
    require_slurm()
    with DevCluster(short_folder(), nodes=4, gpus=2) as running:
        yield running

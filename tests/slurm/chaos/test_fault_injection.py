"""What a certificate says of single faults and commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm.chaos.certificate import RESTART
from slurm.chaos.cluster import BreakableCluster
from slurm.chaos.fault_injection import FaultInjection
from slurm.chaos.faults import BLOWS, Blow
from slurm.chaos.schedule import Fault
from slurm.chaos.sweep import Sweep
from slurm.chaos.watch import Strike
from slurm.devcluster_folder import DevClusterError


def test_faults_that_struck_nobody_are_told_among_the_others(tmp_path: Path) -> None:
    cluster = BreakableCluster(tmp_path / "slurm", nodes=2, gpus=0, cpus=1)  # never started
    injection = FaultInjection(cluster, Sweep(["demo"], tmp_path, tmp_path / "profile.yaml"), None, [], 60.0, print)
    injection.began_s = 100.0
    injection.strikes += [
        Strike(90.0, RESTART, ("a",), ""),
        Strike(130.04, "node down", ("a", "b"), "n1 without power for 5 s"),
    ]
    injection.missed.append((105.0, Fault(5.0, "requeue", 0.5, 0.0), "no run was in training"))
    injection.commands.append((160.0, "retry", 0))
    assert injection.faults_as_json() == [
        {"at_s": 5.0, "kind": "requeue", "runs": [], "what": "struck nobody: no run was in training"},
        {"at_s": 30.0, "kind": "node down", "runs": ["a", "b"], "what": "n1 without power for 5 s"},
    ]
    assert injection.commands_as_json() == [{"at_s": 60.0, "verb": "retry", "exit_code": 0}]


def test_a_fault_that_cannot_be_ended_ends_no_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slurmd that does not come back, say: its run is lost, and the certificate says so."""

    def stays_away() -> None:
        raise DevClusterError("slurmd of n1 has not started within 30 s")

    monkeypatch.setitem(BLOWS, "slurmd killed", lambda *_: Blow([], "slurmd of n1 away for 5 s", stays_away))
    told: list[str] = []
    cluster = BreakableCluster(tmp_path / "slurm", nodes=2, gpus=0, cpus=1)  # never started
    injection = FaultInjection(cluster, Sweep(["demo"], tmp_path, tmp_path / "profile.yaml"), None, [], 60.0, told.append)
    injection._strike(Fault(5.0, "slurmd killed", 0.5, 5.0))
    assert [strike.what for strike in injection.strikes] == ["slurmd of n1 away for 5 s"]
    assert told[-1].endswith("slurmd killed: it has no end (slurmd of n1 has not started within 30 s)")
